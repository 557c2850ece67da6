"""The weight of ONNX Runtime's MatMulNBits: codes of 2, 4 or 8 bits in blocks along the input.

Shapes: O out features, I in features, B blocks per row of K columns, b bits.

    B            uint8 [O, B, K*b/8]         codes along I, the first in the lowest bits
    scales       float32 [O * B]
    zero_points  uint8 [O * ceil(B*b/8)]     zeros along B, packed alike; absent: 2**(b-1)

K is a power of two from 16 on; the last block of a row is filled up.  What the operator lacks is
held exactly all the same: 3 bits in 4, 5 to 7 in 8, and larger groups and whole rows as several
blocks with one scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.errors import CheckpointError
from quantkit.formats.bitpack import pack_rows, unpack_rows
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 4, 8)
_BLOCKS = (256, 128, 64, 32, 16)
# A row's scale is repeated: often enough for the int8 blocks of activations to be short.
_ROW_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Rows of a weight as the operator sees them: codes uint8 [O, I], scale float32 [O, B] and
    zero uint8 [O, B]; `size` is K."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    size: int

    def rows(self, start: int, stop: int) -> Blocks:
        """Some of the rows."""
        return Blocks(
            codes=self.codes[start:stop],
            scale=self.scale[start:stop],
            zero=self.zero[start:stop],
            bits=self.bits,
            size=self.size,
        )

    def differs_from(self, other: Blocks) -> str | None:
        """None if all numbers are equal, else which kind of number is not."""
        if (self.size, self.codes.shape) != (other.size, other.codes.shape):
            return "shape"
        for kind in ("codes", "scale", "zero"):
            if not torch.equal(getattr(self, kind), getattr(other, kind)):
                return kind
        return None

    def decode(self) -> Tensor:
        """The values, float32 [O, I]."""
        columns = self.codes.shape[1]
        scale = self.scale.repeat_interleave(self.size, dim=1)[:, :columns]
        zero = self.zero.repeat_interleave(self.size, dim=1)[:, :columns]
        return (self.codes.float() - zero.float()).mul_(scale)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The operator's tensors; `zeros` is None where they are all 2**(bits-1)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def holds(scheme: Scheme) -> str | None:
    """None if the operator holds the scheme exactly, else why not."""
    if scheme.kind != "int":
        return f"MatMulNBits holds integers, not {scheme.kind}"
    if scheme.activation_bits != 16:
        return "MatMulNBits is for weights alone"
    if scheme.group_size is not None and scheme.group_size % _BLOCKS[-1]:
        return "MatMulNBits needs groups divisible by 16, or whole rows"
    return None


def blocks_of(tensor: QuantizedTensor) -> Blocks:
    """The weight in the operator's blocks: the same codes, scales and zeros, some repeated."""
    assert holds(tensor.scheme) is None and isinstance(tensor.scale, PlainScale)
    assert tensor.columns is None
    group = tensor.scheme.group_size
    columns = tensor.shape[1]
    size = _ROW_BLOCK if group is None else next(k for k in _BLOCKS if group % k == 0)
    times = -(-columns // size) if group is None else group // size
    scale = tensor.scale.values().repeat_interleave(times, dim=1)
    if tensor.zero is None:
        zero = torch.full(scale.shape, 2 ** (tensor.scheme.bits - 1), dtype=torch.uint8)
    else:
        zero = tensor.zero.repeat_interleave(times, dim=1)
    bits = next(b for b in BITS if b >= tensor.scheme.bits)
    return Blocks(codes=tensor.codes, scale=scale, zero=zero, bits=bits, size=size)


def pack(blocks: Blocks) -> Packed:
    """The operator's tensors."""
    rows, columns = blocks.codes.shape
    count = blocks.scale.shape[1]
    padded = torch.zeros(rows, count * blocks.size, dtype=torch.uint8)
    padded[:, :columns] = blocks.codes
    codes = pack_rows(padded, blocks.bits).view(torch.uint8)
    codes = codes[:, : padded.shape[1] * blocks.bits // 8]
    zeros = None
    if bool((blocks.zero != 2 ** (blocks.bits - 1)).any()):
        packed = pack_rows(blocks.zero, blocks.bits).view(torch.uint8)
        zeros = packed[:, : -(-count * blocks.bits // 8)].reshape(-1).contiguous()
    return Packed(
        codes=codes.reshape(rows, count, -1).contiguous(),
        scales=blocks.scale.float().reshape(-1).contiguous(),
        zeros=zeros,
    )


def unpack(name: str, packed: Packed, *, bits: int, size: int, shape: tuple[int, int]) -> Blocks:
    """The inverse of `pack`; `shape` is (O, I).  CheckpointError naming the node `name`."""
    rows, columns = shape
    if bits not in BITS or size not in range(16, 1 << 20) or size & (size - 1) or min(shape) < 1:
        raise CheckpointError(
            f"{name}: {bits} bits in blocks of {size} for {list(shape)} is not read; 2, 4 and 8 "
            "bits in blocks of a power of two from 16 on are"
        )
    count = -(-columns // size)
    zero_bytes = -(-count * bits // 8)
    _check(name, "B", packed.codes, torch.uint8, (rows, count, size * bits // 8))
    _check(name, "scales", packed.scales, torch.float32, (rows * count,))
    if packed.zeros is None:
        zero = torch.full((rows, count), 2 ** (bits - 1), dtype=torch.uint8)
    else:
        _check(name, "zero_points", packed.zeros, torch.uint8, (rows * zero_bytes,))
        zero = unpack_bytes(packed.zeros.reshape(rows, zero_bytes), bits, count)
    return Blocks(
        codes=unpack_bytes(packed.codes.reshape(rows, -1), bits, columns),
        scale=packed.scales.reshape(rows, count),
        zero=zero,
        bits=bits,
        size=size,
    )


def unpack_bytes(raw: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 codes [R, columns] from bytes [R, at least as many as they take]."""
    words = -(-columns * bits // 32)
    padded = torch.zeros(raw.shape[0], words * 4, dtype=torch.uint8)
    taken = min(raw.shape[1], words * 4)
    padded[:, :taken] = raw[:, :taken]
    return unpack_rows(padded.view(torch.int32), bits, columns)


def _check(
    name: str, part: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    # Scales and zeros are flat in some files and [O, ...] in others.
    same = tuple(tensor.shape) == shape if part == "B" else tensor.numel() == shape[0]
    if tensor.dtype != dtype or not same:
        raise CheckpointError(
            f"{name}: {part} is {tensor.dtype} {list(tensor.shape)}, but its attributes demand "
            f"{dtype} {list(shape)}"
        )
