"""Activations of any shape as the rows of one matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def flat_rows(
    x: Tensor, out_features: int, columns: int | None = None
) -> tuple[Tensor, tuple[int, ...]]:
    """x as [M, K] with contiguous rows, and the shape of the product.

    Copies only if the last dimension is strided, or to add zero columns up to `columns`.
    """
    flat = x.reshape(-1, x.shape[-1])
    if columns is not None and columns != x.shape[-1]:
        flat = torch.nn.functional.pad(flat, (0, columns - x.shape[-1]))
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    return flat, (*x.shape[:-1], out_features)
