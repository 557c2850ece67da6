"""Perplexity: exp of the mean negative log-likelihood of the tokens a protocol scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit_eval.figures.scoring import Scores
from quantkit_eval.figures.statistics import Interval, clustered_mean
from quantkit_eval.sequences import Scored, Workload
from quantkit_eval.windows import Windows


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp of the mean over all scored tokens, its interval from the windows.

    window_nll   each window's mean in nats, so that others can pair or resample them
    """

    value: float
    interval: Interval
    window_nll: tuple[float, ...]


def perplexity_of(scores: Scores, workload: Workload, windows: Sequence[int]) -> Perplexity:
    """A model's perplexity over the sequences `windows` of the workload."""
    counts = torch.tensor([workload.sequences[k].count for k in windows])
    sums = torch.stack([scores.nll[workload.slice(k)].double().sum() for k in windows])
    mean, interval = clustered_mean(sums, counts)
    return Perplexity(
        value=exp(mean),
        interval=Interval(low=exp(interval.low), high=exp(interval.high)),
        window_nll=tuple((sums / counts).tolist()),
    )


def exp(value: float) -> float:
    """e to the value, infinity where that is too large for a float."""
    return math.exp(value) if value < 700 else math.inf


def window_sequences(windows: Windows) -> list[Scored]:
    """The windows as sequences to score."""
    return [
        Scored(ids=tuple(ids), spans=((first, len(ids)),), label=f"window {number}")
        for number, (ids, first) in enumerate(zip(windows.ids.tolist(), windows.first, strict=True))
    ]
