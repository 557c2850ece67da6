"""Block types of ggml: stored numbers to bytes and back, bit for bit.  docs/formats/gguf.md draws
them; the owner's layouts are the structs of ggml-common.h.

Shapes: N blocks, B weights in a block, G groups in a block (its parts with a scale of their own).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Blocks decoded at a time, so that float32 temporaries stay small whatever the weight's size.
_DECODE_WEIGHTS = 1 << 21


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Bits `shift..shift+bits` of every code, `8 // bits` codes to a byte.

    Codes are cut into runs of `run`; byte k of a run group holds element k of each of its runs.
    """

    shift: int
    bits: int
    run: int


Field = Plane | str


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """How one block of weights is stored.

    `fields` in the order of their bytes: planes of the codes, and "d", "m", "scales".
    value = d·scale·(code - center), or d·scale·code + m, or d·scale·code - m·min.
    """

    name: str
    number: int
    size: int
    groups: int
    bits: int
    num_bytes: int
    fields: tuple[Field, ...]
    center: int = 0
    minimum: bool = False
    scale_bits: int = 0
    signed_scale: bool = False

    @property
    def group_size(self) -> int:
        """Weights that share a scale."""
        return self.size // self.groups

    @property
    def super_block(self) -> bool:
        """True for K-quants: groups' scales are integers under one float16 `d`."""
        return self.scale_bits > 0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight."""
        return 8 * self.num_bytes / self.size


_NIBBLES_16 = Plane(shift=0, bits=4, run=16)
_NIBBLES_32 = Plane(shift=0, bits=4, run=32)
_PAIRS_32 = Plane(shift=0, bits=2, run=32)
_FIFTH_1 = Plane(shift=4, bits=1, run=1)

Q4_0 = BlockType(
    name="Q4_0", number=2, size=32, groups=1, bits=4, num_bytes=18, center=8,
    fields=("d", _NIBBLES_16),
)  # fmt: skip
Q4_1 = BlockType(
    name="Q4_1", number=3, size=32, groups=1, bits=4, num_bytes=20, minimum=True,
    fields=("d", "m", _NIBBLES_16),
)  # fmt: skip
Q5_0 = BlockType(
    name="Q5_0", number=6, size=32, groups=1, bits=5, num_bytes=22, center=16,
    fields=("d", _FIFTH_1, _NIBBLES_16),
)  # fmt: skip
Q5_1 = BlockType(
    name="Q5_1", number=7, size=32, groups=1, bits=5, num_bytes=24, minimum=True,
    fields=("d", "m", _FIFTH_1, _NIBBLES_16),
)  # fmt: skip
# Signed bytes in the file; codes here are they plus 128.
Q8_0 = BlockType(
    name="Q8_0", number=8, size=32, groups=1, bits=8, num_bytes=34, center=128,
    fields=("d", Plane(shift=0, bits=8, run=32)),
)  # fmt: skip
Q2_K = BlockType(
    name="Q2_K", number=10, size=256, groups=16, bits=2, num_bytes=84, minimum=True, scale_bits=4,
    fields=("scales", _PAIRS_32, "d", "m"),
)  # fmt: skip
Q3_K = BlockType(
    name="Q3_K", number=11, size=256, groups=16, bits=3, num_bytes=110, center=4, scale_bits=6,
    signed_scale=True, fields=(Plane(shift=2, bits=1, run=32), _PAIRS_32, "scales", "d"),
)  # fmt: skip
Q4_K = BlockType(
    name="Q4_K", number=12, size=256, groups=8, bits=4, num_bytes=144, minimum=True, scale_bits=6,
    fields=("d", "m", "scales", _NIBBLES_32),
)  # fmt: skip
Q5_K = BlockType(
    name="Q5_K", number=13, size=256, groups=8, bits=5, num_bytes=176, minimum=True, scale_bits=6,
    fields=("d", "m", "scales", Plane(shift=4, bits=1, run=32), _NIBBLES_32),
)  # fmt: skip
Q6_K = BlockType(
    name="Q6_K", number=14, size=256, groups=16, bits=6, num_bytes=210, center=32, scale_bits=8,
    signed_scale=True,
    fields=(Plane(shift=0, bits=4, run=64), Plane(shift=4, bits=2, run=32), "scales", "d"),
)  # fmt: skip

BLOCK_TYPES: Mapping[str, BlockType] = {
    kind.name: kind for kind in (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
}


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The stored numbers of N blocks of one type.

    codes   uint8 [N, B]
    d       float16 [N]
    m       float16 [N], if the type has minima: the minimum itself, of K-quants the minima's scale
    scales  int8 [N, G], K-quants only
    mins    int8 [N, G], K-quants with minima only
    """

    kind: BlockType
    codes: Tensor
    d: Tensor
    m: Tensor | None = None
    scales: Tensor | None = None
    mins: Tensor | None = None

    def values(self) -> Tensor:
        """The weights, float32 [N, B], with ggml's order of multiplications."""
        kind = self.kind
        out = torch.empty(self.codes.shape, dtype=torch.float32)
        step = max(1, _DECODE_WEIGHTS // kind.size)
        for start in range(0, len(self.codes), step):
            part = slice(start, start + step)
            codes = self.codes[part].to(torch.float32).view(-1, kind.groups, kind.group_size)
            scale = self.d[part].to(torch.float32)[:, None]
            if self.scales is not None:
                scale = scale * self.scales[part].to(torch.float32)
            decoded = scale[..., None] * (codes - kind.center)
            if self.m is not None:
                low = self.m[part].to(torch.float32)[:, None]
                if self.mins is not None:
                    low = -(low * self.mins[part].to(torch.float32))
                decoded += low[..., None]
            out[part] = decoded.view(-1, kind.size)
        return out


def pack(blocks: Blocks) -> Tensor:
    """The bytes of the blocks, uint8 [N, num_bytes]."""
    kind, count = blocks.kind, len(blocks.codes)
    codes = blocks.codes ^ 0x80 if kind is Q8_0 else blocks.codes
    parts = []
    for field in kind.fields:
        if isinstance(field, Plane):
            parts.append(_pack_plane(codes, field))
        elif field == "scales":
            parts.append(_pack_scales(blocks))
        else:
            number = blocks.d if field == "d" else blocks.m
            assert number is not None and number.dtype == torch.float16
            parts.append(number.contiguous().view(torch.uint8).view(count, 2))
    packed = torch.cat(parts, dim=1)
    assert packed.shape[1] == kind.num_bytes
    return packed


def unpack(kind: BlockType, data: Tensor) -> Blocks:
    """The inverse of `pack`: data uint8, N times `num_bytes` in all."""
    data = data.reshape(-1, kind.num_bytes)
    codes = torch.zeros(len(data), kind.size, dtype=torch.uint8)
    halves: dict[str, Tensor] = {}
    scales = mins = None
    position = 0
    for field in kind.fields:
        if isinstance(field, Plane):
            width = kind.size * field.bits // 8
            codes |= _unpack_plane(data[:, position : position + width], field, kind.size)
        elif field == "scales":
            width = _scale_bytes(kind)
            scales, mins = _unpack_scales(kind, data[:, position : position + width])
        else:
            width = 2
            raw = data[:, position : position + width].contiguous()
            halves[field] = raw.view(torch.float16).view(-1)
        position += width
    if kind is Q8_0:
        codes ^= 0x80
    return Blocks(
        kind=kind, codes=codes, d=halves["d"], m=halves.get("m"), scales=scales, mins=mins
    )


def decode(kind: BlockType, data: Tensor) -> Tensor:
    """Float32 weights [N, B] of packed blocks (uint8)."""
    return unpack(kind, data).values()


def _pack_plane(codes: Tensor, plane: Plane) -> Tensor:
    per = 8 // plane.bits
    mask = (1 << plane.bits) - 1
    grouped = ((codes >> plane.shift) & mask).view(len(codes), -1, per, plane.run)
    packed = torch.zeros_like(grouped[:, :, 0])
    for place in range(per):
        packed |= grouped[:, :, place] << (plane.bits * place)
    return packed.reshape(len(codes), -1)


def _unpack_plane(data: Tensor, plane: Plane, size: int) -> Tensor:
    per = 8 // plane.bits
    mask = (1 << plane.bits) - 1
    grouped = data.reshape(len(data), -1, 1, plane.run)
    places = [((grouped >> (plane.bits * place)) & mask) << plane.shift for place in range(per)]
    return torch.cat(places, dim=2).reshape(len(data), size)


def _scale_bytes(kind: BlockType) -> int:
    return kind.num_bytes - sum(
        kind.size * field.bits // 8 if isinstance(field, Plane) else 2
        for field in kind.fields
        if field != "scales"
    )


# Q3_K's sixteen 6-bit scales: two planes, as if they were codes.
_LOW_SCALES = Plane(shift=0, bits=4, run=8)
_HIGH_SCALES = Plane(shift=4, bits=2, run=4)


def _pack_scales(blocks: Blocks) -> Tensor:
    kind = blocks.kind
    assert blocks.scales is not None
    if kind is Q6_K:
        return blocks.scales.contiguous().view(torch.uint8)
    if kind is Q3_K:
        shifted = (blocks.scales + 32).view(torch.uint8)
        return torch.cat(
            [_pack_plane(shifted, _LOW_SCALES), _pack_plane(shifted, _HIGH_SCALES)], dim=1
        )
    assert blocks.mins is not None
    scales, mins = blocks.scales.view(torch.uint8), blocks.mins.view(torch.uint8)
    if kind is Q2_K:
        return scales | (mins << 4)
    # Q4_K, Q5_K: the upper two bits of the last four lie above the first four.
    return torch.cat(
        [
            scales[:, :4] | ((scales[:, 4:] >> 4) << 6),
            mins[:, :4] | ((mins[:, 4:] >> 4) << 6),
            (scales[:, 4:] & 15) | ((mins[:, 4:] & 15) << 4),
        ],
        dim=1,
    )


def _unpack_scales(kind: BlockType, data: Tensor) -> tuple[Tensor, Tensor | None]:
    """(scales, minima or None), int8 [N, G]."""
    data = data.contiguous()
    if kind is Q6_K:
        return data.view(torch.int8), None
    if kind is Q3_K:
        low = _unpack_plane(data[:, :8], _LOW_SCALES, 16)
        high = _unpack_plane(data[:, 8:], _HIGH_SCALES, 16)
        return (low | high).view(torch.int8) - 32, None
    if kind is Q2_K:
        return (data & 15).view(torch.int8), (data >> 4).view(torch.int8)
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    mins = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    return scales.view(torch.int8), mins.view(torch.int8)
