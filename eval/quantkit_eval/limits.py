"""Limits as `--fail-if` spells them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantkit_eval.errors import EvaluationError

METRICS = ("kl", "ppl", "top1", "dp", "defects", "task:NAME")
# Of embedding models and of rerankers.
VECTOR_METRICS = {"vectors": ("cosine", "neighbours"), "scores": ("order", "first")}
_LIMIT = re.compile(
    r"\s*(?P<metric>kl|ppl|top1|dp|defects|cosine|neighbours|order|first|task:(?P<task>[^<>=]+?))"
    r"\s*(?P<sign>[<>])\s*"
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
    "cosine": ("<", ("",)),
    "neighbours": ("<", ("%",)),
    "order": ("<", ("%",)),
    "first": ("<", ("%",)),
    "task": ("<", ("pt",)),
}
_SHOWN = {
    "kl": '"kl>0.05"',
    "ppl": '"ppl>+1%" or, for the perplexity itself, "ppl>12.5"',
    "top1": '"top1<98%"',
    "dp": '"dp>2%"',
    "defects": '"defects>0"',
    "task": '"task:NAME<-2pt"',
    "cosine": '"cosine<0.99"',
    "neighbours": '"neighbours<90%"',
    "order": '"order<98%"',
    "first": '"first<95%"',
}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One `--fail-if`: it fails when the metric is on the wrong side of `value`.

    metric   kl (nats), ppl (a ratio, or absolute), top1 and dp (shares), defects, task; of
             embedding models cosine and neighbours (a share), of rerankers order, first (shares)
    """

    text: str
    metric: str
    value: float
    task: str | None = None
    absolute: bool = False


def parse_limit(text: str) -> Limit:
    """The limit that an expression spells.  Raises EvaluationError listing the metrics."""
    found = _LIMIT.fullmatch(text)
    if found is None:
        raise EvaluationError(
            f"--fail-if {text!r}: write METRIC>VALUE or METRIC<VALUE with one of the metrics "
            f"{', '.join(METRICS)}, for embedding models cosine, neighbours, for rerankers order, "
            f"first: {', '.join(_SHOWN.values())}"
        )
    metric = found["metric"].lower().partition(":")[0]
    sign, units = _FORMS[metric]
    if found["sign"] != sign or found["unit"].lower() not in units:
        raise EvaluationError(f"--fail-if {text!r}: for this metric write {_SHOWN[metric]}")
    value = float(found["value"])
    absolute = metric == "ppl" and not found["unit"]
    if metric == "ppl" and not absolute:
        value = 1 + value / 100
    elif metric in ("top1", "dp", "neighbours", "order", "first"):
        value /= 100
    elif metric == "task":
        value = -value / 100
    return Limit(
        text=text.strip(), metric=metric, value=value, task=found["task"], absolute=absolute
    )
