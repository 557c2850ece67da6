"""What a graph on disk multiplies by, compared with the weights it was made of, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.errors import CheckpointError
from quantkit.onnx_file import OnnxFile, attribute
from quantkit.onnx_nbits import Blocks, Packed, blocks_of, unpack
from quantkit.onnx_rewrite import int8_codes
from quantkit.onnx_rows import RowIndex, Run
from quantkit.tensor import QuantizedTensor

if TYPE_CHECKING:
    from onnx import NodeProto


@dataclass(frozen=True, kw_only=True)
class Checked:
    """How many nodes hold quantized weights, and the first difference, None if there is none."""

    nodes: int
    difference: str | None


def check_graph(
    folder: Path, index: RowIndex, weights: Callable[[str], QuantizedTensor]
) -> Checked:
    """Compares all codes, scales and zeros of a graph with those of the weights in `index`."""
    file = OnnxFile(folder)
    found: list[Run] = []
    nodes = 0
    for node, matrix in _matrices(file):
        nodes += 1
        values = matrix.decode() if isinstance(matrix, Blocks) else matrix.values()
        runs = index.find(values)
        if not runs:
            return Checked(nodes=nodes, difference=f"{node.name}: its values are in no weight")
        row = 0
        for run in runs:
            stop = row + run.stop - run.start
            kind = _difference(matrix, row, stop, run, weights(run.weight))
            if kind is not None:
                return Checked(nodes=nodes, difference=f"{node.name}: {kind} of {run.weight}")
            row = stop
        found += runs
    lost = index.unused(iter(found))
    missing = None if lost is None else f"{lost}: in no quantized node of the graph"
    return Checked(nodes=nodes, difference=missing)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """An int8 matrix: codes int8 [N, K], scale float32 [N]."""

    codes: Tensor
    scale: Tensor

    def values(self) -> Tensor:
        return self.codes.float() * self.scale[:, None]


def _matrices(file: OnnxFile) -> Iterator[tuple[NodeProto, Blocks | _Rows]]:
    """Every node that multiplies by a quantized weight, and that weight."""
    for node in file.graph.node:
        if node.op_type == "MatMulNBits":
            yield node, read_nbits(file, node)
        elif node.op_type == "MatMulInteger":
            if len(node.input) < 2:
                raise CheckpointError(f"{node.name}: there is no weight")
            stem = node.input[1].removesuffix(".qweight")
            codes = file.read(node.input[1])
            scale = file.read(f"{stem}.scales")
            if codes.ndim != 2 or codes.dtype != torch.int8 or scale.shape != codes.shape[1:]:
                raise CheckpointError(f"{node.name}: its weight is no int8 matrix with row scales")
            yield node, _Rows(codes=codes.T.contiguous(), scale=scale)


def read_nbits(file: OnnxFile, node: NodeProto) -> Blocks:
    """The weight of a MatMulNBits node.  CheckpointError for what is not read."""
    if len(node.input) < 3 or any(name for name in node.input[4:]):
        raise CheckpointError(
            f"{node.name}: activation order and biases in MatMulNBits are not read"
        )
    zeros = node.input[3] if len(node.input) > 3 and node.input[3] else None
    packed = Packed(
        codes=file.read(node.input[1]),
        scales=file.read(node.input[2]).float(),
        zeros=None if zeros is None else file.read(zeros),
    )
    shape = attribute(node, "N"), attribute(node, "K")
    return unpack(
        node.name,
        packed,
        bits=attribute(node, "bits"),
        size=attribute(node, "block_size"),
        shape=shape,
    )


def _difference(
    matrix: Blocks | _Rows, start: int, stop: int, run: Run, tensor: QuantizedTensor
) -> str | None:
    if isinstance(matrix, Blocks):
        return matrix.rows(start, stop).differs_from(blocks_of(tensor).rows(run.start, run.stop))
    if not torch.equal(matrix.codes[start:stop], int8_codes(tensor)[run.start : run.stop]):
        return "codes"
    same = torch.equal(matrix.scale[start:stop], tensor.scale.values()[run.start : run.stop, 0])
    return None if same else "scale"
