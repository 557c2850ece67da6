"""The quantized weights of a graph, whoever made it: which nodes hold them, and their numbers.

    MatMulNBits           codes in blocks along the input (quantkit/formats/onnx/nbits.py)
    MatMulInteger         int8 or uint8 [K, N] with scales per row, or one for all
    DequantizeLinear      (QDQ) 4 or 8 bit with scales per row, in blocks, or one for all, before a
                          MatMul, a Gemm or a Gather
    GatherBlockQuantized  tables of embeddings in blocks (quantkit/formats/onnx/gather.py)

How activations are quantized is part of `w8a8_row` alone; other schemes describe the weight.
Shapes: N (or O) out features, K (or I) in features, G groups per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.dtypes import dtype_of, name_of
from quantkit.errors import CheckpointError
from quantkit.formats.onnx.file import OnnxFile, StoredInitializer, attribute
from quantkit.formats.onnx.gather import OPERATOR, Table, table_of
from quantkit.formats.onnx.nbits import Blocks, Packed, unpack
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

if TYPE_CHECKING:
    from onnx import NodeProto
    from torch import Tensor

# Ours, and those of onnxruntime's own quantize_dynamic: the weight's name -> its scales'.
_SCALES = ((".qweight", ".scales"), ("_quantized", "_scale"))
_HALF = {"U8": 0, "I8": 128}


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A quantized weight [N, K] of a graph.

    name     of the node that multiplies by it, as a module path
    tensors  the initializers that hold it
    """

    name: str
    operator: str
    scheme: Scheme
    shape: tuple[int, int]
    tensors: tuple[str, ...]
    node: NodeProto
    layout: _Layout | None = None
    table: Table | None = None

    def read(self, file: OnnxFile) -> QuantizedTensor:
        """Its codes, scales and zeros.  CheckpointError if they contradict each other."""
        if self.table is not None:
            blocks, label = self.table.read(self.name, file), self.table.label
            return tensor_of(self.name, blocks, self.scheme, label=label, scale_label=label)
        if self.operator == "MatMulNBits":
            return tensor_of(self.name, read_nbits(file, self.node), self.scheme)
        assert self.layout is not None
        return _read_linear(self, self.layout, file)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How 8- or 4-bit numbers lie: `by_column` is [K, N]; `block` 0 for one scale per row or less.

    bits is 4 where two numbers share a byte.
    """

    codes: str
    scale: str
    zero: str | None
    by_column: bool
    block: int
    bits: int


def matrices(file: OnnxFile) -> Iterator[Matrix]:
    """Every quantized weight of a graph.  CheckpointError for one that is damaged or not read."""
    users = _users(file)
    producers = {output: node for node in file.graph.node for output in node.output}
    for node in file.graph.node:
        name = module_name(node)
        if node.op_type == "MatMulNBits":
            yield _nbits(file, node, name)
        elif node.op_type == OPERATOR:
            table = table_of(file, node, name, producers)
            if table is not None:
                yield _gathered(file, node, name, table)
        elif node.op_type == "MatMulInteger" and len(node.input) > 1:
            if file.find(node.input[1]) is not None:
                yield _integer(file, node, name)
        elif node.op_type == "DequantizeLinear" and node.input:
            codes = file.find(node.input[0])
            if codes is not None and len(codes.shape) == 2:
                user = next(iter(users.get(node.output[0], ())), None) if node.output else None
                yield _dequantized(file, node, user, users)


def module_name(node: NodeProto) -> str:
    """A node's name as a module path: "/model/layers.0/mlp/up_proj/MatMul" with dots."""
    return str(node.name).strip("/").replace("/", ".") or str(next(iter(node.output), "unnamed"))


