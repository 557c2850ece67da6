"""Nearest codes of a whole weight, in bounded memory; also what other roundings fall back to."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numbers.grid import CodebookGrid, blocks, grid_of, unblocks
from quantkit.numbers.scheme import Scheme

# Weights per chunk, so that temporaries stay near 16 MiB each whatever the weight's size.
_CHUNK_ELEMENTS = 1 << 22


def nearest_codes(weight_OI: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Codes uint8 [O, I]; scale and zero: float32 [O, G] ([N] for flat blocks)."""
    grid = grid_of(scheme)
    rows, columns = weight_OI.shape
    codes = torch.empty(weight_OI.shape, dtype=torch.uint8, device=weight_OI.device)
    if scale.ndim == 2:
        step = max(1, _CHUNK_ELEMENTS // columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            groups = weight_OI[part].reshape(-1, scale.shape[1], columns // scale.shape[1])
            shift = None if zero is None else zero[part, :, None]
            codes[part] = grid.encode(groups, scale[part, :, None], shift).view(-1, columns)
        return codes
    found = grid.encode(blocks(weight_OI, scheme), scale[:, None], None)
    size = found.shape[1]
    if (rest := rows * columns % size) and isinstance(grid, CodebookGrid):
        # In a last block that is not full, bitsandbytes divides instead of using 1/absmax.
        tail = weight_OI.reshape(-1)[-rest:]
        found[-1, :rest] = grid.encode_unit(tail / scale[-1].clamp(min=1e-38))
    return codes.copy_(unblocks(found, (rows, columns)))
