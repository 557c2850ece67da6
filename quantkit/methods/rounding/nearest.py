"""Round to nearest: each weight to the closest value of its group's grid, in bounded memory; also
what other roundings fall back to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.methods.parts import Rounded
from quantkit.methods.stats import Needs, Stats
from quantkit.numbers.grid import CodebookGrid, blocks, grid_of, unblocks
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

# Weights per chunk, so that temporaries stay near 16 MiB each whatever the weight's size.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The code of the nearest grid value, ties to even multiples of the scale (nf4, fp4: down)."""

    def needs(self, scheme: Scheme) -> Needs:
        """Nothing: no calibration data."""
        return Needs()

    def __call__(
        self,
        weight_OI: Tensor,
        scheme: Scheme,
        scale: Tensor,
        zero: Tensor | None,
        stats: Stats | None,
    ) -> Rounded:
        """Codes of a float32 weight; scale and zero: float32 [O, G] ([N] for flat blocks)."""
        return Rounded(codes=nearest_codes(weight_OI, scheme, scale, zero))


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
