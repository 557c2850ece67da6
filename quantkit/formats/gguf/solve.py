"""Weights on the grids of ggml's blocks: scales by weighted least squares, codes by GPTQ.

Shapes: O out features, I in features, N blocks of B weights, G groups in a block, g weights in a
group; Q = N·G groups in all.

A block's grid is fitted to a diagonal importance as llama.cpp fits it: candidates of the scale, a
least-squares refit of scale and minimum for each (Kawrakow, make_qkx3_quants and make_qx_quants in
ggml-quants.c).  Differences: the integer scales are refitted to the codes they end up with, and
`d` and `m` of a super-block by least squares over all its weights; the importance is what an error
costs after GPTQ's corrections (see ranges/weighted_mse.py); codes are then chosen by GPTQ on that
grid, which sees how channels move together and not only how large they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats.gguf.blocks import Blocks, BlockType
from quantkit.methods.feedback import Feedback, feedback_of, pivots
from quantkit.methods.stats import Stats

# Damping of the Gram matrix, as a part of its mean diagonal; GPTQ's default.
DAMP = 0.01
# Candidates of a group's scale on both sides of the full range, in codes, and their distance.
_REACH, _STEP = 1.0, 0.1
# Refits of scales to codes and codes to scales.
_ROUNDS = 3
# Weights fitted at a time: some copies stay in the cache, and none is so large that the system has
# to be asked for it anew.
FIT_WEIGHTS = 1 << 17
# Channels between two updates of the remaining weights.
_BLOCK = 128
_TINY = 1e-30
_HALF_MAX = 65504.0


@dataclass(frozen=True, kw_only=True)
class SolvedBlocks:
    """A weight [O, I] as blocks in row order; `degraded` says what had to be done instead."""

    blocks: Blocks
    shape: tuple[int, int]
    degraded: str | None

    def dequantize(self) -> Tensor:
        """Float32 [O, I], as ggml decodes it."""
        return self.blocks.values().view(self.shape)


def solve_blocks(weight_OI: Tensor, kind: BlockType, stats: Stats | None) -> SolvedBlocks:
    """The float32 weight on the grid of a block type.

    With the full Gram matrix in `stats` codes are GPTQ's; without statistics they are the nearest
    ones, and every weight counts alike.
    """
    feedback, degraded = None, None
    importance = torch.ones(weight_OI.shape[1])
    if stats is not None and stats.count == 0:
        degraded = "rounded to nearest: no calibration token reached this weight"
    elif stats is not None:
        found = pivots(stats, damp=DAMP, act_order=True)
        feedback = feedback_of(stats, damp=DAMP, act_order=True, keep=True)
        if found is None:
            degraded = "rounded to nearest: the Gram matrix has no Cholesky factor, even damped"
            found = stats.mean_sq
        importance = found / found.mean().clamp(min=_TINY) + 1e-6
    blocks = fit(weight_OI, kind, importance)
    if feedback is not None:
        codes = gptq_codes(weight_OI, blocks, feedback)
        blocks = Blocks(
            kind=kind, codes=codes, d=blocks.d, m=blocks.m, scales=blocks.scales, mins=blocks.mins
        )
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    return SolvedBlocks(blocks=blocks, shape=shape, degraded=degraded)


def fit(weight_OI: Tensor, kind: BlockType, importance_I: Tensor) -> Blocks:
    """Blocks of least weighted squared error found, codes the nearest on their grid."""
    rows, columns = weight_OI.shape
    assert columns % kind.size == 0, "gguf_recipe chooses types that divide the rows"
    step = max(1, FIT_WEIGHTS // columns)
    parts = []
    weights_1I = importance_I.view(1, -1)
    for start in range(0, rows, step):
        part = weight_OI[start : start + step]
        x = part.reshape(-1, kind.groups, kind.group_size)
        # As in llama.cpp, large weights matter a bit more than the channel alone says.
        size = part.square().view(len(part), -1, kind.size).mean(-1, keepdim=True)
        factor = (size + part.square().view(len(part), -1, kind.size)).sqrt()
        w = (weights_1I * factor.view(len(part), columns)).reshape(x.shape)
        parts.append(_fit_chunk(x, w, kind))
    return Blocks(
        kind=kind,
        codes=torch.cat([part.codes for part in parts]),
        d=torch.cat([part.d for part in parts]),
        m=_joined([part.m for part in parts]),
        scales=_joined([part.scales for part in parts]),
        mins=_joined([part.mins for part in parts]),
    )


def _fit_chunk(x: Tensor, w: Tensor, kind: BlockType) -> Blocks:
    """x, w: [N, G, g]."""
    if kind.minimum:
        scale, low = _search_minimum(x, w, 2**kind.bits - 1)
    else:
        scale, low = _search_centered(x, w, kind), torch.zeros_like(x[..., 0])
    best: Blocks | None = None
    best_cost = torch.empty(0)
    for _ in range(_ROUNDS):
        grid = _store(scale, low, kind)
        codes = _nearest(x, grid)
        grid = _refit_outer(x, w, codes, grid)
        found = _with_codes(grid, _nearest(x, grid))
        cost = ((found.values().view(x.shape) - x).square() * w).sum((1, 2))
        best, best_cost = (found, cost) if best is None else _better(best, best_cost, found, cost)
        codes = found.codes.view(x.shape).to(torch.float32) - kind.center
        scale, low = _least_squares(x, w, codes, minimum=kind.minimum)
    assert best is not None
    return best


def _search_minimum(x: Tensor, w: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum (<= 0) of each group, [N, G] each: value = scale·code + minimum."""
    lowest = x.amin(-1, keepdim=True).clamp(max=0.0)
    extent = (x.amax(-1, keepdim=True) - lowest).clamp(min=_TINY)
    best_scale, best_low = extent[..., 0] / high, lowest[..., 0]
    best = torch.full_like(best_scale, torch.inf)
    steps = int(2 * _REACH / _STEP) + 1
    for index in range(-1, steps):
        # The first candidate is the full range itself.
        reach = high if index < 0 else high - _REACH + _STEP * index
        codes = ((x - lowest) * (reach / extent)).round_().clamp_(0, high)
        scale, low = _least_squares(x, w, codes, minimum=True)
        cost = ((scale[..., None] * codes + low[..., None] - x).square() * w).sum(-1)
        better = cost < best
        best = torch.where(better, cost, best)
        best_scale = torch.where(better, scale, best_scale)
        best_low = torch.where(better, low, best_low)
    return best_scale, best_low


