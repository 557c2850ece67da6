"""Quantized tables of embeddings decode as the operator says; what is not read is refused."""

# ruff: noqa: E402 (the skip comes before what needs the package)

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the extra quantkit[onnx] is not installed")

from formats.onnx.test_source import array, graph_of
from onnx import TensorProto, helper

from quantkit.checks.inspection import inspect
from quantkit.errors import CheckpointError
from quantkit.formats.onnx.file import OnnxFile
from quantkit.formats.onnx.matrices import matrices

ROWS = 5
TYPES = {
    # name: (ONNX type, dtype, bits, zero where none is given, stored [I, V])
    "uint8-2": (TensorProto.UINT8, torch.uint8, 2, 2, False),
    "uint8-4": (TensorProto.UINT8, torch.uint8, 4, 8, False),
    "uint8-8": (TensorProto.UINT8, torch.uint8, 8, 128, False),
    "uint4": (TensorProto.UINT4, torch.uint8, 4, 0, False),
    "int4": (TensorProto.INT4, torch.int8, 4, 0, False),
    "int4-columns": (TensorProto.INT4, torch.int8, 4, 0, True),
}


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes of rows of codes, the first in the lowest bits; slow."""
    rows = []
    for row in codes.tolist():
        number = sum(code << bits * place for place, code in enumerate(row))
        rows.append(list(number.to_bytes(math.ceil(len(row) * bits / 8), "little")))
    return torch.tensor(rows, dtype=torch.uint8)


def write(
    folder: Path,
    kind: str,
    *,
    columns: int = 48,
    block: int = 16,
    zeros: bool = True,
    reshape: Any = None,
    tensors: dict[str, Any] | None = None,
    constant: str | None = None,
    **attributes: int,
) -> tuple[Path, torch.Tensor]:
    """A graph with a table of random numbers, and what it decodes to [V, I]."""
    number, dtype, bits, absent, turned = TYPES[kind]
    generator = torch.Generator().manual_seed(0)
    count = -(-columns // block)
    low = -8 if dtype == torch.int8 else 0
    codes, zero = (
        torch.randint(low, low + 2**bits, (ROWS, width), generator=generator)
        for width in (columns, count)
    )
    scale = torch.rand(ROWS, count, generator=generator) + 0.1
    zero = zero if zeros else torch.full_like(zero, absent)
    shift, step = (part.repeat_interleave(block, 1)[:, :columns] for part in (zero, scale))
    expected = (codes - shift) * step
    stored = {"data": codes, "scales": scale, "zeros": zero}
    if number == TensorProto.UINT8:
        stored.update(data=packed(codes, bits), zeros=packed(zero, bits))
    if turned:
        stored = {name: value.T for name, value in stored.items()}
    if reshape is not None:
        stored["data"] = stored["data"].reshape(ROWS, count, -1)
    made = {
        name: array(name, value, None if name == "scales" else number)
        for name, value in stored.items()
        if zeros or name != "zeros"
    }
    made.update(tensors or {})
    nodes, data = [], "data"
    if reshape is not None:
        nodes.append(helper.make_node("Reshape", ["data", "shape"], ["flat"], name="reshape"))
        data = "flat"
        if constant is None:
            made["shape"] = array("shape", torch.tensor(reshape))
        else:
            value = reshape if constant == "value_ints" else array("t", torch.tensor(reshape))
            nodes.insert(0, helper.make_node("Constant", [], ["shape"], **{constant: value}))
    given = {
        "bits": bits,
        "block_size": block,
        "gather_axis": int(turned),
        "quantize_axis": 1 - int(turned),
    }
    nodes.append(
        helper.make_node(
            "GatherBlockQuantized",
            [data, "x", "scales", *(["zeros"] if zeros else [])],
            ["y"],
            name="/model/embed/Gather",
            domain="com.microsoft",
            **{**given, **attributes},
        )
    )
    return graph_of(folder, nodes, list(made.values())), expected


def decoded(path: Path) -> torch.Tensor:
    file = OnnxFile(path)
    (matrix,) = matrices(file)
    assert matrix.name == "model.embed.Gather" and matrix.operator == "GatherBlockQuantized"
    return matrix.read(file).dequantize(torch.float32)


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "no-zeros"])
@pytest.mark.parametrize("kind", TYPES)
def test_a_table_is_decoded_as_the_operator_says(tmp_path: Path, kind: str, zeros: bool) -> None:
    path, expected = write(tmp_path / "g", kind, zeros=zeros)
    assert torch.equal(decoded(path), expected)
    (matrix,) = matrices(OnnxFile(path))
    centered = not zeros and kind != "uint4"
    assert matrix.scheme.name == f"w{TYPES[kind][2]}a16_g16" + ("" if centered else "_asym")
    assert "model.embed.Gather" in {group.pattern for group in inspect(path).groups}


def test_a_block_longer_than_the_row_is_the_row(tmp_path: Path) -> None:
    path, expected = write(tmp_path / "g", "uint8-8", columns=21, block=32)
    assert torch.equal(decoded(path), expected)
    assert next(matrices(OnnxFile(path))).scheme.name == "w8a16_row_asym"


def test_a_shorter_last_block_is_read_if_its_numbers_are_those_of_the_others(
    tmp_path: Path,
) -> None:
    path, _ = write(tmp_path / "g", "uint8-8", columns=40, block=32)
    with pytest.raises(CheckpointError, match=r"model\.embed\.Gather: 40 columns in blocks of 32"):
        decoded(path)
    scales = {"scales": array("scales", torch.full((ROWS, 2), 0.5))}
    path, expected = write(
        tmp_path / "h", "uint8-8", columns=40, block=32, zeros=False, tensors=scales
    )
    assert decoded(path).shape == expected.shape


@pytest.mark.parametrize("shape", [(ROWS, 24), (-1, 24), (0, -1)], ids=str)
@pytest.mark.parametrize("constant", [None, "value", "value_ints"])
def test_a_reshaped_weight_is_followed(
    tmp_path: Path, shape: tuple[int, int], constant: str | None
) -> None:
    path, expected = write(tmp_path / "g", "uint8-4", reshape=shape, constant=constant)
    assert torch.equal(decoded(path), expected)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "axes": ({"quantize_axis": 0}, "'data' is gathered along axis 0 and has its blocks along"),
    "axis": ({"gather_axis": 2}, "gathered along axis 2"),
    "columns": ({"gather_axis": 1, "quantize_axis": 0}, "gathered along axis 1"),
    "bits": ({"bits": 3}, "3 bits"),
    "block": ({"block_size": 24}, "in blocks of 24"),
    "short-scales": ({"tensors": {"scales": array("scales", torch.rand(ROWS, 2))}}, "'scales' is"),
    "int-scales": (
        {"tensors": {"scales": array("scales", torch.ones(ROWS, 3, dtype=torch.int64))}},
        "scales of torch.int64",
    ),
    "zeros": ({"tensors": {"zeros": array("zeros", torch.rand(ROWS, 2))}}, "zero points 'zeros'"),
    "float8": (
        {
            "tensors": {
                "data": helper.make_tensor(
                    "data", TensorProto.FLOAT8E4M3FN, [ROWS, 24], bytes(ROWS * 24), raw=True
                )
            }
        },
        "'data' is of a type that is not read",
    ),
    "rank": (
        {"tensors": {"data": array("data", torch.zeros(ROWS, 2, 12, dtype=torch.uint8))}},
        "matrices of uint8, uint4 and int4 are read",
    ),
    "reshape": ({"reshape": (ROWS, 25)}, r"'data': \[5, 3, 8\] is no \[5, 25\]"),
    "no-shape": ({"reshape": (ROWS, 24), "constant": "value_float"}, "is no shape in the graph"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, message = BAD[case]
    if changes.get("constant") == "value_float":
        path, _ = write(tmp_path / "g", "uint8-4", **{**changes, "constant": "value_ints"})
        model = onnx.load(path)
        del model.graph.node[0].attribute[:]
        model.graph.node[0].attribute.append(helper.make_attribute("value_float", 1.0))
        onnx.save(model, path)
    else:
        path, _ = write(tmp_path / "g", "uint8-4", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        decoded(path)
    assert "model.embed.Gather" in str(caught.value)


def test_a_table_that_is_computed_is_none(tmp_path: Path) -> None:
    node = helper.make_node(
        "GatherBlockQuantized", ["x", "x", "x"], ["y"], name="g", domain="com.microsoft"
    )
    path = graph_of(tmp_path / "g", [node], [array("w", torch.ones(2))])
    assert list(matrices(OnnxFile(path))) == []
