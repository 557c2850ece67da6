"""Graphs on disk: quantized operators put in, read back and compared; damage refused."""

# ruff: noqa: E402 (the skip comes before what needs the package)

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the extra quantkit[onnx] is not installed")

from formats.onnx.test_nbits import sample
from onnx.reference import ReferenceEvaluator
from onnx_graphs import float_graph

from quantkit.errors import CheckpointError, FormatError
from quantkit.formats.onnx.check import check_graph
from quantkit.formats.onnx.file import DATA, MODEL, OnnxFile
from quantkit.formats.onnx.rewrite import rewrite
from quantkit.formats.onnx.rows import RowIndex
from quantkit.formats.onnx.triton import model_config
from quantkit.inference.layers import QuantLinear
from quantkit.numbers.tensor import QuantizedTensor

Weights = dict[str, QuantizedTensor]


def indexed(weights: Weights) -> RowIndex:
    index = RowIndex()
    for name, tensor in weights.items():
        index.add(name, tensor.dequantize(torch.float32))
    return index


def written(folder: Path, weights: Weights, matrices: dict[str, torch.Tensor]) -> Path:
    """The rewritten graph of float32 matrices [O, I]."""
    float_graph(folder / "float", matrices)
    (folder / "out").mkdir()
    rewrite(
        folder / "float", folder / "out", indexed(weights), weights.__getitem__, accuracy_level=1
    )
    return folder / "out"


def values(tensor: QuantizedTensor) -> torch.Tensor:
    return tensor.dequantize(torch.float32)


def test_fused_weights_become_one_node_with_their_codes_and_others_stay(tmp_path: Path) -> None:
    weights = {name: sample("w4a16_g32_asym", seed=seed) for seed, name in enumerate("qkv")}
    kept = torch.randn(4, 96)
    fused = torch.cat([values(tensor) for tensor in weights.values()])
    out = written(tmp_path, weights, {"qkv": fused, "router": kept})
    file = OnnxFile(out)
    assert [node.op_type for node in file.graph.node] == ["MatMulNBits", "MatMul"]
    assert torch.equal(file.read("router.MatMul.weight"), kept.T)
    assert "qkv.MatMul.weight" not in file.stored
    checked = check_graph(out, indexed(weights), weights.__getitem__)
    assert checked.difference is None and checked.nodes == 1


def test_one_changed_bit_is_found_and_its_node_named(tmp_path: Path) -> None:
    weights = {"up": sample("w4a16_g32_asym"), "down": sample("w8a16_row", seed=1)}
    out = written(tmp_path, weights, {name: values(t) for name, t in weights.items()})
    assert check_graph(out, indexed(weights), weights.__getitem__).difference is None
    file = OnnxFile(out)
    data = bytearray((out / DATA).read_bytes())
    for part, kind in (("qweight", "in no weight"), ("scales", "in no weight")):
        position = file.stored[f"down.MatMulNBits.{part}"].offset + 1
        data[position] ^= 1
        (out / DATA).write_bytes(data)
        found = check_graph(out, indexed(weights), weights.__getitem__).difference
        assert found is not None and "/down/MatMul" in found and kind in found
        data[position] ^= 1


def test_codes_and_zeros_that_differ_by_the_same_are_no_match(tmp_path: Path) -> None:
    """The values are equal, the numbers are not."""
    weights = {"up": sample("w4a16_g32_asym")}
    tensor = weights["up"]
    assert tensor.zero is not None
    tensor.codes.clamp_(max=14)
    tensor.zero.clamp_(max=14)
    out = written(tmp_path, weights, {"up": values(tensor)})
    shifted = QuantizedTensor(
        codes=tensor.codes + 1,
        scale=tensor.scale,
        zero=tensor.zero + 1,
        scheme=tensor.scheme,
        dtype=tensor.dtype,
    )
    found = check_graph(out, indexed(weights), {"up": shifted}.__getitem__).difference
    assert found == "/up/MatMulNBits: codes of up"


def test_a_weight_that_is_in_no_node_is_named(tmp_path: Path) -> None:
    weights = {"up": sample("w4a16_g32"), "down": sample("w4a16_g32", seed=1)}
    out = written(tmp_path, weights, {"up": values(weights["up"])})
    found = check_graph(out, indexed(weights), weights.__getitem__).difference
    assert found == "down: in no quantized node of the graph"


