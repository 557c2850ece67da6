"""Rounding input channels of many rows one after the other, without per-channel set-up.

Shapes: R rows, G groups per row, B channels; rows of a channel lie side by side.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

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
    from quantkit_kernels.gpu.channels import Grid
    from torch import Tensor

# Channels whose errors are passed on by vector products before a matrix product takes over; on a
# GPU one launch is worth more of them.
_INNER, _INNER_GPU = 32, 128


class ColumnRounder(ABC):
    """Rounds channels to the grid of their groups; `scales` are the groups' scales [R] each."""

    def __init__(self, scale_RG: Tensor, zero_RG: Tensor | None) -> None:
        # Copies, though a single group's transpose is contiguous as it is.
        self._scale_GR = scale_RG.t().clone(memory_format=torch.contiguous_format)
        self._zero_GR = None
        if zero_RG is not None:
            self._zero_GR = zero_RG.t().clone(memory_format=torch.contiguous_format)
        self.scales = self._scale_GR.unbind(0)
        self.zeros = None if self._zero_GR is None else self._zero_GR.unbind(0)
        self.inner = _INNER
        self._grid: Grid | None = None
        if scale_RG.is_cuda and importlib.util.find_spec("triton") is not None:
            self.inner, self._grid = _INNER_GPU, self._fused(scale_RG.device)

    def set_group_(self, group: int, scale_R: Tensor, zero_R: Tensor | None) -> None:
        """Replaces a group's scale and zero."""
        self.scales[group].copy_(scale_R)
        if self.zeros is not None and zero_R is not None:
            self.zeros[group].copy_(zero_R)

    def solve(
        self,
        groups_B: Tensor,
        targets_BR: Tensor,
        weights_BR: Tensor,
        errors_BR: Tensor,
        codes_BR: Tensor,
        factors_BB: Tensor,
        *,
        down: bool,
    ) -> None:
        """Rounds channels in their order, or with `down` from the last to the first.

        A channel's code (uint8) is the nearest to its target, which is changed: each channel adds
        factors[i, j] · (weight - value), which `errors` receive, to the target of every channel j
        that comes after it.  groups: int32 [B].  On a GPU one kernel does it.
        """
        if self._grid is not None:
            from quantkit_kernels.gpu import channels

            channels.solve(
                targets_BR,
                weights_BR,
                errors_BR,
                # Factorisations come in columns.
                factors_BB.contiguous(),
                self._grid,
                self._scale_GR,
                self._zero_GR,
                groups_B,
                down=down,
            )
            codes_BR.copy_(self._codes(targets_BR, groups_B))
            return
        groups, factors = groups_B.tolist(), factors_BB.t().contiguous()
        targets, weights = targets_BR.unbind(0), weights_BR.unbind(0)
        errors, codes, errors_RB = errors_BR.unbind(0), codes_BR.unbind(0), errors_BR.t()
        count = len(groups)
        for i in range(count - 1, -1, -1) if down else range(count):
            before = slice(i + 1, count) if down else slice(0, i)
            if before.stop > before.start:
                targets[i].addmv_(errors_RB[:, before], factors[i, before])
            self.round(groups[i], targets[i], weights[i], errors[i], codes[i])

    @abstractmethod
    def round(
        self, group: int, target_R: Tensor, weight_R: Tensor, error_R: Tensor, codes_R: Tensor
    ) -> None:
        """Codes (uint8) nearest to `target` into `codes`; weight - value into `error`."""

    @abstractmethod
    def _fused(self, device: torch.device) -> Grid:
        """What the kernel rounds to."""

    @abstractmethod
    def _codes(self, units_BR: Tensor, groups_B: Tensor) -> Tensor:
        """The codes of what the kernel rounded to."""


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


