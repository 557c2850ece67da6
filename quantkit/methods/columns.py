"""Rounding one input channel of many rows at a time, without per-channel set-up.

Shapes: R rows, G groups per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from quantkit_kernels.lazy import torch

from quantkit.numbers.grid import (
    BlockGrid,
    CodebookGrid,
    Float4Grid,
    Float8Grid,
    IntegerGrid,
    grid_of,
)
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor


class ColumnRounder(Protocol):
    """Rounds a channel's weights to the grid of one group."""

    def __call__(
        self, group: int, target_R: Tensor, weight_R: Tensor, error_R: Tensor, codes_R: Tensor
    ) -> None:
        """Codes (uint8) nearest to `target` into `codes`; weight - value into `error`."""
        ...

    def set_group_(self, group: int, scale_R: Tensor, zero_R: Tensor | None) -> None:
        """Replaces a group's scale and zero."""
        ...


def column_rounder(scheme: Scheme, scale_RG: Tensor, zero_RG: Tensor | None) -> ColumnRounder:
    """The rounder of a scheme for these scales and zeros (copied)."""
    grid = grid_of(scheme)
    if isinstance(grid, Float4Grid):
        return _Float4Columns(grid, scale_RG)
    if isinstance(grid, CodebookGrid):
        return _CodebookColumns(grid, scale_RG)
    if isinstance(grid, Float8Grid):
        return _Float8Columns(grid, scale_RG)
    if isinstance(grid, BlockGrid):
        return _BlockColumns(grid, scale_RG, zero_RG)
    return _IntegerColumns(grid, scale_RG, zero_RG)


class _IntegerColumns:
    def __init__(self, grid: IntegerGrid, scale_RG: Tensor, zero_RG: Tensor | None) -> None:
        self.grid = grid
        self.scales = list(scale_RG.t().contiguous().unbind(0))
        self.rounded = torch.empty_like(self.scales[0])
        # Clamping before the zero is added saves a pass over the channel.
        self.low, self.high = float(grid.low - grid.center), float(grid.high - grid.center)
        self.zeros = None if zero_RG is None else list(zero_RG.t().contiguous().unbind(0))
        self.lows = [grid.low - zero for zero in self.zeros or ()]
        self.highs = [grid.high - zero for zero in self.zeros or ()]

    def __call__(
        self, group: int, target_R: Tensor, weight_R: Tensor, error_R: Tensor, codes_R: Tensor
    ) -> None:
        rounded, scale = self.rounded, self.scales[group]
        torch.div(target_R, scale, out=rounded).round_()
        if self.zeros is None:
            rounded.clamp_(self.low, self.high)
            torch.addcmul(weight_R, rounded, scale, value=-1, out=error_R)
            codes_R.copy_(rounded.add_(self.grid.center))
            return
        # clamp with tensor bounds is several times slower.
        torch.maximum(rounded, self.lows[group], out=rounded)
        torch.minimum(rounded, self.highs[group], out=rounded)
        torch.addcmul(weight_R, rounded, scale, value=-1, out=error_R)
        codes_R.copy_(rounded.add_(self.zeros[group]))

    def set_group_(self, group: int, scale_R: Tensor, zero_R: Tensor | None) -> None:
        self.scales[group] = scale_R.contiguous()
        if self.zeros is not None and zero_R is not None:
            self.zeros[group] = zero_R.contiguous()
            self.lows[group] = self.grid.low - self.zeros[group]
            self.highs[group] = self.grid.high - self.zeros[group]


