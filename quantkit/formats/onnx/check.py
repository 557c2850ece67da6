"""What a graph on disk multiplies by, compared with the weights it was made of, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.errors import CheckpointError
from quantkit.formats.onnx.file import OnnxFile
from quantkit.formats.onnx.matrices import module_name, read_nbits
from quantkit.formats.onnx.names import Part
from quantkit.formats.onnx.nbits import Blocks, blocks_of
from quantkit.formats.onnx.rewrite import int8_codes
from quantkit.formats.onnx.rows import RowIndex, Run
from quantkit.numbers.tensor import QuantizedTensor

if TYPE_CHECKING:
    from onnx import NodeProto
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Checked:
    """How many nodes hold quantized weights, and the first difference, None if there is none.

    parts  weight -> where its rows are, in their order; only if there is no difference
    """

    nodes: int
    difference: str | None
    parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)


def check_graph(
    folder: Path, index: RowIndex, weights: Callable[[str], QuantizedTensor]
) -> Checked:
    """Compares all codes, scales and zeros of a graph with those of the weights in `index`."""
    file = OnnxFile(folder)
    found: list[Run] = []
    nodes = 0
    places: dict[str, list[Part]] = {}
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
            part = Part(node=module_name(node), row=row, start=run.start, stop=run.stop)
            places.setdefault(run.weight, []).append(part)
            row = stop
        found += runs
    lost = index.unused(iter(found))
    missing = None if lost is None else f"{lost}: in no quantized node of the graph"
    parts = {weight: _in_order(found) for weight, found in places.items()}
    return Checked(nodes=nodes, difference=missing, parts=parts)


def _in_order(parts: list[Part]) -> tuple[Part, ...]:
    """The parts of a weight by its rows; of rows that are there twice, one place."""
    found: list[Part] = []
    covered = 0
    for part in sorted(parts, key=lambda part: (part.start, -part.stop)):
        if part.start <= covered < part.stop:
            row = part.row + covered - part.start
            found.append(Part(node=part.node, row=row, start=covered, stop=part.stop))
            covered = part.stop
    return tuple(found)


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


def _difference(
    matrix: Blocks | _Rows, start: int, stop: int, run: Run, tensor: QuantizedTensor
) -> str | None:
    if isinstance(matrix, Blocks):
        return matrix.rows(start, stop).differs_from(blocks_of(tensor).rows(run.start, run.stop))
    if not torch.equal(matrix.codes[start:stop], int8_codes(tensor)[run.start : run.stop]):
        return "codes"
    same = torch.equal(matrix.scale[start:stop], tensor.scale.values()[run.start : run.stop, 0])
    return None if same else "scale"
