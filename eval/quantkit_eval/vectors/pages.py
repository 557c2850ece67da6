"""The report on vectors or scores as pages: one HTML file and Markdown, from the same record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

import jinja2

from quantkit.checkpoint.memory import format_size
from quantkit_eval.figures.statistics import Interval
from quantkit_eval.records import to_json
from quantkit_eval.report.pages import number, percent, percent_span, span
from quantkit_eval.report.tables import markdown
from quantkit_eval.report.words import WORDS, overall, sentence, tone
from quantkit_eval.vectors.figures import ScoreFigures, VectorFigures
from quantkit_eval.vectors.records import VectorCandidate, VectorReport


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model's line: a figure and its interval for each column."""

    name: str
    candidate: VectorCandidate | None
    cells: tuple[tuple[str, str], ...]


def vector_files(report: VectorReport) -> dict[str, bytes]:
    """File name -> content of report.json, report.md and report.html."""
    text = json.dumps(to_json(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    css = (files("quantkit_eval") / "templates" / "report.css").read_text(encoding="utf-8")
    return {
        "report.json": text.encode(),
        "report.md": _render("vectors.md.j2", report).encode(),
        "report.html": _render("vectors.html.j2", report, css=css, autoescape=True).encode(),
    }


def vector_table(report: VectorReport) -> str:
    """Every model's size and cost as a Markdown table, the smallest loss first."""
    lines = [
        [
            row.name,
            "" if row.candidate is None else f"{row.candidate.identity.bits_per_weight:.3f}",
            *(f"{value} {interval}".strip() for value, interval in row.cells),
            "" if row.candidate is None else WORDS.short[row.candidate.outcome],
        ]
        for row in rows(report)
    ]
    return markdown(["", "bits per weight", *columns(report), "verdict"], lines)


def columns(report: VectorReport) -> tuple[str, ...]:
    """What is measured of the models."""
    if report.kind == "vectors":
        return "cosine to the original", "lowest", "nearest neighbours kept"
    return "pairs in the same order", "Kendall's tau", "same best candidate", "change of a score"


def rows(report: VectorReport) -> list[Row]:
    """The models, the smallest loss first, and the noise floor."""
    found = [
        Row(name=c.identity.name, candidate=c, cells=_cells(c.vectors, c.scores))
        for c in ranked(report)
    ]
    if (noise := report.noise) is not None:
        cells = _cells(noise.vectors, noise.scores)
        found.append(Row(name=f"noise floor ({noise.dtype})", candidate=None, cells=cells))
    return found


def ranked(report: VectorReport) -> list[VectorCandidate]:
    """The quantized models, that which keeps most first."""

    def kept(candidate: VectorCandidate) -> float:
        if candidate.vectors is not None:
            return candidate.vectors.cosine
        return 0.0 if candidate.scores is None else candidate.scores.order

    return sorted(report.candidates, key=kept, reverse=True)


def _cells(
    vectors: VectorFigures | None, scores: ScoreFigures | None
) -> tuple[tuple[str, str], ...]:
    if vectors is not None:
        return (
            (f"{vectors.cosine:.5f}", _fine(vectors.cosine_interval)),
            (f"{vectors.lowest:.5f}", ""),
            (percent(vectors.neighbours), percent_span(vectors.neighbours_interval)),
        )
    if scores is None:
        return ()
    return (
        (percent(scores.order), percent_span(scores.order_interval)),
        (f"{scores.tau:.4f}", _fine(scores.tau_interval)),
        (percent(scores.first), percent_span(scores.first_interval)),
        (
            f"{number(scores.difference)} of a spread of {number(scores.spread)}",
            span(scores.difference_interval),
        ),
    )


def _fine(interval: Interval) -> str:
    return f"[{interval.low:.5f}, {interval.high:.5f}]"


def _render(template: str, report: VectorReport, *, css: str = "", autoescape: bool = False) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quantkit_eval", "templates"),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    outcomes = [candidate.outcome for candidate in report.candidates]
    return environment.get_template(template).render(
        r=report,
        css=css,
        rows=rows(report),
        columns=columns(report),
        table=vector_table(report),
        ranked=ranked(report),
        words=WORDS,
        overall=overall(outcomes),
        tone=tone(outcomes),
        sentence=sentence,
        size=format_size,
    )
