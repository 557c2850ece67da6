"""Damages quantized checkpoints at random and reads them: refused with a reason, or read whole.

    fuzz_formats.py [--count 100000] [--seed 0]
Every built-in format takes turns, and so does what is only read.  What comes through must have the
shape and scheme that was found, with codes in range; any error but those that `survives` expects
is a defect.
tests/formats/test_fuzz.py runs some of it.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from format_samples import MemorySource, planned, quantized, stored

from quantkit.errors import CheckpointError, FormatError, NumericsError, SchemeError
from quantkit.formats.format import BuiltFormat
from quantkit.formats.registry import available_formats, format_of, make_format
from quantkit.numbers.scheme import Scheme

SCHEMES = ("w2a16_g32", "w3a16_g32_asym", "w4a16_g32", "w4a16_row_asym", "w8a16_g32", "w8a8_row")
FLOATS = ("nf4_b64", "nf4_b64_dq", "fp4_b32", "fp8a8_row", "fp8a16_row")
_SHAPE = (32, 64)
_VALUES = (None, True, -1, 0, 1, 3, 4, 5, 8, 2**60, 0.5, "", "int", "group", "[", [], {}, [[]])
_DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How many damaged checkpoints were refused, and how many were read all the same."""

    refused: int
    read: int


def samples() -> list[MemorySource]:
    """One checkpoint of every format and scheme it holds, and of what is only read."""
    found = read_only_samples()
    for name in available_formats():
        chosen = make_format(name)
        if isinstance(chosen, BuiltFormat):
            # fuzz_onnx.py damages graphs.
            continue
        for scheme in map(Scheme.parse, (*SCHEMES, *FLOATS)):
            if chosen.supports(scheme) is None:
                weight = planned("model.layers.0.mlp.up_proj.weight", _SHAPE, scheme)
                kept = planned("model.layers.0.mlp.down_proj.weight", _SHAPE, None)
                tensors = chosen.pack(weight, quantized(scheme, _SHAPE, torch.float16))
                tensors[kept.name] = torch.zeros(_SHAPE, dtype=torch.float16)
                found.append(stored(chosen, [weight, kept], tensors, torch.float16))
    return found


def read_only_samples() -> list[MemorySource]:
    """One checkpoint in FP8 blocks, one in FP8 per weight, one of MXFP4 experts."""
    numbers = torch.zeros(_SHAPE).to(torch.float8_e4m3fn)
    name = "model.layers.0.mlp.up_proj.weight"
    experts = "model.layers.0.mlp.experts.down_proj"
    packed = {
        f"{experts}_blocks": torch.full((2, 32, 2, 16), 0x5A, dtype=torch.uint8),
        f"{experts}_scales": torch.full((2, 32, 2), 120, dtype=torch.uint8),
    }
    checkpoints: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
        (
            {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]},
            {name: numbers, f"{name}_scale_inv": torch.ones(2, 2)},
        ),
        (
            {"quant_method": "fp8", "weight_block_size": None},
            {name: numbers, f"{name}_scale_inv": torch.tensor(0.5)},
        ),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, packed),
    ]
    return [
        MemorySource(
            config={"model_type": "llama", "dtype": "float16", "quantization_config": fields},
            tensors=tensors,
        )
        for fields, tensors in checkpoints
    ]


def fuzz(count: int, seed: int) -> Outcome:
    """Reads `count` damaged checkpoints.  Raises whatever a reader should not have raised."""
    rng = random.Random(seed)
    originals = samples()
    tally: Counter[str] = Counter()
    for number in range(count):
        source = damaged(originals[number % len(originals)], rng)
        tally["read" if survives(source) else "refused"] += 1
    return Outcome(refused=tally["refused"], read=tally["read"])


def survives(source: MemorySource) -> bool:
    """Whether a checkpoint is read; AssertionError if what was read contradicts itself."""
    try:
        chosen = format_of(source)
        for name, weight in chosen.weights(source).items():
            tensor = chosen.unpack(weight, source)
            assert tensor.shape == weight.shape, name
            assert tensor.scheme == weight.scheme, name
            highest = int(tensor.codes.max()) if tensor.codes.numel() else 0
            assert highest < 2**tensor.scheme.bits, name
            assert tensor.dequantize().shape == weight.shape, name
    except (CheckpointError, FormatError, NumericsError, SchemeError) as error:
        assert len(str(error)) > 10
        return False
    return True


def damaged(source: MemorySource, rng: random.Random) -> MemorySource:
    """A copy with one to three things changed in its configuration or its tensors."""
    config = copy.deepcopy(source.config)
    tensors = dict(source.tensors)
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.6:
            _damage_mapping(config["quantization_config"], rng)
        elif tensors:
            _damage_tensor(tensors, rng)
    return MemorySource(config=config, tensors=tensors)


def _damage_mapping(fields: Any, rng: random.Random) -> None:
    if isinstance(fields, dict) and fields:
        key = rng.choice(sorted(fields, key=str))
        if isinstance(fields[key], (dict, list)) and fields[key] and rng.random() < 0.7:
            _damage_mapping(fields[key], rng)
        elif rng.random() < 0.3:
            del fields[key]
        else:
            fields[key] = copy.deepcopy(rng.choice(_VALUES))
    elif isinstance(fields, list) and fields:
        place = rng.randrange(len(fields))
        if isinstance(fields[place], (dict, list)) and fields[place]:
            _damage_mapping(fields[place], rng)
        else:
            fields[place] = copy.deepcopy(rng.choice(_VALUES))


def _damage_tensor(tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name + rng.choice(("_scale", ".absmax", "x"))] = tensors.pop(name)
    elif kind == 2:
        tensors[name] = tensor.to(rng.choice(_DTYPES))
    elif kind == 3 and tensor.ndim and tensor.shape[0]:
        tensors[name] = tensor[: rng.randrange(tensor.shape[0])].contiguous()
    elif kind == 4:
        tensors[name] = tensor.reshape(-1)
    elif tensor.numel():
        raw = tensor.clone().contiguous().view(-1).view(torch.uint8)
        raw[rng.randrange(len(raw))] = rng.randrange(256)
        tensors[name] = raw.view(tensor.dtype).view(tensor.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcome = fuzz(options.count, options.seed)
    print(f"{options.count} damaged checkpoints: {outcome.refused} refused, {outcome.read} read")


if __name__ == "__main__":
    main()
