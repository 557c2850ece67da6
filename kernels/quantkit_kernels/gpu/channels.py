"""Triton kernel that rounds channels one after the other, each corrected by the errors before it.

It is the inner loop of GPTQ and of coordinate descent: one program keeps the corrections of a block
of channels for its rows, so that a block is one launch instead of several for each channel.

Shapes: B channels in a block, R rows, G groups; rows of a channel lie side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.gpu.fp8 import round_e4m3

# Most channels of a launch.
MOST = 128
# Adding and taking away 1.5 · 2^23 rounds a float32 below 2^22 to an integer, ties to even.
_ROUND = tl.constexpr(12582912.0)
_FAR = tl.constexpr(2097152.0)
_ROWS, _WARPS = 16, 2


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What channels are rounded to, with t the target and s the scale of its group.

    kind    "int"    round(t / s) in low..high, less the zero if there is one; value: times s
            "block"  round((t - zero) / s) + center in low..high; value: less center, times s, plus
                     zero
            "table"  the entry nearest to t / s; ties go down; value: times s
            "e2m1"   the 4-bit float nearest to t / s, at most 6; ties to even; value: times s
            "e4m3"   the 8-bit float nearest to t / s, at most `high`; ties to even; value: times s
    values, midpoints   float32 [16] of a table, in rising order, and [16] between them, inf last
    """

    kind: str
    low: float = 0.0
    high: float = 0.0
    center: float = 0.0
    values: Tensor | None = None
    midpoints: Tensor | None = None


@triton.jit
def _whole(number):
    """The nearest integer of a float32, ties to even, as far as 2^21; beyond that, 2^21."""
    return (tl.minimum(tl.maximum(number, -_FAR), _FAR) + _ROUND) - _ROUND


@triton.jit
def _four(number):
    """The nearest e2m1 number."""
    size = tl.minimum(tl.abs(number), 6.0)
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    size = ((size / step + _ROUND) - _ROUND) * step
    return tl.where(number < 0.0, -size, size)


@triton.jit(do_not_specialize=["R", "COUNT", "stride_r", "stride_f"])
def channels_kernel(
    targets,
    weights,
    errors,
    factors,
    scales,
    zeros,
    group_of,
    values,
    midpoints,
    R,
    COUNT,
    stride_r,
    stride_f,
    low,
    high,
    center,
    KIND: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    DOWN: tl.constexpr,
    BB: tl.constexpr,
    BR: tl.constexpr,
):
    """targets [B, R] become what they are rounded to, in units of the scale; errors weight - value.

    Channel i adds factors[i, j] · its error to the target of every channel j that comes after it.
    """
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    channels = tl.arange(0, BB)
    inside = rows < R
    tile = (channels[:, None] < COUNT) & inside[None, :]
    places = channels[:, None].to(tl.int64) * stride_r + rows[None, :]
    pending = tl.load(targets + places, mask=tile, other=0.0)
    if KIND == "table":
        borders = tl.load(midpoints + tl.arange(0, 16))
    for step in range(COUNT):
        if DOWN:
            i = COUNT - 1 - step
            later = channels < i
        else:
            i = step
            later = (channels > i) & (channels < COUNT)
        place = i.to(tl.int64) * stride_r + rows
        weight = tl.load(weights + place, mask=inside, other=0.0)
        group = tl.load(group_of + i).to(tl.int64)
        scale = tl.load(scales + group * R + rows, mask=inside, other=1.0)
        factor = tl.load(factors + i.to(tl.int64) * stride_f + channels, mask=later, other=0.0)
        if HAS_ZERO:
            zero = tl.load(zeros + group * R + rows, mask=inside, other=0.0)
        target = tl.sum(tl.where((channels == i)[:, None], pending, 0.0), axis=0)
        if KIND == "int":
            unit = _whole(tl.div_rn(target, scale))
            if HAS_ZERO:
                unit = tl.minimum(tl.maximum(unit, low - zero), high - zero)
            else:
                unit = tl.minimum(tl.maximum(unit, low - center), high - center)
            value = unit * scale
        elif KIND == "block":
            if HAS_ZERO:
                target = target - zero
            none = scale == 0.0
            inverse = tl.where(none, 0.0, tl.div_rn(1.0, tl.where(none, 1.0, scale)))
            unit = tl.minimum(tl.maximum(_whole(target * inverse) + center, low), high)
            value = (unit - center) * scale
            if HAS_ZERO:
                value = value + zero
        elif KIND == "table":
            # As a literal it would be a float64, because it is below the normal float32.
            least = tl.full((BR,), 1e-38, tl.float32)
            share = target * tl.div_rn(1.0, tl.maximum(scale, least))
            index = tl.sum((share[:, None] > borders[None, :]).to(tl.int32), axis=1)
            unit = tl.load(values + index)
            value = unit * scale
        elif KIND == "e2m1":
            unit = _four(tl.div_rn(target, scale))
            value = unit * scale
        else:
            number = tl.div_rn(target, scale)
            unit = round_e4m3(tl.minimum(tl.maximum(number, -high), high))
            value = unit * scale
        error = weight - value
        tl.store(targets + place, unit, mask=inside)
        tl.store(errors + place, error, mask=inside)
        pending += factor[:, None] * error[None, :]


def solve(
    targets_BR: Tensor,
    weights_BR: Tensor,
    errors_BR: Tensor,
    factors_BB: Tensor,
    grid: Grid,
    scales_GR: Tensor,
    zeros_GR: Tensor | None,
    groups_B: Tensor,
    *,
    down: bool,
) -> None:
    """Rounds at most 128 channels in their order, or with `down` from the last to the first.

    targets, weights, errors float32 [B, R] whose rows lie equally far apart; targets receive what
    they are rounded to (Grid says in which units), errors weight - value.  factors float32 [B, B]:
    row i is what the channels after i take of its error.  scales, zeros float32 [G, R], contiguous;
    groups int32 [B].
    """
    count, rows = targets_BR.shape
    assert count <= MOST and scales_GR.is_contiguous() and groups_B.dtype == torch.int32
    assert targets_BR.stride() == weights_BR.stride() == errors_BR.stride()
    assert targets_BR.stride(1) == factors_BB.stride(1) == 1
    channels_kernel[(triton.cdiv(rows, _ROWS),)](
        targets_BR,
        weights_BR,
        errors_BR,
        factors_BB,
        scales_GR,
        scales_GR if zeros_GR is None else zeros_GR,
        groups_B,
        scales_GR if grid.values is None else grid.values,
        scales_GR if grid.midpoints is None else grid.midpoints,
        rows,
        count,
        targets_BR.stride(0),
        factors_BB.stride(0),
        grid.low,
        grid.high,
        grid.center,
        KIND=grid.kind,
        HAS_ZERO=zeros_GR is not None,
        DOWN=down,
        BB=max(16, triton.next_power_of_2(count)),
        BR=_ROWS,
        num_warps=_WARPS,
    )
