"""Blocks of ggml: stored numbers to bytes and back, bit for bit.  docs/formats/gguf.md draws them;
the owner's layouts are the structs of ggml-common.h.

Shapes: N blocks, B weights in a block, G groups in a block (its parts with a scale of their own).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.numbers.superblock import Q2_K, Q3_K, Q6_K, Q8_0, Blocks, BlockType, Plane

if TYPE_CHECKING:
    from torch import Tensor


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
