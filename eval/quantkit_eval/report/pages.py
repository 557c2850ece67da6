"""The report as pages: one self-contained HTML file and Markdown, both from the same record."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2

from quantkit.checkpoint.memory import format_size
from quantkit_eval.figures.layers import WeightCost
from quantkit_eval.figures.statistics import Interval
from quantkit_eval.records import Candidate, Report, to_json
from quantkit_eval.report import charts
from quantkit_eval.report.tables import markdown
from quantkit_eval.report.words import WORDS, overall, percent_change, sentence, tone
from quantkit_eval.tasks.accuracy import TaskComparison
from quantkit_eval.windows import Protocol

_WORST = 10
_FOLDER = "templates"


def report_files(report: Report) -> dict[str, bytes]:
    """File name -> content of report.json, report.md and report.html."""
    text = json.dumps(to_json(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return {
        "report.json": text.encode(),
        "report.md": render_markdown(report).encode(),
        "report.html": render_html(report).encode(),
    }


def render_html(report: Report) -> str:
    """One page without any link outside: readable in light and dark, on paper and on a phone."""
    css = (files("quantkit_eval") / _FOLDER / "report.css").read_text(encoding="utf-8")
    return _render("report.html.j2", report, autoescape=True, css=css, charts=_Charts(report))


def render_markdown(report: Report) -> str:
    """The report for terminals and repositories."""
    text = _render("report.md.j2", report, autoescape=False, summary=summary_table(report))
    return re.sub(r"\n{3,}", "\n\n", text)


def summary_table(report: Report) -> str:
    """Every model's size and cost as a Markdown table, the smallest loss first."""
    header = ["", "bits per weight", "KL divergence", "perplexity", "same top token"]
    tasks = any(candidate.tasks for candidate in report.candidates)
    header += ["tasks"] if tasks else []
    rows = []
    for candidate in ranked(report):
        measured = candidate.divergence
        row = [
            candidate.identity.name,
            f"{candidate.identity.bits_per_weight:.3f}",
            f"{number(measured.mean)} {span(measured.mean_interval)}",
            f"{percent_change(measured.perplexity_ratio)} "
            f"{ratio_span(measured.perplexity_ratio_interval)}",
            f"{percent(measured.top1_agreement)} {percent_span(measured.top1_interval)}",
        ]
        if tasks:
            total = candidate.tasks[-1]
            row.append(f"{points(-total.drop)} {point_span(total.drop_interval)}")
        rows.append([*row, WORDS.short[candidate.outcome]])
    if report.noise is not None:
        measured = report.noise.divergence
        rows.append(
            [
                f"noise floor ({report.noise.dtype})",
                "",
                f"{number(measured.mean)} {span(measured.mean_interval)}",
                f"{percent_change(measured.perplexity_ratio)} "
                f"{ratio_span(measured.perplexity_ratio_interval)}",
                f"{percent(measured.top1_agreement)} {percent_span(measured.top1_interval)}",
                *([""] if tasks else []),
                "",
            ]
        )
    return markdown([*header, "verdict"], rows)


def ranked(report: Report) -> list[Candidate]:
    """The quantized models by KL divergence."""
    return sorted(report.candidates, key=lambda candidate: candidate.divergence.mean)


def number(value: float) -> str:
    """Three significant digits."""
    if not math.isfinite(value):
        return "∞"
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def span(interval: Interval) -> str:
    """An interval of plain numbers."""
    return f"[{number(interval.low)}, {number(interval.high)}]"


def percent(share: float) -> str:
    """A share in percent, three significant digits below ten."""
    value = 100 * share
    if 0 < abs(value) < 0.01:
        return f"{value:.1g} %"
    return f"{value:.2f} %" if abs(value) < 99.995 else f"{value:.1f} %"


def percent_span(interval: Interval) -> str:
    """An interval of shares in percent."""
    return f"[{_decimals(100 * interval.low)}, {_decimals(100 * interval.high)}]"


def ratio_span(interval: Interval) -> str:
    """An interval of ratios as changes in percent."""
    low, high = 100 * (interval.low - 1), 100 * (interval.high - 1)
    return f"[{_signed(low)}, {_signed(high)}]"


def points(difference: float, signed: bool = True) -> str:
    """A difference of shares in percentage points."""
    value = 100 * difference
    return f"{_signed(value) if signed else _decimals(value)} pt"


def point_span(drop: Interval) -> str:
    """The interval of a drop, as that of a change."""
    return f"[{_signed(-100 * drop.high)}, {_signed(-100 * drop.low)}]"


def _change_span(interval: Interval) -> str:
    return f"[{_signed(100 * interval.low)}, {_signed(100 * interval.high)}]"