def _search_centered(x: Tensor, w: Tensor, kind: BlockType) -> Tensor:
    """Scale of each group [N, G], negative where the largest weight is positive."""
    half = kind.center
    place = x.abs().argmax(-1, keepdim=True)
    largest = x.gather(-1, place)
    largest = torch.where(largest == 0, torch.full_like(largest, _TINY), largest)
    best_scale = largest[..., 0] / -half
    best = torch.full_like(best_scale, torch.inf)
    steps = int(2 * _REACH / _STEP) + 1
    for index in range(-1, steps):
        reach = half if index < 0 else half - _REACH + _STEP * index
        codes = (x * (-reach / largest)).round_().clamp_(-half, half - 1)
        scale, _ = _least_squares(x, w, codes, minimum=False)
        cost = ((scale[..., None] * codes - x).square() * w).sum(-1)
        better = cost < best
        best = torch.where(better, cost, best)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def _least_squares(x: Tensor, w: Tensor, codes: Tensor, *, minimum: bool) -> tuple[Tensor, Tensor]:
    """(scale, minimum) [N, G] that fit x to scale·codes + minimum; the minimum is at most 0."""
    weighted = w * codes
    squares, products = (weighted * codes).sum(-1), (weighted * x).sum(-1)
    plain = products / squares.clamp(min=_TINY)
    if not minimum:
        return plain, torch.zeros_like(plain)
    total, sums, values = w.sum(-1), weighted.sum(-1), (w * x).sum(-1)
    determinant = total * squares - sums * sums
    usable = determinant > 1e-9 * (total * squares).clamp(min=_TINY)
    safe = torch.where(usable, determinant, torch.ones_like(determinant))
    scale = (total * products - sums * values) / safe
    low = (squares * values - sums * products) / safe
    # One code for all, or a minimum above zero: no minimum at all.
    only = ~usable | (low > 0) | (scale <= 0)
    flat = (values / total.clamp(min=_TINY)).clamp(max=0.0)
    one_code = squares <= _TINY
    scale = torch.where(only, plain.clamp(min=0.0), scale)
    low = torch.where(only, torch.where(one_code, flat, torch.zeros_like(low)), low)
    return scale, low