def read_nbits(file: OnnxFile, node: NodeProto) -> Blocks:
    """The weight of a MatMulNBits node.  CheckpointError for what is not read."""
    # Input 4 is g_idx, 5 a bias, which is no part of the weight.
    if len(node.input) < 3 or any(name for name in node.input[4:5]):
        raise CheckpointError(
            f"{node.name}: MatMulNBits with activation order, or without scales, is not read"
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


def tensor_of(
    name: str,
    blocks: Blocks,
    scheme: Scheme,
    *,
    label: str = "F32",
    scale_label: str = "F32",
) -> QuantizedTensor:
    """The weight under a scheme whose groups are one or more of the operator's blocks.

    Raises CheckpointError naming it if a group's blocks differ, or a code or zero does not belong
    to the scheme: then these are not the numbers of such a weight.
    """
    columns = blocks.codes.shape[1]
    group = scheme.group_size or columns
    # Of a whole row the last block may be filled up.
    times = -(-group // blocks.size)
    scale, zero = blocks.scale[:, ::times], blocks.zero[:, ::times]
    count = blocks.scale.shape[1]
    repeated = (t.repeat_interleave(times, dim=1)[:, :count] for t in (scale, zero))
    if columns % group or not all(
        torch.equal(again, part)
        for again, part in zip(repeated, (blocks.scale, blocks.zero), strict=True)
    ):
        raise CheckpointError(f"{name}: its blocks of {blocks.size} are no {scheme.name}")
    if int(blocks.codes.max()) >= 2**scheme.bits or int(zero.max()) >= 2**scheme.bits:
        raise CheckpointError(f"{name}: a code or zero does not fit {scheme.name}")
    if scheme.symmetric and bool((zero != 2 ** (scheme.bits - 1)).any()):
        raise CheckpointError(f"{name}: it has zeros of its own, but {scheme.name} has none")
    stored = scale.to(dtype_of(scale_label))
    if not torch.equal(stored.float(), scale):
        raise CheckpointError(f"{name}: a scale is not one of {name_of(scale_label)}")
    return QuantizedTensor(
        codes=blocks.codes,
        scale=PlainScale(tensor=stored.contiguous()),
        zero=None if scheme.symmetric else zero.contiguous(),
        scheme=scheme,
        dtype=dtype_of(label),
    )


def _nbits(file: OnnxFile, node: NodeProto, name: str) -> Matrix:
    bits, size = attribute(node, "bits"), attribute(node, "block_size")
    rows, columns = attribute(node, "N"), attribute(node, "K")
    tensors = tuple(found for found in node.input[1:4] if found)
    if min(rows, columns, size) < 1 or bits not in (2, 4, 8) or len(tensors) < 2:
        raise CheckpointError(
            f"{name}: MatMulNBits of {bits} bits in blocks of {size} for {[rows, columns]} is not "
            "read; 2, 4 and 8 bits are, in blocks of a power of two from 16 on"
        )
    count = -(-columns // size)
    centered = True
    if len(tensors) > 2:
        expected = rows * -(-count * bits // 8)
        if file.info(tensors[2]).num_bytes != expected:
            raise CheckpointError(f"{name}: zero_points are not {expected} bytes")
        centered = _centered(file.read(tensors[2]).view(rows, -1), bits, count)
    # A last block that is filled up belongs to whole rows, whose scale is repeated.
    group = None if count == 1 or columns % size else size
    scheme = Scheme(kind="int", bits=bits, group_size=group, symmetric=centered)
    return Matrix(
        name=name,
        operator="MatMulNBits",
        scheme=scheme,
        shape=(rows, columns),
        tensors=tensors,
        node=node,
    )


def _gathered(file: OnnxFile, node: NodeProto, name: str, table: Table) -> Matrix:
    return Matrix(
        name=name,
        operator=node.op_type,
        scheme=table.scheme(file),
        shape=table.shape,
        tensors=table.tensors,
        node=node,
        table=table,
    )


def _centered(raw: Tensor, bits: int, count: int) -> bool:
    """True if all zeros are 2**(bits-1), as if they had been left out."""
    middle = 2 ** (bits - 1)
    zeros = torch.stack([raw >> shift & (2**bits - 1) for shift in range(0, 8, bits)], dim=2)
    return bool((zeros.reshape(raw.shape[0], -1)[:, :count] == middle).all())


def _integer(file: OnnxFile, node: NodeProto, name: str) -> Matrix:
    codes = node.input[1]
    scale = next((codes[: -len(end)] + its for end, its in _SCALES if codes.endswith(end)), None)
    if scale is None or file.find(scale) is None:
        raise CheckpointError(f"{name}: the scales of {codes!a} are not found")
    zero = node.input[3] if len(node.input) > 3 and node.input[3] else None
    layout = _Layout(codes=codes, scale=scale, zero=zero, by_column=True, block=0, bits=8)
    return _linear(file, node, name, layout, activation_bits=8)


def _dequantized(
    file: OnnxFile,
    node: NodeProto,
    user: NodeProto | None,
    users: Mapping[str, list[NodeProto]],
) -> Matrix:
    if user is not None and user.op_type == "Transpose" and user.output:
        by_column = False
        user = next(iter(users.get(user.output[0], ())), None)
    else:
        by_column = user is None or user.op_type == "MatMul" or not _optional(user, "transB")
        by_column = by_column and (user is None or user.op_type != "Gather")
    name = module_name(user if user is not None else node)
    if len(node.input) < 2:
        raise CheckpointError(f"{name}: DequantizeLinear without scales")
    codes, scale = file.info(node.input[0]), file.info(node.input[1])
    block, axis = _optional(node, "block_size"), _optional(node, "axis", 1)
    along = 0 if by_column else 1
    if scale.numel > 1 and (axis % 2 == along) != (block > 0):
        raise CheckpointError(f"{name}: a scale for each column is not read; per row it is")
    layout = _Layout(
        codes=codes.name,
        scale=scale.name,
        zero=node.input[2] if len(node.input) > 2 and node.input[2] else None,
        by_column=by_column,
        block=block if scale.numel > 1 else 0,
        bits=4 if codes.nibble else 8,
    )
    return _linear(file, node, name, layout, activation_bits=16)


def _linear(
    file: OnnxFile, node: NodeProto, name: str, layout: _Layout, *, activation_bits: int
) -> Matrix:
    """The matrix of a layout, its sizes compared; whether it is symmetric is told by the zeros."""
    codes, scale = file.info(layout.codes), file.info(layout.scale)
    if len(codes.shape) != 2 or min(codes.shape) < 1 or codes.label not in _HALF:
        raise CheckpointError(f"{name}: its weight is no matrix of 8- or 4-bit integers")
    rows, columns = codes.shape[::-1] if layout.by_column else codes.shape
    groups = columns // layout.block if layout.block else 1
    whole = layout.block and columns % layout.block
    if whole or scale.numel not in (1, rows * groups) or scale.label is None:
        raise CheckpointError(
            f"{name}: scales {list(scale.shape)} for {[rows, columns]}: one for all, for each row, "
            "or for each block is read"
        )
    tensors = [codes.name, scale.name]
    middle = 0 if codes.label == "I8" else 2 ** (layout.bits - 1)
    symmetric = codes.label == "I8"
    if layout.zero is not None:
        zero = file.info(layout.zero)
        _check_zero(name, zero, codes, scale)
        tensors.append(zero.name)
        symmetric = bool((file.read(zero.name) == middle).all())
    integer = activation_bits == 8 and symmetric
    scheme = Scheme(
        kind="int",
        bits=layout.bits,
        group_size=layout.block or None,
        symmetric=symmetric,
        activation_bits=8 if integer else 16,
    )
    return Matrix(
        name=name,
        operator=node.op_type,
        scheme=scheme,
        shape=(rows, columns),
        tensors=tuple(tensors),
        node=node,
        layout=layout,
    )


def _check_zero(
    name: str, zero: StoredInitializer, codes: StoredInitializer, scale: StoredInitializer
) -> None:
    if zero.label != codes.label or zero.numel != scale.numel:
        raise CheckpointError(
            f"{name}: zero points are {zero.dtype} {list(zero.shape)}, the codes {codes.dtype} and "
            f"the scales {list(scale.shape)}"
        )


def _read_linear(matrix: Matrix, layout: _Layout, file: OnnxFile) -> QuantizedTensor:
    raw = file.read(layout.codes)
    half = 0 if raw.dtype == torch.uint8 else 2 ** (layout.bits - 1)
    zero = None if layout.zero is None else file.read(layout.zero)
    shift = half if raw.dtype == torch.int8 else 0

    def codes(numbers: Tensor) -> Tensor:
        return (numbers.to(torch.int16) + shift).to(torch.uint8)

    rows, columns = matrix.shape
    groups = columns // layout.block if layout.block else 1
    scale = _grouped(file.read(layout.scale).float(), rows, groups, layout)
    zeros = None
    if not matrix.scheme.symmetric:
        plain = torch.zeros(1, dtype=raw.dtype) if zero is None else zero
        zeros = _grouped(codes(plain), rows, groups, layout)
    values = codes(raw)
    return QuantizedTensor(
        codes=(values.T if layout.by_column else values).contiguous(),
        scale=PlainScale(tensor=scale),
        zero=zeros,
        scheme=matrix.scheme,
        dtype=torch.float32,
    )


def _grouped(values: Tensor, rows: int, groups: int, layout: _Layout) -> Tensor:
    """One number for each group [N, G], of one for all, one per row, or blocks."""
    if values.numel() == 1:
        return values.reshape(1, 1).expand(rows, groups).contiguous()
    if layout.by_column:
        return values.reshape(groups, rows).T.contiguous()
    return values.reshape(rows, groups).contiguous()


def _users(file: OnnxFile) -> dict[str, list[NodeProto]]:
    """Value -> the nodes that read it."""
    found: dict[str, list[NodeProto]] = {}
    for node in file.graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def _optional(node: NodeProto, name: str, default: int = 0) -> int:
    return next((int(found.i) for found in node.attribute if found.name == name), default)
