"""What a weight's error should be, and what its file cannot hold.

Rounding to a grid costs what the grid's steps make it cost; whatever comes on top was lost on the
way: a scale that no file of the format holds, codes at their limits, a number too small for the
dtype it went through.  So each error is set against that of the same grid without any of that.

Letters: O out features, I in features, G groups per row, R rows looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.methods.extent import Extent, scale_and_zero, snap_rows
from quantkit.methods.stats import Stats
from quantkit.numbers.grid import IntegerGrid, grid_of, store_scale
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.superblock import BLOCK_TYPES
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

# Rows on which a weight's output error is measured; a share of the rows tells enough.
_ERROR_ROWS = 256
# Times what the grid gives by itself.  On trained models parts that know activations stay below
# that by far and others at it; of 2,800 tiny random weights the worst came to 1.6.
_BEYOND = 2.0
# What scales rounded to bfloat16 add: 2^-8 of a value at most, its square on average below this.
_SCALE_ROUNDING = 2.0**-18
# Half a step of e4m3 next to its largest number is 1/28 of that.
_FLOAT8_STEPS = 28
_SUPER_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What quantizing cost, all as parts of the output's square.

    error      ‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖² over the calibration tokens (over the weights alone without
               statistics), on at most 256 rows
    expected   the same for full ranges, scales as they come out and nearest codes
    clipped    share of weights beyond the grid's range by more than half a step
    """

    error: float
    expected: float
    clipped: float

    @property
    def note(self) -> str | None:
        """What to tell if the error is far beyond the grid's own, else None."""
        if self.error <= _BEYOND * (self.expected + _SCALE_ROUNDING):
            return None
        return (
            f"its error, {self.error:.2g} of the output's square, is far beyond the "
            f"{self.expected:.2g} that this many bits give"
        )


def error_rows(count: int) -> Tensor:
    """The rows, of so many, on which a weight's cost is measured: evenly spaced, int64."""
    return torch.arange(0, count, max(1, -(-count // _ERROR_ROWS)))


def cost_of(weight_OI: Tensor, tensor: QuantizedTensor, stats: Stats | None) -> Cost:
    """The cost of a float32 weight as quantized, on its `error_rows`."""
    rows = error_rows(len(weight_OI))
    return cost_of_rows(weight_OI[rows], tensor.decode(rows), tensor.scheme, stats)


def cost_of_rows(
    kept_RI: Tensor, quantized_RI: Tensor, scheme: Scheme, stats: Stats | None
) -> Cost:
    """The cost of float32 rows and what they decode to, on a grid of the scheme's."""
    low, high = quantized_RI.amin(1, keepdim=True), quantized_RI.amax(1, keepdim=True)
    slack = (high - low) / 2**scheme.bits
    clipped = float(((kept_RI > high + slack) | (kept_RI < low - slack)).float().mean())
    largest = kept_RI.abs().amax()
    if float(largest) == 0:
        return Cost(error=0.0, expected=0.0, clipped=clipped)
    # In parts of the largest weight, so that no square underflows.
    ideal = snap_rows(kept_RI, scheme, exact=True)
    error, expected, size = (
        _size(part / largest, stats) for part in (kept_RI - quantized_RI, kept_RI - ideal, kept_RI)
    )
    if size == 0:
        return Cost(error=0.0, expected=0.0, clipped=clipped)
    return Cost(error=error / size, expected=expected / size, clipped=clipped)


def unheld_groups(extent: Extent, scheme: Scheme) -> str | None:
    """How many groups, of a weight's `extent_of`, need scales that the file cannot hold, or None.

    Counted are those whose full range is stored so far off that its end moves by more than half a
    step; `scheme` says what the file stores.  Powers of two and e4m3 numbers are none too far off.
    Super-blocks of ggml store one number for integers
    that make up for it, unless it is off by a tenth.
    """
    if scheme.flat or (scheme.coarse_scales and scheme.share == "group"):
        return None
    half, grid = scheme.half_scales, grid_of(scheme.integer)
    steps = grid.steps if isinstance(grid, IntegerGrid) else _FLOAT8_STEPS
    scale = scale_and_zero(extent, scheme.integer, exact=True)[0].abs()
    scale = torch.where(extent.magnitude == 0, 0.0, scale)
    if scheme.block is not None:
        kind, half = BLOCK_TYPES[scheme.block.upper()], True
        if kind.super_block:
            largest = 2 ** (kind.scale_bits - kind.signed_scale)
            scale, steps = scale.view(-1, kind.groups).amax(1) / largest, _SUPER_STEPS
    off = (store_scale(scale, half=half) - scale).abs() * steps > scale
    off &= scale > 0
    if not (count := int(off.sum())):
        return None
    return (
        f"{count} of {off.numel()} groups need scales from {float(scale[off].min()):.2g} to "
        f"{float(scale[off].max()):.2g}, which {'float16' if half else 'bfloat16'} does not hold"
    )


def beyond_half(tensor: QuantizedTensor) -> int:
    """How many scales float16 rounds, should a runtime cast them to it; those of flat blocks are
    never cast, those of ggml's are float16."""
    if not isinstance(tensor.scale, PlainScale) or tensor.scheme.flat:
        return 0
    scale = tensor.scale.values()
    return int((scale.half().to(torch.float32) != scale).sum())


def _size(delta_RI: Tensor, stats: Stats | None) -> float:
    """The square of X·deltaᵀ, or of delta without statistics."""
    if stats is None or stats.count == 0:
        return float(delta_RI.square().sum())
    if stats.gram is not None and stats.gram.ndim == 2:
        return float((delta_RI @ stats.gram).mul_(delta_RI).sum())
    return float((delta_RI.square() @ stats.mean_sq).sum())