class _IntegerColumns(ColumnRounder):
    def __init__(self, grid: IntegerGrid, scale_RG: Tensor, zero_RG: Tensor | None) -> None:
        self.grid = grid
        super().__init__(scale_RG, zero_RG)
        self.rounded = torch.empty_like(self.scales[0])
        # Clamping before the zero is added saves a pass over the channel.
        self.low, self.high = float(grid.low - grid.center), float(grid.high - grid.center)
        self.lows = [grid.low - zero for zero in self.zeros or ()]
        self.highs = [grid.high - zero for zero in self.zeros or ()]

    def round(
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
        super().set_group_(group, scale_R, zero_R)
        if self.zeros is not None:
            self.lows[group] = self.grid.low - self.zeros[group]
            self.highs[group] = self.grid.high - self.zeros[group]

    def _fused(self, device: torch.device) -> Grid:
        from quantkit_kernels.gpu.channels import Grid

        low, high, center = (float(n) for n in (self.grid.low, self.grid.high, self.grid.center))
        return Grid(kind="int", low=low, high=high, center=center)

    def _codes(self, units_BR: Tensor, groups_B: Tensor) -> Tensor:
        if self._zero_GR is None:
            return units_BR + self.grid.center
        return units_BR + self._zero_GR[groups_B.long()]


class _CodebookColumns(ColumnRounder):
    def __init__(self, grid: CodebookGrid, scale_RG: Tensor) -> None:
        table = torch.tensor(grid.values, dtype=torch.float32, device=scale_RG.device)
        self.values, order = torch.sort(table, stable=True)
        self.codes = order.to(torch.uint8)
        self.midpoints = (self.values[1:] + self.values[:-1]) / 2
        super().__init__(scale_RG, None)
        self.reciprocals = [1.0 / scale.clamp(min=1e-38) for scale in self.scales]

    def round(
        self, group: int, target_R: Tensor, weight_R: Tensor, error_R: Tensor, codes_R: Tensor
    ) -> None:
        unit = torch.mul(target_R, self.reciprocals[group])
        index = torch.bucketize(unit, self.midpoints, out_int32=True)
        value = torch.index_select(self.values, 0, index)
        torch.addcmul(weight_R, value, self.scales[group], value=-1, out=error_R)
        torch.index_select(self.codes, 0, index, out=codes_R)

    def set_group_(self, group: int, scale_R: Tensor, zero_R: Tensor | None) -> None:
        super().set_group_(group, scale_R, zero_R)
        self.reciprocals[group] = 1.0 / self.scales[group].clamp(min=1e-38)

    def _fused(self, device: torch.device) -> Grid:
        from quantkit_kernels.gpu.channels import Grid

        last = torch.full((1,), float("inf"), device=device)
        return Grid(kind="table", values=self.values, midpoints=torch.cat([self.midpoints, last]))

    def _codes(self, units_BR: Tensor, groups_B: Tensor) -> Tensor:
        return self.codes[torch.bucketize(units_BR, self.midpoints)]


class _Float4Columns(ColumnRounder):
    def __init__(self, grid: Float4Grid, scale_RG: Tensor) -> None:
        self.grid = grid
        super().__init__(scale_RG, None)

    def round(
        self, group: int, target_R: Tensor, weight_R: Tensor, error_R: Tensor, codes_R: Tensor
    ) -> None:
        codes = self.grid.encode(target_R, self.scales[group], None)
        value = self.grid.decode(codes, self.scales[group], None)
        torch.sub(weight_R, value, out=error_R)
        codes_R.copy_(codes)

    def _fused(self, device: torch.device) -> Grid:
        from quantkit_kernels.gpu.channels import Grid

        return Grid(kind="e2m1")

    def _codes(self, units_BR: Tensor, groups_B: Tensor) -> Tensor:
        return self.grid.encode_unit(units_BR)


class _Float8Columns(ColumnRounder):
    def __init__(self, grid: Float8Grid, scale_RG: Tensor) -> None:
        self.largest = grid.largest
        super().__init__(scale_RG, None)

    def round(
        self, group: int, target_R: Tensor, weight_R: Tensor, error_R: Tensor, codes_R: Tensor
    ) -> None:
        unit = torch.div(target_R, self.scales[group]).clamp_(-self.largest, self.largest)
        numbers = unit.to(torch.float8_e4m3fn)
        value = numbers.to(torch.float32)
        torch.addcmul(weight_R, value, self.scales[group], value=-1, out=error_R)
        codes_R.copy_(numbers.view(torch.uint8))

    def _fused(self, device: torch.device) -> Grid:
        from quantkit_kernels.gpu.channels import Grid

        return Grid(kind="e4m3", high=self.largest)

    def _codes(self, units_BR: Tensor, groups_B: Tensor) -> Tensor:
        return units_BR.to(torch.float8_e4m3fn).view(torch.uint8)


class _BlockColumns(ColumnRounder):
    def __init__(self, grid: BlockGrid, scale_RG: Tensor, zero_RG: Tensor | None) -> None:
        self.grid = grid
        super().__init__(scale_RG, torch.zeros_like(scale_RG) if zero_RG is None else zero_RG)
        self.inverses = [_inverse(scale) for scale in self.scales]

    def round(
        self, group: int, target_R: Tensor, weight_R: Tensor, error_R: Tensor, codes_R: Tensor
    ) -> None:
        assert self.zeros is not None
        low, center = self.zeros[group], self.grid.center
        codes = (target_R - low).mul_(self.inverses[group]).round_()
        codes.add_(center).clamp_(0, self.grid.high)
        codes_R.copy_(codes)
        torch.sub(weight_R, codes.sub_(center).mul_(self.scales[group]).add_(low), out=error_R)

    def set_group_(self, group: int, scale_R: Tensor, zero_R: Tensor | None) -> None:
        super().set_group_(group, scale_R, zero_R)
        self.inverses[group] = _inverse(self.scales[group])

    def _fused(self, device: torch.device) -> Grid:
        from quantkit_kernels.gpu.channels import Grid

        return Grid(kind="block", high=float(self.grid.high), center=float(self.grid.center))

    def _codes(self, units_BR: Tensor, groups_B: Tensor) -> Tensor:
        return units_BR


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where the scale is 0, so that such groups take the center."""
    none = scale == 0
    return torch.where(none, torch.zeros_like(scale), 1 / torch.where(none, 1.0, scale))
