"""Verdicts in plain words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantkit_eval.gate import Judgement, Outcome


@dataclass(frozen=True, kw_only=True)
class Words:
    """What outcomes are called: in a table cell, and above a page."""

    short: dict[Outcome, str]
    headline: dict[Outcome, str]
    listed: dict[Outcome, str]


WORDS = Words(
    short={"within": "within limits", "drop": "drop shown", "unsure": "not enough data"},
    headline={
        "within": "It keeps the limits",
        "drop": "It drops beyond the limits",
        "unsure": "Not enough data to tell",
    },
    listed={
        "within": "Shown to keep the limits",
        "drop": "Shown to break a limit",
        "unsure": "Not enough data to tell",
    },
)


def overall(outcomes: Sequence[Outcome]) -> str:
    """One line about several models."""
    within = sum(outcome == "within" for outcome in outcomes)
    if within == len(outcomes):
        return f"All {len(outcomes)} keep the limits"
    if within:
        return f"{within} of {len(outcomes)} keep the limits"
    drops = sum(outcome == "drop" for outcome in outcomes)
    return "None is shown to keep the limits" if drops < len(outcomes) else "All break a limit"


def tone(outcomes: Sequence[Outcome]) -> Outcome:
    """Of which outcome a line about several models has the colour; a mixture is not green."""
    found = set(outcomes)
    return found.pop() if len(found) == 1 else "unsure"


def percent_change(ratio: float) -> str:
    """A ratio as a signed change: "+1.23 %"."""
    if not math.isfinite(ratio):
        return "∞"
    value = 100 * (ratio - 1)
    if abs(value) >= 1000:
        return f"x {ratio:,.0f}"
    return "0.00 %" if abs(value) < 0.005 else f"{value:+.2f} %"


def sentence(judgement: Judgement) -> str:
    """One limit's outcome as a sentence with its numbers."""
    name, show = _spelling(judgement.limit)
    interval = judgement.interval
    edges = (interval.low, interval.high)
    if judgement.limit.lower().startswith("task:"):
        # A drop is measured, a change is told.
        edges = (interval.high, interval.low)
    low, high = (show(edge) for edge in edges)
    limit = show(judgement.value)
    measured = f"{name}: {show(judgement.estimate)}, 95 % interval {low} to {high}"
    if judgement.outcome == "within":
        return f"{measured}. All of it keeps the limit of {limit}."
    if judgement.outcome == "drop":
        return f"{measured}. All of it is beyond the limit of {limit}."
    unsure = f"{measured}. Not enough data to tell: the limit of {limit} lies inside;"
    if judgement.more is None:
        return f"{unsure} how much more it would take cannot be said."
    return (
        f"{unsure} it would take about {_rounded(judgement.more):,} more {judgement.unit} than "
        f"these {judgement.measured_on:,}, if the estimate stays."
    )


def _rounded(count: int) -> int:
    """Two significant digits, rounded up: an extrapolation knows no more."""
    step = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // step) * step


def _spelling(limit: str) -> tuple[str, Callable[[float], str]]:
    """What a limit's metric is called, and how its values are written."""
    metric = limit.lower()
    if metric.startswith("ppl") and "%" in metric:
        return "Perplexity", percent_change
    if metric.startswith("top1"):
        return "Top-token agreement", _percent
    for start, name in _SHARES.items():
        if metric.startswith(start):
            return name, _percent
    if metric.startswith("cosine"):
        return "Cosine to the original's vectors", lambda value: f"{value:.5f}"
    if metric.startswith("dp"):
        return "RMS change of the right token's probability", _percent
    if metric.startswith("task:"):
        task = limit.partition(":")[2].partition("<")[0].strip()
        name = "all tasks together" if task == "all" else task
        return f"Accuracy on {name}", _points
    names = {"k": "KL divergence", "p": "Perplexity", "d": "Damaged weights"}
    return names[metric[0]], lambda value: f"{value:.4g}"


_SHARES = {
    "neighbours": "Nearest neighbours kept",
    "order": "Pairs of candidates in the same order",
    "first": "Same best candidate",
}


def _points(drop: float) -> str:
    text = f"{-100 * drop:+.2f}"
    return f"{text if float(text) else '0.00'} pt"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
