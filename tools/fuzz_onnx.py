"""Damages ONNX models at random and reads them: refused with a reason, or read whole.

    fuzz_onnx.py [--count 100000] [--seed 0]

One graph holds every kind of quantized weight.  Its bytes are flipped and cut, its fields changed
one by one, and what names.json says too; then it is described, opened as a checkpoint and every
tensor read.  Any error but quantkit's own is a defect, and so is a second of CPU time for one.
tests/formats/onnx/test_fuzz.py runs some of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from quantkit.errors import QuantkitError
from quantkit.formats.onnx.describe import describe_onnx
from quantkit.formats.onnx.file import DATA, DOMAIN, MODEL, DataWriter, OnnxFile
from quantkit.formats.onnx.matrices import matrices
from quantkit.formats.onnx.names import NAMES, KeptPlace, Names, Part, QuantizedPlace
from quantkit.formats.onnx.nbits import blocks_of, pack
from quantkit.formats.onnx.source import OnnxSource
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

_NUMBERS = (-1, 0, 1, 2, 3, 7, 16, 21, 22, 63, 255, 2**31 - 1, 2**40, 2**60, 2**63 - 1, -(2**63))
_TEXTS = ("", "codes", "scale", "..", "../x", DATA, MODEL, "x" * 300, "-4", str(2**60), "1e3")
_VALUES = (None, True, -1, 0, 1, 3, 2**60, 0.5, "", "w4a16_g32", "float32", [], {}, [[]], [1, 2])
_SLOWEST_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How many damaged models were refused, how many read all the same, and the slowest of all."""

    refused: int
    read: int
    seconds: float


def write_sample(folder: Path) -> None:
    """A model with every operator that holds quantized weights, and its names."""
    generator = torch.Generator().manual_seed(0)
    scheme = Scheme.parse("w4a16_g16_asym")
    tensor = QuantizedTensor(
        codes=torch.randint(0, 16, (6, 32), generator=generator).to(torch.uint8),
        scale=PlainScale(tensor=torch.rand(6, 2, generator=generator).bfloat16()),
        zero=torch.randint(0, 16, (6, 2), generator=generator).to(torch.uint8),
        scheme=scheme,
        dtype=torch.bfloat16,
    )
    packed = pack(blocks_of(tensor))
    assert packed.zeros is not None
    int8 = torch.randint(-127, 128, (12, 5), generator=generator).to(torch.int8)
    norm = torch.rand(12, generator=generator)
    with DataWriter(folder) as writer:
        entries = [
            writer.put("up.qweight", packed.codes),
            writer.put("up.scales", packed.scales),
            writer.put("up.zeros", packed.zeros),
            writer.put("scales", packed.scales.reshape(6, 2)),
            writer.put("zeros", packed.zeros.reshape(6, 1)),
            writer.put("down.qweight", int8),
            writer.put("down.scales", torch.rand(5, generator=generator)),
            writer.put("norm", norm),
            helper.make_tensor("codes", TensorProto.UINT4, [32, 4], [3] * 128),
            numpy_helper.from_array(torch.rand(2, 4, generator=generator).numpy(), "scale"),
            helper.make_tensor("flat", TensorProto.INT64, [2], [6, -1]),
        ]
        nodes = [
            helper.make_node(
                "MatMulNBits",
                ["x", "up.qweight", "up.scales", "up.zeros"],
                ["a"],
                name="/up/MatMulNBits",
                domain=DOMAIN,
                K=32,
                N=6,
                bits=4,
                block_size=16,
            ),
            helper.make_node("MatMulInteger", ["i", "down.qweight"], ["b"], name="/down/MatMul"),
            helper.make_node(
                "DequantizeLinear", ["codes", "scale"], ["w"], name="dq", axis=0, block_size=16
            ),
            helper.make_node("MatMul", ["x", "w"], ["c"], name="/gate/MatMul"),
            helper.make_node("Identity", ["norm"], ["d"], name="/norm"),
            helper.make_node("Reshape", ["up.qweight", "flat"], ["table"], name="/reshape"),
            helper.make_node(
                "GatherBlockQuantized",
                ["table", "i", "scales", "zeros"],
                ["e"],
                name="/embed/Gather",
                domain=DOMAIN,
                gather_axis=0,
                quantize_axis=1,
                bits=4,
                block_size=16,
            ),
        ]
        outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "abcde"]
        graph = helper.make_graph(nodes, "g", [], outputs, entries)
        domains = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
        writer.finish(helper.make_model(graph, opset_imports=domains, ir_version=10))
    up = QuantizedPlace(
        scheme=scheme,
        shape=(6, 32),
        dtype=torch.bfloat16,
        scale_dtype=torch.bfloat16,
        parts=(Part(node="up.MatMulNBits", row=0, start=0, stop=6),),
    )
    down = QuantizedPlace(
        scheme=Scheme.parse("w8a8_row"),
        shape=(5, 12),
        dtype=torch.float32,
        scale_dtype=torch.float32,
        parts=(Part(node="down.MatMul", row=0, start=0, stop=5),),
    )
    names = Names(
        config={"model_type": "llama"},
        quantized={"up.weight": up, "down.weight": down},
        kept={"norm.weight": KeptPlace(initializer="norm", shape=(12,), dtype=torch.float32)},
        lost=(),
    )
    (folder / NAMES).parent.mkdir(exist_ok=True)
    (folder / NAMES).write_bytes(names.to_json())