def _store(scale: Tensor, low: Tensor, kind: BlockType) -> Blocks:
    """The block's stored numbers nearest to these scales and minima [N, G]; codes are zeros."""
    count = len(scale)
    codes = torch.zeros(count, kind.size, dtype=torch.uint8)
    if not kind.super_block:
        minimum = _half(low[:, 0]) if kind.minimum else None
        return Blocks(kind=kind, codes=codes, d=_half(scale[:, 0]), m=minimum)
    if kind.signed_scale:
        top = 2 ** (kind.scale_bits - 1)
        place = scale.abs().argmax(1, keepdim=True)
        d = _half(scale.gather(1, place)[:, 0] / -top)
        scales = _integers(scale, d, -top, top - 1)
        return Blocks(kind=kind, codes=codes, d=d, scales=scales)
    top = 2**kind.scale_bits - 1
    d, m = _half(scale.amax(1) / top), _half(-low.amin(1) / top)
    return Blocks(
        kind=kind,
        codes=codes,
        d=d,
        m=m,
        scales=_integers(scale, d, 0, top),
        mins=_integers(-low, m, 0, top),
    )


def _refit_outer(x: Tensor, w: Tensor, codes: Tensor, grid: Blocks) -> Blocks:
    """`d` and `m` by least squares over the block's weights, all integers as they are."""
    kind = grid.kind
    if not kind.super_block:
        centered = codes.view(x.shape).to(torch.float32) - kind.center
        scale, low = _least_squares(x, w, centered, minimum=kind.minimum)
        return _store(scale, low, kind)
    assert grid.scales is not None
    a = (codes.view(x.shape).to(torch.float32) - kind.center) * grid.scales[..., None].float()
    aa, ax = (w * a * a).sum((1, 2)), (w * a * x).sum((1, 2))
    if grid.mins is None:
        d = torch.where(aa > _TINY, ax / aa.clamp(min=_TINY), grid.d.float())
        return Blocks(kind=kind, codes=grid.codes, d=_half(d), scales=grid.scales)
    assert grid.m is not None
    b = -grid.mins[..., None].float().expand_as(x)
    bb, ab, bx = (w * b * b).sum((1, 2)), (w * a * b).sum((1, 2)), (w * b * x).sum((1, 2))
    determinant = aa * bb - ab * ab
    usable = determinant > 1e-6 * (aa * bb).clamp(min=_TINY)
    safe = torch.where(usable, determinant, torch.ones_like(determinant))
    d = torch.where(usable, (bb * ax - ab * bx) / safe, grid.d.float())
    m = torch.where(usable, (aa * bx - ab * ax) / safe, grid.m.float())
    sane = (d > 0) & (m >= 0)
    d, m = torch.where(sane, d, grid.d.float()), torch.where(sane, m, grid.m.float())
    return Blocks(
        kind=kind, codes=grid.codes, d=_half(d), m=_half(m), scales=grid.scales, mins=grid.mins
    )


def _nearest(x: Tensor, grid: Blocks) -> Tensor:
    """Codes uint8 [N, B]."""
    kind = grid.kind
    scale, low = steps_and_minima(grid)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)[..., None]
    codes = ((x - low[..., None]) / safe).round_().add_(kind.center)
    codes = torch.where(scale[..., None] == 0, torch.full_like(codes, kind.center), codes)
    return codes.clamp_(0, 2**kind.bits - 1).to(torch.uint8).view(len(x), kind.size)


