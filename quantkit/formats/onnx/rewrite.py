"""Quantized operators put into a float32 graph in the place of its matrix products.

    weight-only  MatMul -> MatMulNBits
    w8a8_row     MatMul -> MatMulInteger on int8 tokens, as QuantLinear computes: absmax / 127 of
                 each token, half to even; products that share an input share its codes

Shapes: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.errors import FormatError
from quantkit.formats.onnx.file import DOMAIN, DataWriter, OnnxFile, require_onnx
from quantkit.formats.onnx.nbits import Blocks, blocks_of, pack
from quantkit.formats.onnx.rows import RowIndex, Run
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import QuantizedTensor

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto
    from torch import Tensor

Weights = Callable[[str], QuantizedTensor]
_FLOAT, _INT8, _INT64 = 1, 3, 7
_LIMIT, _TINY, _AXES = "quantkit.int8.limit", "quantkit.int8.tiny", "quantkit.int8.axes"


def rewrite(
    built: Path, out: Path, index: RowIndex, weights: Weights, *, accuracy_level: int
) -> None:
    """Writes the graph in `built` to `out` with its quantized weights as their operators.

    `weights(name)` gives a quantized weight.  Products whose matrix is in no quantized weight stay
    as they are.
    """
    source = OnnxFile(built)
    with DataWriter(out) as writer:
        editor = _Editor(source, writer, index, weights, accuracy_level)
        nodes: list[NodeProto] = []
        for node in source.graph.node:
            nodes += editor.replace(node)
        used = {name for node in nodes for name in node.input}
        kept: list[TensorProto] = []
        for initializer in source.graph.initializer:
            if initializer.name in source.stored and initializer.name in used:
                kept.append(writer.put(initializer.name, source.read(initializer.name)))
            elif initializer.name in used:
                kept.append(initializer)
        graph = source.graph
        del graph.node[:]
        graph.node.extend(nodes)
        entries = [*kept, *editor.entries]
        del graph.initializer[:]
        graph.initializer.extend(entries)
        writer.finish(source.model)


@dataclass(frozen=True, kw_only=True)
class _Int8Input:
    """Names of the codes int8 [..., K] and scales float32 [..., 1] of an input."""

    codes: str
    scale: str


class _Editor:
    """Replaces one node after the other; `entries` are the weights written for them."""

    def __init__(
        self,
        source: OnnxFile,
        writer: DataWriter,
        index: RowIndex,
        weights: Weights,
        accuracy_level: int,
    ) -> None:
        self.entries: list[TensorProto] = []
        self._source = source
        self._writer = writer
        self._index = index
        self._weights = weights
        self._accuracy_level = accuracy_level
        self._inputs: dict[str, _Int8Input] = {}
        self._helper = require_onnx().helper

    def replace(self, node: NodeProto) -> list[NodeProto]:
        """The nodes that take a node's place: itself if it multiplies by no quantized weight."""
        product = node.op_type == "MatMul" and len(node.input) == 2
        stored = self._source.stored.get(node.input[1]) if product else None
        if stored is None or len(stored.shape) != 2 or stored.dtype != torch.float32:
            return [node]
        values = self._source.read(stored.name).T.contiguous()
        runs = self._index.find(values)
        if not runs:
            return [node]
        tensors = [self._weights(run.weight) for run in runs]
        self._check(node, values, runs, tensors)
        if tensors[0].scheme.activation_bits == 8:
            return self._int8(node, runs, tensors)
        return [self._nbits(node, runs, tensors)]

    def _check(
        self,
        node: NodeProto,
        values: Tensor,
        runs: Sequence[Run],
        tensors: Sequence[QuantizedTensor],
    ) -> None:
        """FormatError unless the matrix is these rows, all of one scheme."""
        names = ", ".join(dict.fromkeys(run.weight for run in runs))
        if len({tensor.scheme for tensor in tensors}) > 1:
            raise FormatError(f"{node.name}: the graph fuses weights of several schemes: {names}")
        row = 0
        for run, tensor in zip(runs, tensors, strict=True):
            expected = tensor.decode(torch.arange(run.start, run.stop))
            if not torch.equal(values[row : row + len(expected)], expected):
                raise FormatError(f"{node.name}: its values are not those of {names}")
            row += len(expected)

    def _nbits(
        self, node: NodeProto, runs: Sequence[Run], tensors: Sequence[QuantizedTensor]
    ) -> NodeProto:
        parts = [
            blocks_of(tensor).rows(run.start, run.stop)
            for run, tensor in zip(runs, tensors, strict=True)
        ]
        blocks = Blocks(
            codes=torch.cat([part.codes for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            zero=torch.cat([part.zero for part in parts]),
            bits=parts[0].bits,
            size=parts[0].size,
        )
        packed = pack(blocks)
        stem = _stem(node) + "NBits"
        inputs = [node.input[0], self._put(f"{stem}.qweight", packed.codes)]
        inputs.append(self._put(f"{stem}.scales", packed.scales))
        if packed.zeros is not None:
            inputs.append(self._put(f"{stem}.qzeros", packed.zeros))
        return self._helper.make_node(
            "MatMulNBits",
            inputs,
            list(node.output),
            name=f"{node.name}NBits",
            domain=DOMAIN,
            accuracy_level=self._accuracy_level,
            bits=blocks.bits,
            block_size=blocks.size,
            K=blocks.codes.shape[1],
            N=blocks.codes.shape[0],
        )

    def _int8(
        self, node: NodeProto, runs: Sequence[Run], tensors: Sequence[QuantizedTensor]
    ) -> list[NodeProto]:
        pairs = list(zip(runs, tensors, strict=True))
        codes = torch.cat([int8_codes(tensor)[run.start : run.stop] for run, tensor in pairs])
        scale = torch.cat([t.scale.values()[run.start : run.stop, 0] for run, t in pairs])
        stem = _stem(node) + "Integer"
        weight = self._put(f"{stem}.qweight", codes.T.contiguous())
        scales = self._put(f"{stem}.scales", scale)
        nodes, tokens = self._tokens(node.input[0])
        name = f"{node.name}Integer"
        make = self._helper.make_node
        return [
            *nodes,
            make("MatMulInteger", [tokens.codes, weight], [f"{name}/sum"], name=name),
            make("Cast", [f"{name}/sum"], [f"{name}/float"], name=f"{name}/Cast", to=_FLOAT),
            make("Mul", [f"{name}/float", tokens.scale], [f"{name}/token"], name=f"{name}/Token"),
            make("Mul", [f"{name}/token", scales], list(node.output), name=f"{name}/Row"),
        ]

    def _tokens(self, value: str) -> tuple[list[NodeProto], _Int8Input]:
        """Nodes, unless they are there already, that quantize a value per token."""
        if value in self._inputs:
            return [], self._inputs[value]
        if not self._inputs:
            # In the graph itself: shapes are inferred from them before the data file is read.
            constant = self._helper.make_tensor
            tiny = torch.finfo(torch.float32).tiny
            self.entries.append(constant(_LIMIT, _FLOAT, [], [127.0]))
            self.entries.append(constant(_TINY, _FLOAT, [], [tiny]))
            self.entries.append(constant(_AXES, _INT64, [1], [-1]))
        stem = f"{value}/int8"
        found = _Int8Input(codes=f"{stem}/codes", scale=f"{stem}/scale")
        self._inputs[value] = found
        make = self._helper.make_node
        return [
            make("Abs", [value], [f"{stem}/abs"], name=f"{stem}/Abs"),
            make("ReduceMax", [f"{stem}/abs", _AXES], [f"{stem}/absmax"], name=f"{stem}/ReduceMax"),
            make("Div", [f"{stem}/absmax", _LIMIT], [f"{stem}/step"], name=f"{stem}/Step"),
            make("Max", [f"{stem}/step", _TINY], [found.scale], name=f"{stem}/Max"),
            make("Div", [value, found.scale], [f"{stem}/scaled"], name=f"{stem}/Div"),
            make("Round", [f"{stem}/scaled"], [f"{stem}/round"], name=f"{stem}/Round"),
            make("Cast", [f"{stem}/round"], [found.codes], name=f"{stem}/Cast", to=_INT8),
        ], found

    def _put(self, name: str, tensor: Tensor) -> str:
        self.entries.append(self._writer.put(name, tensor))
        return name


def int8_codes(tensor: QuantizedTensor) -> Tensor:
    """Codes int8 [N, K] about zero, of a symmetric 8-bit weight."""
    assert tensor.scheme == Scheme(kind="int", bits=8, group_size=None, activation_bits=8)
    return (tensor.codes.to(torch.int16) - 128).to(torch.int8)


def _stem(node: NodeProto) -> str:
    return node.name.strip("/").replace("/", ".")