class _CodebookColumns:
    def __init__(self, grid: CodebookGrid, scale_RG: Tensor) -> None:
        table = torch.tensor(grid.values, dtype=torch.float32, device=scale_RG.device)
        self.values, order = torch.sort(table, stable=True)
        self.codes = order.to(torch.uint8)
        self.midpoints = (self.values[1:] + self.values[:-1]) / 2
        self.scales = list(scale_RG.t().contiguous().unbind(0))
        self.reciprocals = [1.0 / scale.clamp(min=1e-38) for scale in self.scales]

    def __call__(
        self, group: int, target_R: Tensor, weight_R: Tensor, error_R: Tensor, codes_R: Tensor
    ) -> None:
        unit = torch.mul(target_R, self.reciprocals[group])
        index = torch.bucketize(unit, self.midpoints, out_int32=True)
        value = torch.index_select(self.values, 0, index)
        torch.addcmul(weight_R, value, self.scales[group], value=-1, out=error_R)
        torch.index_select(self.codes, 0, index, out=codes_R)

    def set_group_(self, group: int, scale_R: Tensor, zero_R: Tensor | None) -> None:
        self.scales[group] = scale_R.contiguous()
        self.reciprocals[group] = 1.0 / self.scales[group].clamp(min=1e-38)


class _Float4Columns:
    def __init__(self, grid: Float4Grid, scale_RG: Tensor) -> None:
        self.grid = grid
        self.scales = list(scale_RG.t().contiguous().unbind(0))

    def __call__(
        self, group: int, target_R: Tensor, weight_R: Tensor, error_R: Tensor, codes_R: Tensor
    ) -> None:
        codes = self.grid.encode(target_R, self.scales[group], None)
        value = self.grid.decode(codes, self.scales[group], None)
        torch.sub(weight_R, value, out=error_R)
        codes_R.copy_(codes)

    def set_group_(self, group: int, scale_R: Tensor, zero_R: Tensor | None) -> None:
        self.scales[group] = scale_R.contiguous()


class _Float8Columns:
    def __init__(self, grid: Float8Grid, scale_RG: Tensor) -> None:
        self.largest = grid.largest
        self.scales = list(scale_RG.t().contiguous().unbind(0))

    def __call__(
        self, group: int, target_R: Tensor, weight_R: Tensor, error_R: Tensor, codes_R: Tensor
    ) -> None:
        unit = torch.div(target_R, self.scales[group]).clamp_(-self.largest, self.largest)
        numbers = unit.to(torch.float8_e4m3fn)
        value = numbers.to(torch.float32)
        torch.addcmul(weight_R, value, self.scales[group], value=-1, out=error_R)
        codes_R.copy_(numbers.view(torch.uint8))

    def set_group_(self, group: int, scale_R: Tensor, zero_R: Tensor | None) -> None:
        self.scales[group] = scale_R.contiguous()


class _BlockColumns:
    def __init__(self, grid: BlockGrid, scale_RG: Tensor, zero_RG: Tensor | None) -> None:
        self.grid = grid
        self.scales = list(scale_RG.t().contiguous().unbind(0))
        self.inverses = [_inverse(scale) for scale in self.scales]
        lows = torch.zeros_like(scale_RG) if zero_RG is None else zero_RG
        self.lows = list(lows.t().contiguous().unbind(0))

    def __call__(
        self, group: int, target_R: Tensor, weight_R: Tensor, error_R: Tensor, codes_R: Tensor
    ) -> None:
        low, center = self.lows[group], self.grid.center
        codes = (target_R - low).mul_(self.inverses[group]).round_()
        codes.add_(center).clamp_(0, self.grid.high)
        codes_R.copy_(codes)
        torch.sub(weight_R, codes.sub_(center).mul_(self.scales[group]).add_(low), out=error_R)

    def set_group_(self, group: int, scale_R: Tensor, zero_R: Tensor | None) -> None:
        self.scales[group] = scale_R.contiguous()
        self.inverses[group] = _inverse(self.scales[group])
        if zero_R is not None:
            self.lows[group] = zero_R.contiguous()


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where the scale is 0, so that such groups take the center."""
    none = scale == 0
    return torch.where(none, torch.zeros_like(scale), 1 / torch.where(none, 1.0, scale))
