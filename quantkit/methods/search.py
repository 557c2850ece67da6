"""The search that ranges share: shrink each group's extent, keep what costs least.

Shapes: R rows, G groups per row, B weights per group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.methods.extent import (
    Extent,
    aligned,
    chunks,
    extent_of,
    group_range,
    pooled,
    scale_and_zero,
)
from quantkit.methods.parts import GroupRange, Work
from quantkit.methods.stats import Stats
from quantkit.numbers.grid import grid_of
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

# Costs [R, G] of the errors [R, G, B] made in the chunk `rows`; it may overwrite the errors.
Cost = Callable[[slice, "Tensor"], "Tensor"]
# The extent of a candidate, from the full extent and the candidate's factor.
Shrink = Callable[[Extent, float], Extent]


def shrink_factors(steps: int, shrink: float) -> list[float]:
    """`steps` factors 1, 1 - shrink/steps, ..; ValueError unless steps >= 1 and 0 <= shrink < 1."""
    if steps < 1 or not 0 <= shrink < 1:
        raise ValueError(f"steps {steps}, shrink {shrink}: need steps >= 1 and 0 <= shrink < 1")
    return [1 - shrink * step / steps for step in range(steps)]


def both_ends(extent: Extent, factor: float) -> Extent:
    """Both ends of the extent times the factor."""
    return Extent(low=extent.low * factor, high=extent.high * factor)


def clip_magnitude(extent: Extent, factor: float) -> Extent:
    """The extent of weights clipped to ± factor times their largest magnitude."""
    limit = extent.magnitude * factor
    return Extent(low=torch.maximum(extent.low, -limit), high=torch.minimum(extent.high, limit))


def search_range(
    weight_OI: Tensor,
    scheme: Scheme,
    factors: Sequence[float],
    cost: Cost,
    shrink: Shrink = both_ends,
    degraded: str | None = None,
) -> GroupRange:
    """Scale and zero of each group with the least cost among the factors; the first wins ties.

    If there is a choice, floats that share coarse scales have their own: see `_steps_of`.
    """
    grid = grid_of(scheme)
    factors = _steps_of(scheme, factors)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for rows, groups in chunks(weight_OI, scheme):
        full = extent_of(groups)
        least = scale = zero = None
        for factor in factors:
            new_scale, new_zero = scale_and_zero(shrink(full, factor), scheme)
            errors = grid.snap(groups, new_scale, new_zero).sub_(groups)
            new_cost = pooled(cost(rows, errors), scheme, torch.linalg.vector_norm)
            if least is None or scale is None:
                least, scale, zero = new_cost, new_scale, new_zero
                continue
            better = (new_cost < least)[..., None]
            least = torch.minimum(least, new_cost)
            scale = torch.where(better, new_scale, scale)
            if zero is not None and new_zero is not None:
                zero = torch.where(better, new_zero, zero)
        assert scale is not None
        scales.append(scale[..., 0])
        if zero is not None:
            zeros.append(zero[..., 0])
    return group_range(
        torch.cat(scales),
        torch.cat(zeros) if zeros else None,
        scheme,
        straddling=not aligned(weight_OI, scheme),
        degraded=degraded,
    )


def search_work(steps: int, rows: int, columns: int, scheme: Scheme, *, quadratic: bool) -> Work:
    """The work of `search_range` with so many factors and such a cost."""
    group = scheme.group_size or columns
    products = 2.0 * rows * columns * group if quadratic else 0.0
    return Work(products=steps * products, passes=steps * 10.0 * rows * columns)


def _steps_of(scheme: Scheme, factors: Sequence[float]) -> Sequence[float]:
    """The factors to try: those given, or what the scheme's scales can tell apart.

    A power of two has two neighbours.  Scales of nvfp4 lie a sixteenth to an eighth apart; they may
    also cover more than the largest weight, which then becomes 4 instead of 6 (a step above 4 is
    twice as wide as those below; Cook et al. 2025, https://arxiv.org/abs/2512.02010), or even 3.
    """
    if len(factors) == 1:
        return factors
    if scheme.kind in ("mxfp4", "mxfp8"):
        return (1.0, 2.0, 0.5)
    if scheme.kind == "nvfp4":
        return (*factors, *(1 + step / 16 for step in range(1, 17)))
    return factors


def squared(importance: Tensor | None = None) -> Cost:
    """Root of the sum of squared errors, weighted by `importance` [G, B] (or [N, 1, B])."""
    if importance is None:
        return lambda rows, errors: torch.linalg.vector_norm(errors, dim=-1)
    root = importance.sqrt()
    if importance.ndim == 3:
        return lambda rows, errors: torch.linalg.vector_norm(errors.mul_(root[rows]), dim=-1)
    return lambda rows, errors: torch.linalg.vector_norm(errors.mul_(root), dim=-1)


def quadratic(gram_GBB: Tensor) -> Cost:
    """d·H·dᵀ per row and group, H being the group's block of the Gram matrix."""

    def cost(rows: slice, errors: Tensor) -> Tensor:
        by_group = errors.transpose(0, 1)
        return torch.bmm(by_group, gram_GBB).mul_(by_group).sum(-1).t()

    return cost


def gram_blocks(stats: Stats, size: int) -> Tensor:
    """The Gram matrix's diagonal blocks [I/size, size, size], scaled to a mean diagonal of 1."""
    assert stats.gram is not None
    gram = stats.gram
    if gram.ndim == 2:
        gram = gram[None]
    inner = gram.shape[-1]
    assert inner % size == 0, "the blocks gathered hold whole groups"
    parts = gram.view(gram.shape[0], inner // size, size, inner // size, size)
    blocks = parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, size, size)
    mean = blocks.diagonal(dim1=1, dim2=2).mean()
    return blocks / mean.clamp(min=torch.finfo(torch.float32).tiny)