def test_weights_of_several_schemes_in_one_matrix_are_refused(tmp_path: Path) -> None:
    weights = {"up": sample("w4a16_g32"), "down": sample("w8a16_g32", seed=1)}
    fused = torch.cat([values(tensor) for tensor in weights.values()])
    with pytest.raises(FormatError, match="several schemes: up, down"):
        written(tmp_path, weights, {"both": fused})


def test_int8_tokens_are_computed_as_quantkit_does(tmp_path: Path) -> None:
    weights = {name: sample("w8a8_row", rows=7, seed=seed) for seed, name in enumerate("gu")}
    out = written(tmp_path, weights, {name: values(t) for name, t in weights.items()})
    assert check_graph(out, indexed(weights), weights.__getitem__).difference is None
    # Both products read one input, whose tokens are quantized once.
    types = [node.op_type for node in OnnxFile(out).graph.node]
    assert types.count("Round") == 1 and types.count("MatMulInteger") == 2
    x = torch.randn(4, 120, generator=torch.Generator().manual_seed(5))
    x[1] = 0
    x[2] *= 1e-30
    found = ReferenceEvaluator(onnx.load(out / MODEL)).run(None, {"x_120": x.numpy()})
    for result, tensor in zip(found, weights.values(), strict=True):
        expected = QuantLinear(tensor)(x)
        # The same integers; two float32 products in another order.
        assert torch.allclose(torch.from_numpy(result), expected, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = {"up": sample("w4a16_g32_asym"), "down": sample("w8a8_row", seed=1)}
    matrices = {name: values(tensor) for name, tensor in weights.items()}
    return written(tmp_path_factory.mktemp("good"), weights, matrices)


def damaged(good: Path, target: Path, model: bytes | None, data: bytes | None) -> Path:
    target.mkdir(exist_ok=True)
    (target / MODEL).write_bytes((good / MODEL).read_bytes() if model is None else model)
    (target / DATA).write_bytes((good / DATA).read_bytes() if data is None else data)
    return target


def edited(good: Path, **fields: str) -> bytes:
    """The graph with other external data fields of its first weight."""
    model = onnx.load_model(good / MODEL, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = fields.get(entry.key, entry.value)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"location": "../../secret"}, "only files beside the graph are read"),
        ({"offset": "1000000"}, "cut short"),
        ({"offset": "-4"}, "cut short"),
        ({"length": str(2**60)}, "bytes are not a"),
        ({"length": "many"}, "no number"),
    ],
)
def test_weights_outside_their_file_are_refused(
    good: Path, tmp_path: Path, fields: dict[str, str], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        OnnxFile(damaged(good, tmp_path, edited(good, **fields), None))


def test_a_header_that_claims_an_exabyte_is_refused_at_once(good: Path, tmp_path: Path) -> None:
    model = onnx.load_model(good / MODEL, load_external_data=False)
    first = model.graph.initializer[0]
    first.dims[0] = 2**60
    for entry in first.external_data:
        if entry.key == "length":
            entry.value = str(2**60 * int(first.dims[1]) * int(first.dims[2]))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="cut short"):
        OnnxFile(damaged(good, tmp_path, model.SerializeToString(), None))
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 no model", b"\x0a\xff\xff\xff\xff\x0f", b"{}"]
)
def test_what_is_no_model_is_refused(good: Path, tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError, match="no ONNX model, or a damaged one"):
        OnnxFile(damaged(good, tmp_path, content, None))
    with pytest.raises(CheckpointError, match="there is no such file"):
        OnnxFile(tmp_path / "nowhere")


def test_the_servers_configuration_lists_every_input_and_output(good: Path) -> None:
    text = model_config(good, name="demo")
    assert 'name: "demo"' in text and text.count("input {") == 2 and text.count("output {") == 2
    assert "dims: [ -1, 96 ]" in text and text.count("{") == text.count("}")
    with pytest.raises(FormatError, match="cannot have this name"):
        model_config(good, name='x" backend: "y')
