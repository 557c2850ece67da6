"""Slow, obvious versions of what the methods do fast; tests compare the two.

Letters: O out features, I in features, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantkit.methods.stats import Needs, Stats
from quantkit.numbers.grid import CodebookGrid, grid_of
from quantkit.numbers.scheme import Scheme


def stats_of(x_TI: Tensor, *, batches: int = 1) -> Stats:
    """Everything a part may read, of these tokens."""
    stats = Stats.empty(x_TI.shape[1], Needs(moments=True, gram=-1, sample=True))
    for part in x_TI.chunk(batches):
        stats.update_(part, name="x")
    stats.finish_()
    return stats


def activations(tokens: int, features: int, seed: int, *, spread: float = 0.5) -> Tensor:
    """Correlated activations [T, I] whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5
    sizes = (torch.randn(features, generator=generator) * spread).exp()
    return (
        torch.randn(tokens, features, generator=generator) @ (mix + torch.eye(features))
    ) * sizes


def weights(rows: int, columns: int, seed: int) -> Tensor:
    """A weight [O, I] of the size that linear layers have."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def snap_one(value: float, scheme: Scheme, scale: float, zero: float | None) -> tuple[int, float]:
    """Code and grid value nearest to one number."""
    grid = grid_of(scheme)
    if isinstance(grid, CodebookGrid):
        if scale == 0:
            return grid.values.index(0.0), 0.0
        code = min(range(16), key=lambda k: abs(grid.values[k] - value / scale))
        return code, grid.values[code] * scale
    shift = grid.center if zero is None else zero
    code = int(min(max(round(value / scale) + shift, grid.low), grid.high))
    return code, (code - shift) * scale


def decode(codes: Tensor, scheme: Scheme, scale_OG: Tensor, zero_OG: Tensor | None) -> Tensor:
    """Float64 values of codes, element by element."""
    grid = grid_of(scheme)
    rows, columns = codes.shape
    size = columns // scale_OG.shape[1]
    out = torch.zeros(rows, columns, dtype=torch.float64)
    for o in range(rows):
        for i in range(columns):
            code, scale = int(codes[o, i]), float(scale_OG[o, i // size])
            if isinstance(grid, CodebookGrid):
                out[o, i] = grid.values[code] * scale
            else:
                shift = grid.center if zero_OG is None else float(zero_OG[o, i // size])
                out[o, i] = (code - shift) * scale
    return out


def output_error(weight: Tensor, values: Tensor, x_TI: Tensor) -> float:
    """‖X(W - Ŵ)ᵀ‖² from the tokens themselves, in float64."""
    return float((x_TI.double() @ (weight.double() - values.double()).T).square().sum())


def gptq_codes(
    weight_OI: Tensor,
    gram_II: Tensor,
    scheme: Scheme,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    *,
    damp: float,
    act_order: bool,
) -> Tensor:
    """GPTQ column by column, float64, explicit inverse (Frantar et al. 2022, equations 2 and 3)."""
    rows, columns = weight_OI.shape
    size = columns // scale_OG.shape[1]
    hessian = gram_II.double().clone()
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if bool((~dead).any()) else diagonal.new_ones(())
    hessian.diagonal().add_(dead.double() * mean + damp * mean)
    order = list(range(columns))
    if act_order:
        order = torch.argsort(diagonal.float(), stable=True).flip(0).tolist()
    work = weight_OI.double().clone()
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    inverse = torch.linalg.inv(hessian)
    for position, i in enumerate(order):
        for o in range(rows):
            zero = None if zero_OG is None else float(zero_OG[o, i // size])
            code, value = snap_one(float(work[o, i]), scheme, float(scale_OG[o, i // size]), zero)
            codes[o, i] = code
            error = (work[o, i] - value) / inverse[i, i]
            left = order[position + 1 :]
            work[o, left] -= error * inverse[i, left]
        # Removes channel i from the inverse (equation 3): Gaussian elimination.
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1, :] / inverse[i, i]
    return codes


def best_factor(
    group: Tensor,
    scheme: Scheme,
    factors: Sequence[float],
    candidate: Callable[[Tensor, float], tuple[float, float | None]],
    cost: Callable[[Tensor], float],
) -> float:
    """The first factor of least cost for one group [B]; `candidate` gives its scale and zero."""
    costs = []
    for factor in factors:
        scale, zero = candidate(group, factor)
        values = [snap_one(float(w), scheme, scale, zero)[1] for w in group]
        costs.append(cost(torch.tensor(values, dtype=torch.float64) - group.double()))
    return factors[costs.index(min(costs))]