def steps_and_minima(grid: Blocks) -> tuple[Tensor, Tensor]:
    """What a code's step is worth, and the minimum, float32 [N, G] each."""
    d = grid.d.float()[:, None]
    scale = d if grid.scales is None else d * grid.scales.float()
    scale = scale.expand(-1, grid.kind.groups)
    if grid.m is None:
        return scale, torch.zeros_like(scale)
    m = grid.m.float()[:, None]
    low = m if grid.mins is None else -(m * grid.mins.float())
    return scale, low.expand(-1, grid.kind.groups)


def gptq_codes(weight_OI: Tensor, grid: Blocks, feedback: Feedback) -> Tensor:
    """Codes uint8 [N, B] on the grid: channels one after the other, errors fed forward.

    The LDLQ form of GPTQ, as in rounding/gptq.py; the grid's steps and minima stay as they are.
    """
    kind, (rows, columns) = grid.kind, weight_OI.shape
    scale, low = (part.reshape(rows, -1).t() for part in steps_and_minima(grid))
    dead = scale == 0
    inverse = torch.where(dead, torch.zeros_like(scale), 1 / torch.where(dead, 1.0, scale))
    weight = weight_OI.t()[feedback.order].contiguous()
    target = weight.clone()
    found = torch.empty(columns, rows, dtype=torch.uint8)
    error = torch.empty_like(weight)
    groups = (feedback.order // kind.group_size).tolist()
    high = float(2**kind.bits - 1)
    for stop in range(columns, 0, -_BLOCK):
        start = max(stop - _BLOCK, 0)
        for index in range(stop - 1, start - 1, -1):
            if index + 1 < stop:
                factors = feedback.lower[index + 1 : stop, index]
                target[index].addmv_(error[index + 1 : stop].t(), factors)
            group = groups[index]
            codes = (target[index] - low[group]).mul_(inverse[group]).round_()
            codes.add_(kind.center).clamp_(0, high)
            value = (codes - kind.center).mul_(scale[group]).add_(low[group])
            torch.sub(weight[index], value, out=error[index])
            found[index] = codes.to(torch.uint8)
        if start:
            target[:start].addmm_(feedback.lower[start:stop, :start].t(), error[start:stop])
    codes = torch.empty_like(found)
    codes[feedback.order] = found
    return codes.t().contiguous().view(-1, kind.size)


def _better(one: Blocks, cost: Tensor, other: Blocks, other_cost: Tensor) -> tuple[Blocks, Tensor]:
    """Block by block the cheaper of the two, and its cost [N]."""
    take = other_cost < cost

    def pick(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            return None
        return torch.where(take.view(-1, *[1] * (a.ndim - 1)), b, a)

    codes, d = pick(one.codes, other.codes), pick(one.d, other.d)
    assert codes is not None and d is not None
    picked = Blocks(
        kind=one.kind,
        codes=codes,
        d=d,
        m=pick(one.m, other.m),
        scales=pick(one.scales, other.scales),
        mins=pick(one.mins, other.mins),
    )
    return picked, torch.minimum(cost, other_cost)


def _with_codes(grid: Blocks, codes: Tensor) -> Blocks:
    return Blocks(
        kind=grid.kind, codes=codes, d=grid.d, m=grid.m, scales=grid.scales, mins=grid.mins
    )


def _integers(values: Tensor, unit: Tensor, low: int, high: int) -> Tensor:
    """values [N, G] in multiples of unit [N], int8."""
    divisor = unit.float()[:, None]
    divisor = torch.where(divisor == 0, torch.full_like(divisor, torch.inf), divisor)
    return (values / divisor).round_().clamp_(low, high).to(torch.int8)


def _half(values: Tensor) -> Tensor:
    return values.clamp(-_HALF_MAX, _HALF_MAX).half()


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None
