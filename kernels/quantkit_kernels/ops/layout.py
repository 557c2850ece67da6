"""Integer weights in the order in which tensor cores read them: `qk4` and `qk8`.

A word holds the codes that one thread feeds to its matrix instructions, so that a kernel decodes
straight into registers, without a detour through shared memory.  Both layouts cut the columns into
blocks of 128 and are good for mma.sync and wgmma alike.  N rows (a multiple of ROWS), K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of a block, and the number of rows that every kernel tile divides.
COLUMNS = 128
ROWS = 128


def pack_qk4(codes_NK: Tensor, *, adjacent: bool = False) -> Tensor:
    """int32 [K/128, N, 16] of 4-bit codes uint8 [N, K], padded with 8 to whole tiles.

    Word t*4 + b of a block holds, in nibble 2j + h + 4p, column 32b + 16j + 8h + 2t + p: masking
    with 0x000f000f gives a pair.  `adjacent`: in nibble 4j + 2h + p, for lookups by byte permutes.
    """
    padded = pad(codes_NK, 8)
    rows, columns = padded.shape
    # n, block, b, j, h, t, p -> block, n, t, b, then p, j, h or j, h, p
    order = (3, 4, 6) if adjacent else (6, 3, 4)
    digits = padded.view(rows, columns // COLUMNS, 4, 2, 2, 4, 2).permute(1, 0, 5, 2, *order)
    nibbles = digits.reshape(columns // COLUMNS, rows, 16, 8)
    low, high = nibbles[..., 0::2], nibbles[..., 1::2]
    return (low | (high << 4)).contiguous().view(torch.int32).squeeze(-1)


def unpack_qk4(words: Tensor, rows: int, columns: int, *, adjacent: bool = False) -> Tensor:
    """Codes uint8 [rows, columns], the inverse of `pack_qk4`."""
    blocks, padded_rows, _ = words.shape
    pairs = words.contiguous().view(torch.uint8).view(blocks, padded_rows, 16, 4)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1)
    order = (4, 5, 2, 6) if adjacent else (5, 6, 2, 4)
    digits = nibbles.view(blocks, padded_rows, 4, 4, 2, 2, 2).permute(1, 0, 3, *order)
    return digits.reshape(padded_rows, blocks * COLUMNS)[:rows, :columns].contiguous()


def pack_qk8(codes_NK: Tensor) -> Tensor:
    """int32 [K/128, N, 32] of int8 [N, K], padded with 0 to whole tiles.

    Word t*8 + b of a block holds, in byte 2h + p, column 16b + 8h + 2t + p.
    """
    padded = pad(codes_NK, 0)
    rows, columns = padded.shape
    # n, block, b, h, t, p -> block, n, t, b, h, p
    digits = padded.view(rows, columns // COLUMNS, 8, 2, 4, 2).permute(1, 0, 4, 2, 3, 5)
    bytes_ = digits.reshape(columns // COLUMNS, rows, 32, 4).contiguous()
    return bytes_.view(torch.int32).squeeze(-1)


def unpack_qk8(words: Tensor, rows: int, columns: int) -> Tensor:
    """Codes int8 [rows, columns], the inverse of `pack_qk8`."""
    blocks, padded_rows, _ = words.shape
    digits = words.contiguous().view(torch.int8).view(blocks, padded_rows, 4, 8, 2, 2)
    ordered = digits.permute(1, 0, 3, 4, 2, 5)
    return ordered.reshape(padded_rows, blocks * COLUMNS)[:rows, :columns].contiguous()


def pad_groups(values_NG: Tensor, columns: int, group_size: int) -> Tensor:
    """[G', N'] contiguous: per-group values [N, G] turned, with zeros for padded rows and groups.

    `group_size` 0 means one group for the whole row.
    """
    rows, groups = values_NG.shape
    wanted = 1 if group_size == 0 else max(groups, up(columns, COLUMNS) // group_size)
    out = values_NG.new_zeros(wanted, up(rows, ROWS))
    out[:groups, :rows] = values_NG.t()
    return out


def pad(codes_NK: Tensor, fill: int) -> Tensor:
    """Codes padded with `fill` to multiples of ROWS and COLUMNS; the same tensor if they are."""
    rows, columns = codes_NK.shape
    shape = (up(rows, ROWS), up(columns, COLUMNS))
    if shape == (rows, columns):
        return codes_NK.contiguous()
    out = codes_NK.new_full(shape, fill)
    out[:rows, :columns] = codes_NK
    return out


def up(number: int, multiple: int) -> int:
    """The smallest multiple that is no less than `number`."""
    return -(-number // multiple) * multiple