def _signed(value: float) -> str:
    if not math.isfinite(value):
        return "∞" if value > 0 else "-∞"
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text


def _decimals(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "∞"


def worst_weights(candidate: Candidate) -> list[WeightCost]:
    """The ten weights with the largest output error, damaged ones first."""
    ordered = sorted(candidate.weights, key=lambda w: (w.defect is None, -w.error))
    return ordered[:_WORST]


class _Charts:
    """The page's plots, drawn once."""

    def __init__(self, report: Report) -> None:
        floor = None if report.noise is None else report.noise.divergence
        self.trade_off = charts.trade_off(
            [
                charts.Point(
                    label=candidate.identity.name,
                    bits=candidate.identity.bits_per_weight,
                    kl=candidate.divergence.mean,
                    interval=candidate.divergence.mean_interval,
                    outcome=candidate.outcome,
                )
                for candidate in report.candidates
            ],
            None if floor is None else floor.mean,
        )
        self.histograms = {
            candidate.identity.name: charts.histogram(
                candidate.divergence.histogram,
                None if floor is None else floor.histogram,
                candidate.divergence.mean,
            )
            for candidate in report.candidates
        }
        self.heat_maps = {
            candidate.identity.name: charts.heat_map(candidate.weights)
            for candidate in report.candidates
        }

    def strip(self, task: TaskComparison, tasks: Sequence[TaskComparison]) -> str:
        """A task's change with its interval, all tasks on one scale."""
        edge = max(max(abs(t.drop_interval.low), abs(t.drop_interval.high)) for t in tasks)
        return charts.interval_strip(
            -task.drop_interval.high, -task.drop_interval.low, -task.drop, (-edge, edge), None
        )


def _render(template: str, report: Report, *, autoescape: bool, **more: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quantkit_eval", _FOLDER),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Macros of the second template see these too.
    environment.globals.update(
        r=report,
        ranked=ranked(report),
        has_tasks=any(candidate.tasks for candidate in report.candidates),
        words=WORDS,
        overall=overall([candidate.outcome for candidate in report.candidates]),
        tone=tone([candidate.outcome for candidate in report.candidates]),
        sentence=sentence,
        size=format_size,
        num=number,
        span=span,
        pct=percent,
        pct_span=percent_span,
        percent_change=percent_change,
        ratio_span=ratio_span,
        points=points,
        point_span=point_span,
        share_span=lambda interval: (
            f"[{_signed(100 * interval.low)}, {_signed(100 * interval.high)}]"
        ),
        share=lambda share: "median" if share == 0.5 else f"{100 * share:g} %",
        p_value=lambda p: f"{p:.2g}" if p >= 0.0005 else f"{p:.0e}",
        visible=lambda text: visible(text).replace(" ", "␣"),
        anchor=lambda candidate: re.sub(r"[^\w-]+", "-", candidate.identity.name),
        common=_common_prefix,
        worst_weights=worst_weights,
        protocol=_protocol_rows,
        task_table=_task_table,
        weight_table=_weight_table,
        **more,
    )
    return environment.get_template(template).render()


def _common_prefix(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    same = min(len(first), len(second))
    return next((k for k, (a, b) in enumerate(pairs) if a != b), same)


def _protocol_rows(protocol: Protocol) -> list[tuple[str, str]]:
    shown = {True: "yes", False: "no", None: "none"}
    return [
        (
            name.replace("_", " "),
            shown[value] if value is None or isinstance(value, bool) else visible(str(value)),
        )
        for name, value in to_json(protocol).items()
    ]


def visible(text: str) -> str:
    """A text of a few characters, so that line ends in it can be seen."""
    return text.replace("\n", "⏎")


def _task_table(candidate: Candidate) -> str:
    header = ["task", "n", "original", "quantized", "change", "lost / gained", "p", "Holm", "MDE"]
    rows = [
        [
            task.task,
            str(task.count),
            percent(task.accuracy_original),
            percent(task.accuracy_quantized),
            f"{points(-task.drop)} {point_span(task.drop_interval)}",
            f"{task.lost} / {task.gained}",
            f"{task.mcnemar_p:.2g}",
            f"{task.holm_p:.2g}",
            points(task.detectable, False),
        ]
        for task in candidate.tasks
    ]
    return markdown(header, rows)


def _weight_table(candidate: Candidate) -> str:
    header = ["largest errors", "scheme", "output error", "at quantization", "gain", "remarks"]
    rows = [
        [
            f"`{weight.name}`",
            weight.scheme,
            percent(weight.error),
            "" if weight.recorded_error is None else percent(weight.recorded_error),
            f"{weight.gain:.3f}",
            weight.defect or weight.degraded or "",
        ]
        for weight in worst_weights(candidate)
    ]
    return markdown(header, rows)
