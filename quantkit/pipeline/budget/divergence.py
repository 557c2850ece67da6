"""KL divergence of many models' next tokens to one, from what reaches the head.

The head is read in ranges of its rows, once; sums run over the vocabulary as it comes.
Letters: S tokens, V rows of the vocabulary, R of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.model.causal import CausalModel

_LOGIT_BYTES = 32 * 2**20


@dataclass(kw_only=True)
class _Sums:
    """Over the rows so far, float64 [S]: log Σ exp z, and Σ exp(p - top) (p - z)."""

    log_sum: Tensor
    moment: Tensor


@dataclass(kw_only=True)
class _Batch:
    """Of one batch: the base's largest logits and log Σ exp so far [S], and the others' sums."""

    top: Tensor
    base: Tensor
    others: list[_Sums]

    @classmethod
    def empty(cls, tokens: int, others: int) -> _Batch:
        """Before the first row."""
        lowest = torch.full((tokens,), -torch.inf, dtype=torch.float64)
        sums = [_Sums(log_sum=lowest, moment=torch.zeros_like(lowest)) for _ in range(others)]
        return cls(top=lowest, base=lowest, others=sums)


def mean_divergences(
    model: CausalModel,
    hidden: Callable[[int, int], Tensor],
    masks: Sequence[Tensor],
    others: int,
    heads: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
) -> list[float]:
    """KL(base || other) per token in nats, for each of the others.

    `hidden(k, batch)` is the last block's output [B, T, H] of model k, 0 being the base; `masks`
    has the counted tokens bool [B, T] of every batch; `heads[k]` makes of rows of the head [R, H]
    those that model k has.  Each row is read once.
    """
    heads = heads or {}
    rows = model.projection.shape[0]
    step = max(1, _LOGIT_BYTES // (4 * max(mask.numel() for mask in masks)))
    states = [_Batch.empty(int(mask.sum()), others) for mask in masks]
    for start in range(0, rows, step):
        rows_VH = model.head_rows(start, min(start + step, rows))
        changed = {k: change(rows_VH) for k, change in heads.items()}
        for batch, (mask, state) in enumerate(zip(masks, states, strict=True)):
            p_SV = _logits(model, hidden(0, batch), rows_VH, start, mask)
            now = torch.maximum(state.top, p_SV.amax(1).double())
            shrink = (state.top - now).exp()
            weight_SV = (p_SV - now[:, None].float()).exp()
            state.base = torch.logaddexp(state.base, p_SV.logsumexp(1).double())
            for k, each in enumerate(state.others, start=1):
                own = changed.get(k, rows_VH)
                z_SV = _logits(model, hidden(k, batch), own, start, mask)
                moved = (weight_SV * (p_SV - z_SV)).sum(1, dtype=torch.float64)
                each.moment = each.moment * shrink + moved
                each.log_sum = torch.logaddexp(each.log_sum, z_SV.logsumexp(1).double())
            state.top = now
    totals = torch.zeros(others, dtype=torch.float64)
    for state in states:
        for k, each in enumerate(state.others):
            kl = each.moment * (state.top - state.base).exp() + each.log_sum - state.base
            totals[k] += kl.sum()
    return (totals / sum(int(mask.sum()) for mask in masks)).tolist()


def _logits(
    model: CausalModel, hidden_BTH: Tensor, rows_VH: Tensor, start: int, mask_BT: Tensor
) -> Tensor:
    """Logits [S, V] of the counted tokens for some rows of the vocabulary, float32."""
    found = model.partial_logits(hidden_BTH.to(model.device), rows_VH, start)
    return found.cpu()[mask_BT].to(torch.float32)
