"""The quantized table of embeddings of a graph: com.microsoft's GatherBlockQuantized.

    data         uint8 [V, I*b/8], codes along I, the first in the lowest bits; or uint4 or int4
                 [V, I], or [I, V] where columns are gathered
    scales       [V, B], or [B, V]; float32 or 16 bits
    zero_points  of data's type, packed along B as data is along I; absent: 2**(b-1) where data is
                 uint8, else 0

A block is a power of two from 16 on; the last of a row may be shorter.  The model builder of
onnxruntime-genai reshapes the weight of a tied head's MatMulNBits to this.
Shapes: V tokens, I features, B blocks per row, b bits.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.errors import CheckpointError
from quantkit.formats.onnx.file import OnnxFile, StoredInitializer
from quantkit.formats.onnx.nbits import Blocks, unpack_bytes
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from onnx import NodeProto
    from torch import Tensor

OPERATOR = "GatherBlockQuantized"
_SCALES = ("F32", "F16", "BF16")
_LARGEST_SHAPE = 8
# ONNX's number of the type.
_INT64 = 7


@dataclass(frozen=True, kw_only=True)
class Table:
    """Where a table [V, I] lies, every size compared; `by_column` if it is stored [I, V]."""

    data: str
    scales: str
    zeros: str | None
    bits: int
    size: int
    shape: tuple[int, int]
    by_column: bool
    label: str

    @property
    def tensors(self) -> tuple[str, ...]:
        """The initializers that hold it."""
        return tuple(name for name in (self.data, self.scales, self.zeros) if name is not None)

    def scheme(self, file: OnnxFile) -> Scheme:
        """Whether it is symmetric is told by its zeros, which are read."""
        columns, middle = self.shape[1], 2 ** (self.bits - 1)
        symmetric = bool((self._zeros(file) == middle).all())
        # As in MatMulNBits a last block that is not whole is taken for a row's.
        group = None if columns <= self.size or columns % self.size else self.size
        return Scheme(kind="int", bits=self.bits, group_size=group, symmetric=symmetric)

    def read(self, name: str, file: OnnxFile) -> Blocks:
        """Its numbers.  CheckpointError if a shorter last block has a scale of its own."""
        blocks = Blocks(
            codes=self._codes(file, self.data, self.shape[1]),
            scale=self._rows(file.read(self.scales).float()),
            zero=self._zeros(file),
            bits=self.bits,
            size=self.size,
        )
        if self.shape[1] > self.size and self.shape[1] % self.size:
            for part in (blocks.scale, blocks.zero):
                if bool((part != part[:, :1]).any()):
                    raise CheckpointError(
                        f"{name}: {self.shape[1]} columns in blocks of {self.size}: a last block "
                        "that is shorter than the others and has a scale or zero of its own is "
                        "not read"
                    )
        return blocks

    def _zeros(self, file: OnnxFile) -> Tensor:
        """uint8 [V, B]."""
        count = -(-self.shape[1] // self.size)
        if self.zeros is not None:
            return self._codes(file, self.zeros, count)
        packed = file.info(self.data)
        # uint4 alone has zeros of 0; int4's 0 is the middle of its codes.
        first = 0 if packed.nibble and packed.label == "U8" else 2 ** (self.bits - 1)
        return torch.full((self.shape[0], count), first, dtype=torch.uint8)

    def _codes(self, file: OnnxFile, name: str, columns: int) -> Tensor:
        """uint8 [V, columns] in 0..2**bits-1."""
        raw = file.read(name)
        if not file.info(name).nibble:
            return unpack_bytes(raw.reshape(self.shape[0], -1), self.bits, columns)
        return self._rows(raw + 8 if raw.dtype == torch.int8 else raw).to(torch.uint8)

    def _rows(self, values: Tensor) -> Tensor:
        """[V, ...] of what may be stored [..., V]."""
        shaped = values.reshape(-1, self.shape[0]).T if self.by_column else values
        return shaped.reshape(self.shape[0], -1).contiguous()


def table_of(
    file: OnnxFile, node: NodeProto, name: str, producers: Mapping[str, NodeProto]
) -> Table | None:
    """The table that a node gathers from; None if it is no weight of the graph.

    `producers` are the nodes that values come from.  CheckpointError for what is not read.
    """
    names = [*node.input, "", "", "", ""][:4]
    found = _stored(file, names[0], name, producers)
    scaled = _stored(file, names[2], name, producers)
    if found is None:
        return None
    if scaled is None:
        raise CheckpointError(f"{name}: {OPERATOR} whose scales are no weight of the graph")
    (data, shape), (scales, scales_shape) = found, scaled
    values = {entry.name: int(entry.i) for entry in node.attribute}
    bits, size = values.get("bits", 4), values.get("block_size", 128)
    gathered, along = values.get("gather_axis", 0), values.get("quantize_axis", 1)
    if len(shape) != 2 or min(shape) < 1 or data.label not in ("U8", "I8"):
        raise CheckpointError(
            f"{name}: {data.name!a} is {data.dtype or 'of a type that is not read'} "
            f"{list(shape)}; matrices of uint8, uint4 and int4 are read"
        )
    if not (-2 <= gathered < 2 and -2 <= along < 2) or gathered % 2 == along % 2:
        raise CheckpointError(
            f"{name}: {data.name!a} is gathered along axis {gathered} and has its blocks along "
            f"axis {along}; blocks along each gathered row are read"
        )
    by_column = gathered % 2 == 1
    whole = (4,) if data.nibble else (2, 4, 8)
    signed = data.label == "I8" and not data.nibble
    if bits not in whole or signed or (by_column and not data.nibble):
        kind = f"{'4-bit ' if data.nibble else ''}{data.dtype}"
        raise CheckpointError(
            f"{name}: {data.name!a} is {kind}, {bits} bits, gathered along axis {gathered}; uint8 "
            "of 2, 4 and 8 bits along axis 0 and 4-bit integers of 4 are read"
        )
    if size < 16 or size & (size - 1):
        raise CheckpointError(
            f"{name}: {data.name!a} is in blocks of {size}; powers of two from 16 on are allowed"
        )
    rows, columns = shape[::-1] if by_column else shape
    columns *= 1 if data.nibble else 8 // bits
    count = -(-columns // size)
    if scales_shape != ((count, rows) if by_column else (rows, count)):
        raise CheckpointError(
            f"{name}: {scales.name!a} is {list(scales_shape)}, not one scale for each of {count} "
            f"blocks of {rows} rows"
        )
    if scales.label not in _SCALES:
        raise CheckpointError(f"{name}: {scales.name!a}: scales of {scales.dtype} are not read")
    table = Table(
        data=data.name,
        scales=scales.name,
        zeros=None,
        bits=bits,
        size=size,
        shape=(rows, columns),
        by_column=by_column,
        label=scales.label,
    )
    if not names[3]:
        return table
    zeros = _stored(file, names[3], name, producers)
    expected = scales_shape if data.nibble else (rows, -(-count * bits // 8))
    kinds = None if zeros is None else (zeros[0].label, zeros[0].nibble, zeros[1])
    if zeros is None or kinds != (data.label, data.nibble, expected):
        raise CheckpointError(
            f"{name}: zero points {names[3]!a} are no {list(expected)} of the type of {data.name!a}"
        )
    return replace(table, zeros=zeros[0].name)


def _stored(
    file: OnnxFile, value: str, name: str, producers: Mapping[str, NodeProto]
) -> tuple[StoredInitializer, tuple[int, ...]] | None:
    """A weight and the shape in which a node reads it: its own, or that of a Reshape between."""
    if (stored := file.find(value)) is not None:
        return stored, stored.shape
    node = producers.get(value)
    if node is None or node.op_type != "Reshape" or len(node.input) < 2:
        return None
    stored = file.find(node.input[0])
    if stored is None:
        return None
    shape = _constant(file, node.input[1], producers)
    if shape is None:
        raise CheckpointError(
            f"{name}: {stored.name!a} is reshaped to {node.input[1]!a}, which is no shape in the "
            "graph"
        )
    shape = [
        stored.shape[place] if count == 0 and place < len(stored.shape) else count
        for place, count in enumerate(shape)
    ]
    known = 1
    for count in shape:
        known *= 1 if count == -1 else count
    if shape.count(-1) == 1 and known > 0 and stored.numel % known == 0:
        shape[shape.index(-1)] = stored.numel // known
        known = stored.numel
    if min(shape, default=1) < 0 or known != stored.numel:
        raise CheckpointError(f"{name}: {stored.name!a}: {list(stored.shape)} is no {shape}")
    return stored, tuple(shape)


def _constant(file: OnnxFile, value: str, producers: Mapping[str, NodeProto]) -> list[int] | None:
    """The few int64 of a weight or a Constant; None for anything else."""
    stored = file.find(value)
    if stored is not None:
        few = stored.label == "I64" and stored.numel <= _LARGEST_SHAPE
        return [int(count) for count in file.read(value).flatten()] if few else None
    node = producers.get(value)
    if node is None or node.op_type != "Constant" or len(node.attribute) != 1:
        return None
    (entry,) = node.attribute
    if entry.name == "value_ints":
        return list(entry.ints)[:_LARGEST_SHAPE]
    tensor, raw = entry.t, entry.t.raw_data
    if entry.name != "value" or tensor.data_type != _INT64 or tensor.external_data or len(raw) % 8:
        return None
    if len(raw) > 8 * _LARGEST_SHAPE or len(tensor.int64_data) > _LARGEST_SHAPE:
        return None
    return list(struct.unpack(f"<{len(raw) // 8}q", raw)) if raw else list(tensor.int64_data)
