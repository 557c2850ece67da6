"""Limits on what quantization may cost, decided on intervals: kept, broken, or not enough data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from quantkit_eval.errors import EvaluationError
from quantkit_eval.figures.divergence import Divergence
from quantkit_eval.figures.statistics import Interval
from quantkit_eval.tasks.accuracy import ALL, TaskComparison

Outcome = Literal["within", "drop", "unsure"]
METRICS = ("kl", "ppl", "top1", "dp", "defects", "task:NAME")
# What the headline asks if nobody says what matters: one percent of perplexity is about what INT8
# and the best 4-bit methods cost a large model; two points are what task sets can resolve.
DEFAULT_LIMITS = ("ppl>+1%",)
DEFAULT_TASK_LIMIT = "task:{}<-2pt"
_LIMIT = re.compile(
    r"\s*(?P<metric>kl|ppl|top1|dp|defects|task:(?P<task>[^<>=]+?))\s*(?P<sign>[<>])\s*"
    r"(?P<value>[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(?P<unit>%|pt|)\s*",
    re.IGNORECASE,
)
# Which way is worse, and which units a metric is written in.
_FORMS = {
    "kl": (">", ("",)),
    "ppl": (">", ("%", "")),
    "top1": ("<", ("%",)),
    "dp": (">", ("%",)),
    "defects": (">", ("",)),
    "task": ("<", ("pt",)),
}
_SHOWN = {
    "kl": '"kl>0.05"',
    "ppl": '"ppl>+1%" or, for the perplexity itself, "ppl>12.5"',
    "top1": '"top1<98%"',
    "dp": '"dp>2%"',
    "defects": '"defects>0"',
    "task": '"task:NAME<-2pt"',
}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One `--fail-if`: it fails when the metric is on the wrong side of `value`.

    metric   kl (nats), ppl (a ratio, or absolute), top1 and dp (shares), defects, task
    """

    text: str
    metric: str
    value: float
    task: str | None = None
    absolute: bool = False


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


def parse_limit(text: str) -> Limit:
    """The limit that an expression spells.  Raises EvaluationError listing the metrics."""
    found = _LIMIT.fullmatch(text)
    if found is None:
        raise EvaluationError(
            f"--fail-if {text!r}: write METRIC>VALUE or METRIC<VALUE with one of the metrics "
            f"{', '.join(METRICS)}: {', '.join(_SHOWN.values())}"
        )
    metric = found["metric"].lower().partition(":")[0]
    sign, units = _FORMS[metric]
    if found["sign"] != sign or found["unit"].lower() not in units:
        raise EvaluationError(f"--fail-if {text!r}: for this metric write {_SHOWN[metric]}")
    value = float(found["value"])
    absolute = metric == "ppl" and not found["unit"]
    if metric == "ppl" and not absolute:
        value = 1 + value / 100
    elif metric in ("top1", "dp"):
        value /= 100
    elif metric == "task":
        value = -value / 100
    return Limit(
        text=text.strip(), metric=metric, value=value, task=found["task"], absolute=absolute
    )


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
        return _judgement(limit, found[0].drop, found[0].drop_interval, found[0].count, "questions")
    if limit.metric == "defects":
        if defects is None:
            raise EvaluationError(
                f"--fail-if {limit.text!r}: the weights of this checkpoint cannot be compared with "
                "their originals; see its per-weight section"
            )
        return _judgement(
            limit, defects, Interval(low=defects, high=defects), scored_tokens, "tokens"
        )
    estimate, interval = _text_metric(limit, divergence)
    return _judgement(limit, estimate, interval, scored_tokens, "tokens")


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


def _judgement(
    limit: Limit, estimate: float, interval: Interval, count: int, unit: str
) -> Judgement:
    falling = limit.metric == "top1"
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
