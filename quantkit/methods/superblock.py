"""Scales and minima of ggml's blocks: weighted least squares, then codes on that grid.

Shapes: O out features, I in features, N blocks of B weights, G groups in a block, g weights in a
group; Q = N·G groups in all.

A block's grid is fitted to a diagonal importance as llama.cpp fits it: candidates of the scale, a
least-squares refit of scale and minimum for each (Kawrakow, make_qkx3_quants and make_qx_quants in
ggml-quants.c).  Differences: the integer scales are refitted to the codes they end up with, and
`d` and `m` of a super-block by least squares over all its weights; the importance is what the range
of the recipe says (with GPTQ: what an error costs after its corrections, see
ranges/weighted_mse.py); codes are chosen by the recipe's rounding on that grid.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.methods.parts import GroupRange
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.superblock import BLOCK_TYPES, Blocks, BlockScale, BlockType

if TYPE_CHECKING:
    from torch import Tensor

# Candidates of a group's scale on both sides of the full range, in codes, and their distance.
_REACH, _STEP = 1.0, 0.1
# Refits of scales to codes and codes to scales.
_ROUNDS = 3
# Weights fitted at a time: some copies stay in the cache, and none is so large that the system has
# to be asked for it anew.
FIT_WEIGHTS = 1 << 17
# Float32 copies of the blocks that are fitted at a time.
_FIT_COPIES = 16
# Weights that a fit is timed with.
_TIMED_WEIGHTS = 1 << 18
_TINY = 1e-30
_HALF_MAX = 65504.0


def fit_range(
    weight_OI: Tensor, scheme: Scheme, importance_I: Tensor | None, degraded: str | None = None
) -> GroupRange:
    """Scales and minima of a float32 weight on a block type's grid, as a range answers.

    `importance_I` float32: what a squared error of each channel costs, its mean about 1; None:
    every channel alike.
    """
    assert scheme.block is not None
    kind = BLOCK_TYPES[scheme.block.upper()]
    if importance_I is None:
        importance_I = torch.ones(weight_OI.shape[1])
    scale = BlockScale.of(fit(weight_OI, kind, importance_I), len(weight_OI))
    steps = scale.values()
    return GroupRange(scale=scale, zero=scale.minima(), coding=steps, degraded=degraded)


def relative_importance(importance_I: Tensor) -> Tensor:
    """What a squared error of each channel costs, in parts of the mean, float32 [I].

    Channels never active keep a little, so that their ranges still fit their weights.
    """
    return importance_I / importance_I.mean().clamp(min=_TINY) + 1e-6


def working_bytes(rows: int, columns: int) -> int:
    """Memory for fitting a weight beside the weight itself."""
    return 4 * _FIT_COPIES * max(columns, min(rows * columns, FIT_WEIGHTS))


def seconds_per_weight(scheme: Scheme) -> float:
    """What fitting takes here: a quarter of a second's trial."""
    assert scheme.block is not None
    weight = torch.randn(_TIMED_WEIGHTS // 1024, 1024, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    fit(weight, BLOCK_TYPES[scheme.block.upper()], torch.ones(1024))
    return (time.perf_counter() - began) / _TIMED_WEIGHTS


def fit(weight_OI: Tensor, kind: BlockType, importance_I: Tensor) -> Blocks:
    """Blocks of least weighted squared error found, codes the nearest on their grid."""
    rows, columns = weight_OI.shape
    assert columns % kind.size == 0, "the format's supports_shape comes first"
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
