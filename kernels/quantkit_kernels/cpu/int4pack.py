"""torch's own 4-bit weights for CPUs: their packing, its inverse, and products with them.

aten packs differently on each instruction set, so packed bytes never leave the process.
value = (code - 8) · scale + offset.  N rows, K columns, G groups, M rows of x.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit_kernels.cpu import isa
from quantkit_kernels.cpu.tiled import ELEMENTS

GROUPS = (32, 64, 128, 256)
# Rows of x up to which aten's kernel, which decodes again every four rows, beats decoding once.
# avx512: from 4096 x 11008 on two cores, decoding 19 ms, int4pack .27 ms a row; avx2: one thread
# would choose 64, two 128.
FEW_ROWS = {"avx512": 96, "avx2": 96, "default": 4}
# The overload itself: looking it up by the arguments takes as long as the call.
_multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default


def block_rows() -> int:
    """Rows that aten packs together; N must be a multiple for its fast loop."""
    return 64 if isa.level() == "avx512" else 32


def pack(codes_NK: Tensor) -> Tensor:
    """aten's packing uint8 [N, K/2] of codes uint8 [N, K]; N a multiple of 64, K even."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK.to(torch.int32), 1)
    assert isinstance(packed, Tensor)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """Codes uint8 [N, K], the inverse of `pack`."""
    return _split(_blocks(packed)).t().contiguous()


def scales_and_offsets(
    scale_NG: Tensor, zero_NG: Tensor | None, minimum_NG: Tensor | None = None
) -> Tensor:
    """bfloat16 [G, N, 2] of scale and (8 - zero) · scale, as aten wants them; with a minimum in the
    place of zeros 8 · scale + minimum."""
    scale = scale_NG.to(torch.float32)
    if minimum_NG is not None:
        offset = 8 * scale + minimum_NG
    else:
        offset = torch.zeros_like(scale) if zero_NG is None else (8 - zero_NG.float()) * scale
    return torch.stack((scale, offset), dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()


def matmul(x_MK: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """[M, N] in the dtype of x: x times the transposed weight, by the faster of two ways.

    Few rows in bfloat16 or float16 go to aten's kernel, which computes in bfloat16; float32, and
    many rows, to a decode in tiles followed by oneDNN or float32 products.
    """
    rows, columns = x_MK.shape
    if x_MK.dtype != torch.float32 and rows <= FEW_ROWS[isa.level()]:
        group = columns // scales.shape[0]
        x = x_MK if x_MK.dtype == torch.bfloat16 else x_MK.to(torch.bfloat16)
        out: Tensor = _multiply(x.contiguous(), packed, group, scales)
        return out if x_MK.dtype == torch.bfloat16 else out.to(x_MK.dtype)
    return _tiled(x_MK, packed, scales)


def dequantize(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K]: decoded in float32, rounded once."""
    columns = 2 * packed.shape[1]
    out = torch.empty(packed.shape[0], columns, dtype=dtype)
    for start, tile_KN in _tiles(packed, scales, torch.float32):
        out[start : start + tile_KN.shape[1]] = tile_KN.t()
    return out


def _tiled(x_MK: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    wide = torch.bfloat16 if x_MK.dtype == torch.bfloat16 and isa.fast_bfloat16() else torch.float32
    x = x_MK.to(wide)
    out = torch.empty(x.shape[0], packed.shape[0], dtype=x_MK.dtype)
    for start, tile_KN in _tiles(packed, scales, wide):
        out[:, start : start + tile_KN.shape[1]] = x @ tile_KN
    return out


def _tiles(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, weight [K, n] of some rows, transposed) for all rows in order."""
    blocks = _blocks(packed)
    count, columns, half = blocks.shape
    step = max(1, ELEMENTS // (columns * 2 * half))
    scale, offset = scales.to(torch.float32).unbind(-1)
    offset = offset - 8 * scale
    for first in range(0, count, step):
        codes = _split(blocks[first : first + step])
        rows = slice(first * 2 * half, first * 2 * half + codes.shape[1])
        grouped = codes.to(torch.float32).view(scales.shape[0], -1, codes.shape[1])
        weight = torch.addcmul(offset[:, None, rows], grouped, scale[:, None, rows])
        yield rows.start, weight.view(columns, -1).to(dtype)


def _blocks(packed: Tensor) -> Tensor:
    """The packed bytes as [block of rows, column, byte]."""
    block = block_rows()
    return packed.view(packed.shape[0] // block, 2 * packed.shape[1], block // 2)


def _split(blocks: Tensor) -> Tensor:
    """Codes uint8 [K, n] of some blocks [b, K, bytes]; vector ISAs pair rows half a block apart."""
    low, high = blocks & 15, blocks >> 4
    count, columns, half = blocks.shape
    if isa.level() == "default":
        both = torch.stack((low, high), dim=-1)
        return both.transpose(0, 1).reshape(columns, 2 * half * count)
    # Eight codes move at once.
    out = torch.empty(columns, count, 2, half // 8, dtype=torch.int64)
    out[:, :, 0] = low.view(torch.int64).transpose(0, 1)
    out[:, :, 1] = high.view(torch.int64).transpose(0, 1)
    return out.view(torch.uint8).view(columns, -1)
