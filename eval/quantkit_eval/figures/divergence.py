"""How far a quantized model's next-token distributions lie from its original's.

Shapes: N windows, S scored tokens of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_eval.figures.perplexity import Perplexity, exp, perplexity_of
from quantkit_eval.figures.scoring import PairScores, Scores
from quantkit_eval.figures.statistics import Interval, clustered_mean, wilson
from quantkit_eval.sequences import Workload

KL_SHARES = (0.5, 0.9, 0.95, 0.99, 0.999)
DELTA_SHARES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
_HISTOGRAM_LOW, _HISTOGRAM_HIGH, _BINS_PER_DECADE = -7, 1, 4
_WORST_TOKENS = 5


@dataclass(frozen=True, kw_only=True)
class Quantile:
    """A percentile over tokens, the nearest rank."""

    share: float
    value: float


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Share of tokens with a KL divergence in low..high; the first and last bins are open."""

    low: float
    high: float
    share: float


@dataclass(frozen=True, kw_only=True)
class RightToken:
    """Change of the probability given to the token that followed: quantized minus original.

    rms      root of the mean square, `rms_interval` from windows
    """

    mean: float
    mean_interval: Interval
    rms: float
    rms_interval: Interval
    lowest: float
    highest: float
    quantiles: tuple[Quantile, ...]


@dataclass(frozen=True, kw_only=True)
class WorstToken:
    """One of the tokens with the largest KL divergence: where it is and what both models said."""

    window: int
    position: int
    kl: float
    token: int
    best_original: int
    best_quantized: int


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL(original || quantized) per token in nats, and what it does to predictions.

    mean                 over tokens; intervals take windows, not tokens, as what varies
    top1_agreement       share of tokens with the same most likely next token
    perplexity_ratio     quantized / original, its interval from paired per-window differences
    """

    mean: float
    mean_interval: Interval
    quantiles: tuple[Quantile, ...]
    maximum: float
    histogram: tuple[Bin, ...]
    top1_agreement: float
    top1_interval: Interval
    perplexity: Perplexity
    perplexity_ratio: float
    perplexity_ratio_interval: Interval
    right_token: RightToken
    worst: tuple[WorstToken, ...]

    def quantile(self, share: float) -> float:
        """The KL divergence that this share of tokens does not exceed."""
        return next(q.value for q in self.quantiles if q.share == share)


def divergence_of(
    base: Scores, pair: PairScores, workload: Workload, windows: Sequence[int]
) -> Divergence:
    """The divergence over the sequences `windows` of the workload."""
    kl = _take(pair.kl, workload, windows)
    nll_base = _take(base.nll, workload, windows)
    nll_other = _take(pair.scores.nll, workload, windows)
    agreed = _take(base.best == pair.scores.best, workload, windows)
    change = nll_other.neg().exp() - nll_base.neg().exp()
    counts = torch.tensor([workload.sequences[k].count for k in windows])
    mean, interval = clustered_mean(_sums(kl, counts), counts)
    log_ratio, ratio = clustered_mean(_sums(nll_other - nll_base, counts), counts)
    hits = int(agreed.sum())
    return Divergence(
        mean=mean,
        mean_interval=interval,
        quantiles=_quantiles(kl, KL_SHARES),
        maximum=kl.max().item(),
        histogram=_histogram(kl),
        top1_agreement=hits / kl.numel(),
        top1_interval=wilson(hits, kl.numel()),
        perplexity=perplexity_of(pair.scores, workload, windows),
        perplexity_ratio=exp(log_ratio),
        perplexity_ratio_interval=Interval(low=exp(ratio.low), high=exp(ratio.high)),
        right_token=_right_token(change, counts),
        worst=_worst(kl, base, pair, workload, windows),
    )


def _take(scores: Tensor, workload: Workload, windows: Sequence[int]) -> Tensor:
    found = torch.cat([scores[workload.slice(k)] for k in windows])
    return found.double() if found.is_floating_point() else found


def _sums(values_S: Tensor, counts_N: Tensor) -> Tensor:
    """Sums over each window's tokens [N]."""
    window = torch.repeat_interleave(torch.arange(len(counts_N)), counts_N)
    return torch.zeros(len(counts_N), dtype=torch.float64).index_add_(0, window, values_S)


def _right_token(change_S: Tensor, counts_N: Tensor) -> RightToken:
    mean, interval = clustered_mean(_sums(change_S, counts_N), counts_N)
    square, around = clustered_mean(_sums(change_S.square(), counts_N), counts_N)
    return RightToken(
        mean=mean,
        mean_interval=interval,
        rms=math.sqrt(square),
        rms_interval=Interval(
            low=math.sqrt(max(around.low, 0.0)), high=math.sqrt(max(around.high, 0.0))
        ),
        lowest=change_S.min().item(),
        highest=change_S.max().item(),
        quantiles=_quantiles(change_S, DELTA_SHARES),
    )


def _quantiles(values_S: Tensor, shares: Sequence[float]) -> tuple[Quantile, ...]:
    # torch.quantile refuses more than 2**24 values; the nearest rank needs no interpolation.
    ordered = values_S.sort().values
    ranks = [min(len(ordered), max(1, math.ceil(share * len(ordered)))) for share in shares]
    return tuple(
        Quantile(share=share, value=ordered[rank - 1].item())
        for share, rank in zip(shares, ranks, strict=True)
    )


def _histogram(kl_S: Tensor) -> tuple[Bin, ...]:
    edges = [
        10 ** (_HISTOGRAM_LOW + k / _BINS_PER_DECADE)
        for k in range((_HISTOGRAM_HIGH - _HISTOGRAM_LOW) * _BINS_PER_DECADE + 1)
    ]
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    counts = torch.bincount(torch.bucketize(kl_S, inner), minlength=len(edges) - 1)
    return tuple(
        Bin(low=edges[k], high=edges[k + 1], share=int(count) / len(kl_S))
        for k, count in enumerate(counts)
    )


def _worst(
    kl_S: Tensor, base: Scores, pair: PairScores, workload: Workload, windows: Sequence[int]
) -> tuple[WorstToken, ...]:
    counts = torch.tensor([workload.sequences[k].count for k in windows])
    ends = counts.cumsum(0)
    found = []
    for index in kl_S.topk(min(_WORST_TOKENS, len(kl_S))).indices.tolist():
        number = int(torch.searchsorted(ends, index, right=True))
        sequence = workload.sequences[windows[number]]
        within = index - int(ends[number] - counts[number])
        place = workload.offsets[windows[number]] + within
        position = int(sequence.positions[within])
        found.append(
            WorstToken(
                window=number,
                position=position,
                kl=kl_S[index].item(),
                token=sequence.ids[position],
                best_original=int(base.best[place]),
                best_quantized=int(pair.scores.best[place]),
            )
        )
    return tuple(found)
