"""The triangular error feedback of GPTQ, from a Gram matrix.

Shapes: I in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.methods.stats import Stats

if TYPE_CHECKING:
    from torch import Tensor

# Damping, as parts of the mean diagonal, is raised by this factor up to this limit.
_RAISE, _LIMIT = 10.0, 1.0


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """How the error of one channel is made up for by the channels rounded after it.

    order   int64 [I]: channels from the last rounded to the first
    lower   float32 [I, I], unit lower triangular in that order: channel b adds, before it is
            rounded, the sum over a > b of lower[a, b] · (weight - value) of channel a
    loss    float32 [I], in that order: what one squared rounding error of the channel costs
    damp    the damping that made the factorisation succeed
    double  True if it took float64
    """

    order: Tensor
    lower: Tensor
    loss: Tensor
    damp: float
    double: bool


@dataclass(frozen=True, kw_only=True)
class _Kept:
    damp: float
    act_order: bool
    feedback: Feedback | None


def feedback_of(stats: Stats, *, damp: float, act_order: bool, keep: bool) -> Feedback | None:
    """`factorize` of the statistics' Gram matrix.

    With `keep` the result waits in `stats.factor`, so that ranges and a rounding with the same
    options share one factorisation; a call without `keep` takes it away.
    """
    assert stats.gram is not None and stats.gram.ndim == 2
    kept = stats.factor
    if not isinstance(kept, _Kept) or (kept.damp, kept.act_order) != (damp, act_order):
        stats.factor = kept = None
        found = factorize(stats.gram, damp=damp, act_order=act_order)
        kept = _Kept(damp=damp, act_order=act_order, feedback=found)
    stats.factor = kept if keep else None
    return kept.feedback


def pivots(stats: Stats, *, damp: float, act_order: bool) -> Tensor | None:
    """What a squared rounding error of each channel costs under GPTQ, float32 [I]; see Feedback."""
    feedback = feedback_of(stats, damp=damp, act_order=act_order, keep=True)
    if feedback is None:
        return None
    found = torch.empty_like(feedback.loss)
    found[feedback.order] = feedback.loss
    return found


def factorize(gram_II: Tensor, *, damp: float, act_order: bool) -> Feedback | None:
    """The feedback of a Gram matrix; None if no damping up to the limit makes it definite.

    GPTQ (Frantar et al. 2022) takes the Cholesky factor of the inverse Hessian.  With the channels
    in reverse, the factor of the Hessian itself gives the same updates (LDLQ; Chee et al. 2023,
    https://arxiv.org/abs/2307.13304, theorem 6): no inverse, a quarter of the work.

    Memory: two matrices of the Gram matrix's size at the peak.
    """
    diagonal = torch.diagonal(gram_II).to(torch.float32)
    if act_order:
        order = torch.argsort(diagonal, stable=True)
    else:
        order = torch.arange(diagonal.numel() - 1, -1, -1, device=gram_II.device)
    dead = diagonal <= 0
    mean = float(diagonal.sum(dtype=torch.float64)) / max(int((~dead).sum()), 1)
    if mean <= 0:
        mean = 1.0
    for double in (False, True):
        raised = damp if not double else max(damp, _LIMIT)
        while True:
            found = _attempt(gram_II, order, dead, mean, raised, double)
            if found is not None:
                lower, loss = found
                return Feedback(order=order, lower=lower, loss=loss, damp=raised, double=double)
            if raised >= _LIMIT:
                break
            raised = min(max(raised, 1e-4) * _RAISE, _LIMIT)
    return None


def _attempt(
    gram_II: Tensor, order: Tensor, dead: Tensor, mean: float, damp: float, double: bool
) -> tuple[Tensor, Tensor] | None:
    work = gram_II[order][:, order]
    if double:
        work = work.to(torch.float64)
    work.div_(mean)
    # A channel that was never active weighs as much as the mean; its row is zero, so nothing else
    # is corrected for it.
    work.diagonal().add_(dead[order].to(work.dtype) + damp)
    lower, info = torch.linalg.cholesky_ex(work)
    if int(info) != 0:
        return None
    del work
    pivots = torch.diagonal(lower).clone()
    lower.div_(pivots)
    if not bool(torch.isfinite(lower).all()):
        return None
    return lower.to(torch.float32), (pivots**2).to(torch.float32)
