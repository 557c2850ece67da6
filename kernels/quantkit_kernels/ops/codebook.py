"""Weights of 4-bit codes that index sixteen values, two codes to a byte: how CPUs keep them.

N rows of the weight, K columns, G groups per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
E2M1 = tuple(
    sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
)
# Quantiles of N(0, 1), normalised to [-1, 1] (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def pack_pairs(codes_NK: Tensor) -> Tensor:
    """uint8 [N, K/2] of codes uint8 [N, K], the first of a pair low."""
    return codes_NK[:, 0::2] | (codes_NK[:, 1::2] << 4)


def unpack_pairs(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Codes uint8 [N, K], the inverse of `pack_pairs`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(shape)


def pairs(values: Sequence[float]) -> Tensor:
    """Float32 [256, 2]: both values of every byte.  Half the lookups of one at a time."""
    book = torch.tensor(values, dtype=torch.float32)
    return torch.stack((book.repeat(16), book.repeat_interleave(16)), dim=-1)


def decode_pairs(packed: Tensor, pairs: Tensor, scale_NG: Tensor) -> Tensor:
    """Float32 [N, K] of packed codes uint8 [N, K/2], their table, and scales [N, G]."""
    rows, groups = scale_NG.shape
    values = pairs.index_select(0, packed.reshape(-1).to(torch.int32))
    return values.view(rows, groups, -1).mul_(scale_NG[..., None]).view(rows, -1)
