"""Coordinate descent on codes and scales, from codes that are good already.

Shapes: O out features, I in features, G groups per row, B channels in a block, R rows in a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.methods.columns import column_rounder
from quantkit.numbers.grid import grid_of, store_scale
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

# Larger groups keep their scales: a group has to fit one block.
_LARGEST_BLOCK, _BLOCK = 256, 128
# The smallest normal float32.
_TINY = 2.0**-126


def normal_matrix(gram_II: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """(H / diagonal, diagonal) of the damped Gram matrix H, columns divided by their diagonal.

    H is scaled to a mean diagonal of 1; a channel never active gets the diagonal `damp` or 1.
    """
    matrix = gram_II / gram_II.diagonal().mean().clamp(min=_TINY)
    diagonal = matrix.diagonal() + damp
    diagonal = torch.where(diagonal > 0, diagonal, 1.0)
    matrix.diagonal().copy_(diagonal)
    return matrix.div_(diagonal), diagonal


class Descent:
    """Minimises (w - v)·H·(w - v)ᵀ for each row w of a chunk, over codes and group scales.

    Each sweep takes every group's scale anew, as least squares with the codes as they are, then
    every channel's code in turn, as the nearest to its unconstrained optimum.  No step raises the
    error: of a scale rounded for storage, only an improvement is taken.

    Channels lie side by side (transposed): `value` is v, `pull` (w - v)·H / diagonal(H).
    """

    def __init__(
        self,
        weight_RI: Tensor,
        codes_RI: Tensor,
        scheme: Scheme,
        scale_RG: Tensor,
        zero_RG: Tensor | None,
        matrix_II: Tensor,
        diagonal_I: Tensor,
    ) -> None:
        self.scheme, self.grid = scheme, grid_of(scheme)
        self.matrix, self.diagonal = matrix_II, diagonal_I
        self.group_size = weight_RI.shape[1] // scale_RG.shape[1]
        # Scales that are stored in two levels, or are coarse, stay as the range chose them.
        fixed = scheme.double_quant or scheme.coarse_scales or scheme.kind == "ggml"
        self.refit = self.group_size <= _LARGEST_BLOCK and not fixed
        self.block = self.group_size if self.refit else _BLOCK
        self.scale = scale_RG.t().contiguous()
        self.zero = None if zero_RG is None else zero_RG.t().contiguous()
        self.round = column_rounder(scheme, scale_RG, zero_RG)
        place = torch.arange(weight_RI.shape[1], dtype=torch.int32, device=weight_RI.device)
        self.group_of = place // self.group_size
        self.codes = codes_RI.t().contiguous()
        self.value = torch.empty_like(self.codes, dtype=torch.float32)
        for start in range(0, len(self.codes), self.group_size):
            group, block = start // self.group_size, slice(start, start + self.group_size)
            if scheme.kind == "ggml":
                low = None if self.zero is None else self.zero[group]
                self.value[block] = self.grid.decode(self.codes[block], self.scale[group], low)
            else:
                torch.mul(self._units(block), self.scale[group], out=self.value[block])
        self.pull = matrix_II.t() @ (weight_RI.t() - self.value)

    def sweep(self) -> None:
        """Takes every scale and every code anew, once."""
        columns = len(self.codes)
        for start in range(0, columns, self.block):
            block = slice(start, min(start + self.block, columns))
            change = self._solve_block(block)
            for others in (slice(0, block.start), slice(block.stop, columns)):
                if others.stop > others.start:
                    self.pull[others].addmm_(self.matrix[block, others].t(), change)

    def result(self) -> tuple[Tensor, Tensor]:
        """Codes uint8 [R, I] and scales [R, G]."""
        return self.codes.t(), self.scale.t()

    def _units(self, block: slice) -> Tensor:
        """The block's values in units of the scale, [B, R]."""
        group = block.start // self.group_size
        zero = None if self.zero is None else self.zero[group]
        return self.grid.decode(self.codes[block], torch.ones_like(self.scale[group]), zero)

    def _solve_block(self, block: slice) -> Tensor:
        """Takes a block's scale and codes anew; returns old - new values [B, R].

        The block's own `pull` is brought up to date; that of other channels is not.
        """
        old = self.value[block].clone()
        if self.refit:
            self._take_scale(block)
        change = torch.empty_like(old)
        inside = self.matrix[block, block]
        step = self.round.inner
        for start in range(0, len(old), step):
            inner = slice(start, min(start + step, len(old)))
            self._solve_inner(block.start, inner, change[inner], inside[inner, inner])
            self.pull[block].addmm_(inside[inner].t(), change[inner])
        self.value[block].sub_(change)
        return old.sub_(self.value[block])

    def _take_scale(self, block: slice) -> None:
        """The scale of least error for the block's codes, as stored; updates value and pull."""
        group = block.start // self.group_size
        units, diagonal = self._units(block), self.diagonal[block, None]
        inside = self.matrix[block, block]
        slope = (units * self.pull[block] * diagonal).sum(0)
        curvature = ((inside.t() @ units).mul_(units) * diagonal).sum(0)
        scale = self.scale[group]
        wanted = scale + slope / curvature.clamp(min=_TINY)
        if not self.scheme.flat:
            wanted = store_scale(wanted, half=self.scheme.half_scales)
        step = wanted - scale
        better = (step * (2 * slope - step * curvature) > 0) & (wanted * scale > 0)
        step = torch.where(better, step, 0.0)
        scale = torch.where(better, wanted, scale)
        self.scale[group] = scale
        self.round.set_group_(group, scale, None if self.zero is None else self.zero[group])
        self.value[block] = units * scale
        self.pull[block].addmm_(inside.t(), units * step, alpha=-1)

    def _solve_inner(self, offset: int, inner: slice, change_BR: Tensor, inside: Tensor) -> None:
        """Takes the codes of a few channels anew; `change_BR` receives old - new values."""
        part = slice(offset + inner.start, offset + inner.stop)
        value = self.value[part]
        self.round.solve(
            self.group_of[part],
            value + self.pull[part],
            value,
            change_BR,
            self.codes[part],
            inside,
            down=False,
        )
