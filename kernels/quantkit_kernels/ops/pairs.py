"""Weights of 4-bit codes that index sixteen values, two codes to a byte: how CPUs keep them.

N rows of the weight, K columns, G groups per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(codes_NK: Tensor) -> Tensor:
    """uint8 [N, K/2] of codes uint8 [N, K], the first of a pair low."""
    return codes_NK[:, 0::2] | (codes_NK[:, 1::2] << 4)


def unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Codes uint8 [N, K], the inverse of `pack`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(shape)


def table(values: Sequence[float]) -> Tensor:
    """Float32 [256, 2]: both values of every byte.  Half the lookups of one at a time."""
    book = torch.tensor(values, dtype=torch.float32)
    return torch.stack((book.repeat(16), book.repeat_interleave(16)), dim=-1)


def decode(packed: Tensor, table: Tensor, scale_NG: Tensor) -> Tensor:
    """Float32 [N, K] of packed codes uint8 [N, K/2], their table, and scales [N, G]."""
    rows, groups = scale_NG.shape
    values = table.index_select(0, packed.reshape(-1).to(torch.int32))
    return values.view(rows, groups, -1).mul_(scale_NG[..., None]).view(rows, -1)
