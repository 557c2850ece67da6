"""Limits on what quantization may cost, decided on intervals: kept, broken, or not enough data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from quantkit_eval.errors import EvaluationError
from quantkit_eval.figures.divergence import Divergence
from quantkit_eval.figures.statistics import Interval
from quantkit_eval.limits import Limit
from quantkit_eval.tasks.accuracy import ALL, TaskComparison

Outcome = Literal["within", "drop", "unsure"]
# What the headline asks if nobody says what matters: one percent of perplexity is about what INT8
# and the best 4-bit methods cost a large model; two points are what task sets can resolve.
DEFAULT_LIMITS = ("ppl>+1%",)
DEFAULT_TASK_LIMIT = "task:{}<-2pt"
# Metrics of which less is worse.
_FALLING = ("top1", "cosine", "neighbours", "order", "first")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A limit held against an interval.

    outcome    within: the whole interval keeps the limit; drop: the whole interval breaks it;
               unsure: the limit lies inside the interval
    estimate   in the limit's units; a task's is its drop in accuracy
    more       how many more tokens (or questions) of the same kind it would take to tell, if the
               estimate stays where it is; None if it can be told, or if no amount would do
    """

    limit: str
    outcome: Outcome
    estimate: float
    interval: Interval
    value: float
    measured_on: int
    unit: str
    more: int | None


def judge(
    limit: Limit,
    divergence: Divergence,
    tasks: Sequence[TaskComparison],
    defects: int | None,
    scored_tokens: int,
) -> Judgement:
    """The limit held against what was measured.  Raises EvaluationError for an unknown task.

    defects: None if weights were not looked at.
    """
    if limit.metric == "task":
        # With a single task there is no sum of all: it is that task.
        wanted = tasks[0].task if limit.task == ALL and len(tasks) == 1 else limit.task
        found = [task for task in tasks if task.task == wanted]
        if not found:
            known = ", ".join(task.task for task in tasks) or "none; add --tasks"
            raise EvaluationError(
                f"--fail-if {limit.text!r}: there is no task {limit.task!r}; measured: {known}"
            )
        return hold(limit, found[0].drop, found[0].drop_interval, found[0].count, "questions")
    if limit.metric == "defects":
        if defects is None:
            raise EvaluationError(
                f"--fail-if {limit.text!r}: the weights of this checkpoint cannot be compared with "
                "their originals; see its per-weight section"
            )
        return hold(limit, defects, Interval(low=defects, high=defects), scored_tokens, "tokens")
    estimate, interval = _text_metric(limit, divergence)
    return hold(limit, estimate, interval, scored_tokens, "tokens")


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """A drop if there is one, else unsure if there is one, else within."""
    found = set(outcomes)
    return "drop" if "drop" in found else "unsure" if "unsure" in found else "within"


def _text_metric(limit: Limit, measured: Divergence) -> tuple[float, Interval]:
    if limit.metric == "kl":
        return measured.mean, measured.mean_interval
    if limit.metric == "dp":
        return measured.right_token.rms, measured.right_token.rms_interval
    if limit.metric == "ppl":
        if limit.absolute:
            return measured.perplexity.value, measured.perplexity.interval
        return measured.perplexity_ratio, measured.perplexity_ratio_interval
    return measured.top1_agreement, measured.top1_interval


def hold(limit: Limit, estimate: float, interval: Interval, count: int, unit: str) -> Judgement:
    """A limit held against an interval that was measured on `count` of `unit`."""
    falling = limit.metric in _FALLING
    broken = interval.high < limit.value if falling else interval.low > limit.value
    kept = interval.low >= limit.value if falling else interval.high <= limit.value
    outcome: Outcome = "drop" if broken else "within" if kept else "unsure"
    return Judgement(
        limit=limit.text,
        outcome=outcome,
        estimate=estimate,
        interval=interval,
        value=limit.value,
        measured_on=count,
        unit=unit,
        more=_more(estimate, interval, limit.value, count) if outcome == "unsure" else None,
    )


def _more(estimate: float, interval: Interval, value: float, count: int) -> int | None:
    """Further tokens until the interval no longer holds the limit: it shrinks as 1/sqrt(count)."""
    half = (estimate - interval.low) if value < estimate else (interval.high - estimate)
    distance = abs(value - estimate)
    if not math.isfinite(half) or distance == 0:
        return None
    return max(math.ceil(count * ((half / distance) ** 2 - 1)), 1)
