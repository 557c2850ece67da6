"""KL divergence of many models' next tokens to one, from what reaches the head.

The head is read in ranges of its rows, once for each batch of tokens; sums run over the vocabulary
as it comes.
Letters: S tokens, V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def mean_divergences(
    model: CausalModel, hidden: Callable[[int, int], Tensor], masks: Sequence[Tensor], others: int
) -> list[float]:
    """KL(base || other) per token in nats, for each of the others.

    `hidden(k, batch)` is the last block's output [B, T, H] of model k, 0 being the base; `masks`
    has the counted tokens bool [B, T] of every batch.
    """
    totals = torch.zeros(others, dtype=torch.float64)
    rows = model.head.shape[0]
    for batch, mask in enumerate(masks):
        step = max(1, _LOGIT_BYTES // (4 * mask.numel()))
        top = torch.full((int(mask.sum()),), -torch.inf, dtype=torch.float64)
        base = torch.full_like(top, -torch.inf)
        sums = [_Sums(log_sum=base.clone(), moment=torch.zeros_like(top)) for _ in range(others)]
        for start in range(0, rows, step):
            rows_VH = model.head_rows(start, min(start + step, rows))
            p_SV = _logits(model, hidden(0, batch), rows_VH, start, mask)
            now = torch.maximum(top, p_SV.amax(1).double())
            shrink = (top - now).exp()
            weight_SV = (p_SV - now[:, None].float()).exp()
            base = torch.logaddexp(base, p_SV.logsumexp(1).double())
            for k, each in enumerate(sums):
                z_SV = _logits(model, hidden(k + 1, batch), rows_VH, start, mask)
                moved = (weight_SV * (p_SV - z_SV)).sum(1, dtype=torch.float64)
                each.moment = each.moment * shrink + moved
                each.log_sum = torch.logaddexp(each.log_sum, z_SV.logsumexp(1).double())
            top = now
        for k, each in enumerate(sums):
            kl = each.moment * (top - base).exp() + each.log_sum - base
            totals[k] += kl.sum()
    return (totals / sum(int(mask.sum()) for mask in masks)).tolist()


def _logits(
    model: CausalModel, hidden_BTH: Tensor, rows_VH: Tensor, start: int, mask_BT: Tensor
) -> Tensor:
    """Logits [S, V] of the counted tokens for some rows of the vocabulary, float32."""
    found = model.partial_logits(hidden_BTH.to(model.device), rows_VH, start)
    return found.cpu()[mask_BT].to(torch.float32)