def survives(folder: Path) -> bool:
    """True if the model is read whole, false if it is refused as it should be."""
    path = folder / MODEL
    try:
        content = describe_onnx(path)
        assert all(item.num_bytes >= 0 and item.parameters >= 0 for item in content.items)
        file = OnnxFile(path)
        for matrix in matrices(file):
            tensor = matrix.read(file)
            assert tensor.shape == matrix.shape and tensor.scheme == matrix.scheme
            assert int(tensor.codes.max()) < 2**tensor.scheme.bits
        source = OnnxSource(path)
        for name in source.names():
            assert source.read(name).shape == source.info(name).shape, name
    except QuantkitError as error:
        assert len(str(error)) > 10
        return False
    return True


def fuzz(count: int, seed: int) -> Outcome:
    """Reads `count` damaged models.  Raises whatever a reader should not have raised."""
    rng = random.Random(seed)
    tally: Counter[bool] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_sample(folder)
        graph, names = (folder / MODEL).read_bytes(), (folder / NAMES).read_bytes()
        data = (folder / DATA).read_bytes()
        assert survives(folder)
        for _ in range(count):
            kind = rng.randrange(8)
            (folder / MODEL).write_bytes(_damaged_graph(graph, rng, kind) if kind < 6 else graph)
            (folder / NAMES).write_bytes(_damaged_names(names, rng) if kind == 6 else names)
            if kind == 7:
                (folder / DATA).write_bytes(data[: rng.randrange(len(data))])
            began = time.process_time()
            tally[survives(folder)] += 1
            slowest = max(slowest, time.process_time() - began)
            assert slowest < _SLOWEST_SECONDS, f"{slowest} seconds of CPU"
            if kind == 7:
                (folder / DATA).write_bytes(data)
    return Outcome(refused=tally[False], read=tally[True], seconds=slowest)


def _damaged_graph(graph: bytes, rng: random.Random, kind: int) -> bytes:
    """Bytes flipped, set, cut, put in or taken out (kind 0 to 2), or fields changed."""
    if kind > 2:
        model = onnx.ModelProto.FromString(graph)
        for _ in range(rng.randint(1, 3)):
            _damage_field(model.graph, rng)
        return bytes(model.SerializeToString())
    content = bytearray(graph)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(content))
        action = rng.randrange(4)
        if action == 0:
            content[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            content[place] = rng.randrange(256)
        elif action == 2:
            del content[place : place + rng.randrange(1, 20)]
        else:
            content[place:place] = rng.randbytes(rng.randrange(1, 20))
    if kind == 2:
        del content[rng.randrange(len(content)) :]
    return bytes(content)


def _damage_field(graph: Any, rng: random.Random) -> None:
    if rng.random() < 0.5 and graph.initializer:
        tensor = rng.choice(list(graph.initializer))
        action = rng.randrange(6)
        if action == 0 and tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(_NUMBERS)
        elif action == 1:
            tensor.data_type = rng.randrange(-1, 30)
        elif action == 2 and tensor.external_data:
            rng.choice(list(tensor.external_data)).value = rng.choice(_TEXTS)
        elif action == 3:
            tensor.name = rng.choice([*(t.name for t in graph.initializer), *_TEXTS])
        elif action == 4:
            tensor.data_location = rng.randrange(2)
        else:
            tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
        return
    node = rng.choice(list(graph.node))
    action = rng.randrange(4)
    if action == 0 and node.attribute:
        rng.choice(list(node.attribute)).i = rng.choice(_NUMBERS)
    elif action == 1 and node.input:
        names = [t.name for t in graph.initializer]
        node.input[rng.randrange(len(node.input))] = rng.choice([*names, *_TEXTS])
    elif action == 2 and node.input:
        del node.input[rng.randrange(len(node.input)) :]
    else:
        node.op_type = rng.choice([n.op_type for n in graph.node])


def _damaged_names(names: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return names[: rng.randrange(len(names))]
    data = json.loads(names)
    for _ in range(rng.randint(1, 3)):
        _damage_value(data, rng)
    return json.dumps(data).encode()


def _damage_value(fields: Any, rng: random.Random) -> None:
    keys = sorted(fields) if isinstance(fields, dict) else list(range(len(fields)))
    if not keys:
        return
    key = rng.choice(keys)
    if isinstance(fields[key], (dict, list)) and fields[key] and rng.random() < 0.8:
        _damage_value(fields[key], rng)
    elif rng.random() < 0.3:
        del fields[key]
    else:
        fields[key] = copy.deepcopy(rng.choice(_VALUES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcome = fuzz(options.count, options.seed)
    print(
        f"{options.count} damaged models: {outcome.refused} refused, {outcome.read} read, the "
        f"slowest took {outcome.seconds:.3f} s"
    )


if __name__ == "__main__":
    main()
