"""What the command line does once its options are read: measure, write the report, tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint.disk import write_file
from quantkit.formats.open import open_source
from quantkit_eval.evaluation import evaluate
from quantkit_eval.gate import Outcome, worst
from quantkit_eval.records import Candidate, Report, to_json
from quantkit_eval.report.pages import report_files, summary_table
from quantkit_eval.report.words import WORDS, overall, sentence
from quantkit_eval.report.writing import publish, report_directory, scratch
from quantkit_eval.setting import EvaluationRequest, check_token_wishes
from quantkit_eval.vectors.evaluation import evaluate_vectors, vector_wishes
from quantkit_eval.vectors.kinds import kind_of
from quantkit_eval.vectors.pages import vector_files, vector_table
from quantkit_eval.vectors.records import VectorCandidate, VectorReport


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A report and where it lies."""

    report: Report | VectorReport
    out: Path

    @property
    def outcome(self) -> Outcome:
        """The worst verdict of all quantized models."""
        return worst(candidate.outcome for candidate in self.report.candidates)

    @property
    def violated(self) -> bool:
        """Whether a limit that the user gave is shown to be broken."""
        return self.report.limits_given and self.outcome == "drop"

    def summary(self) -> dict[str, object]:
        """What a program needs at once; the rest is in report.json."""
        found: dict[str, object] = to_json(self._summary())
        return found

    def _summary(self) -> dict[str, object]:
        return {
            "report": str(self.out),
            "outcome": self.outcome,
            "violated": self.violated,
            "models": [
                {"name": candidate.identity.name, **_figures(candidate)}
                for candidate in self.report.candidates
            ],
        }

    def text(self) -> str:
        """For people: the table, each limit's outcome, damaged weights, where the pages are."""
        report = self.report
        table = summary_table(report) if isinstance(report, Report) else vector_table(report)
        lines = [table, ""]
        if isinstance(report, VectorReport) and report.pooling is not None:
            lines.insert(0, f"vectors    {report.pooling}\n")
        several = len(self.report.candidates) > 1
        for candidate in self.report.candidates:
            start = f"{candidate.identity.name}: " if several else ""
            lines += [f"{start}{sentence(judgement)}" for judgement in candidate.judgements]
            defects = candidate.defects if isinstance(candidate, Candidate) else ()
            lines += [f"{start}damaged: {w.name}: {w.defect}" for w in defects]
            lines += [f"{start}note: {note}" for note in candidate.notes]
        lines += ["", f"verdict    {self._verdict().lower()}{self._exit()}"]
        return "\n".join([*lines, f"report     {self.out / 'report.html'}"])

    def _verdict(self) -> str:
        outcomes = [candidate.outcome for candidate in self.report.candidates]
        return overall(outcomes) if len(outcomes) > 1 else WORDS.headline[self.outcome]

    def _exit(self) -> str:
        """What the exit code means where it might surprise."""
        if not self.report.limits_given:
            return " (without --fail-if the exit code is 0 whatever is found)"
        unsure = self.outcome == "unsure"
        return " (exit code 0: --fail-if fails on what is shown)" if unsure else ""


def check_wishes(request: EvaluationRequest) -> None:
    """Nothing if text, tasks and limits fit the original model; no quantized one is needed.

    For commands that quantize first: what is wrong shows before hours of work.
    """
    source = open_source(request.model)
    kind = kind_of(source, trust_remote_code=request.trust_remote_code)
    if kind == "tokens":
        check_token_wishes(request)
    else:
        vector_wishes(request, source, kind)


def run_evaluation(
    request: EvaluationRequest,
    out: Path,
    *,
    names: Sequence[str] | None = None,
    progress: bool = True,
    tell: Callable[[str], object] = lambda _: None,
) -> Evaluated:
    """Evaluates and writes report.json, report.md and report.html to `out`, all or nothing."""
    with report_directory(out) as work:
        report = _measured(request, scratch(work), names=names, progress=progress, tell=tell)
        publish(work, out, _files(report))
    return Evaluated(report=report, out=out)


def run_comparison(
    request: EvaluationRequest, out: Path, *, names: Sequence[str], progress: bool = True
) -> Evaluated:
    """Evaluates checkpoints that lie in `out` and writes the report's files beside them."""
    with report_directory(out / "report") as work:
        report = _measured(request, scratch(work), names=names, progress=progress)
        for name, content in _files(report).items():
            write_file(out / name, content)
    return Evaluated(report=report, out=out)


def _measured(
    request: EvaluationRequest,
    work: Path,
    *,
    names: Sequence[str] | None,
    progress: bool,
    tell: Callable[[str], object] = lambda _: None,
) -> Report | VectorReport:
    """The report that fits what the original is for."""
    kind = kind_of(open_source(request.model), trust_remote_code=request.trust_remote_code)
    if kind == "tokens":
        return evaluate(request, work, names=names, progress=progress, tell=tell)
    return evaluate_vectors(request, kind, names=names)


def _files(report: Report | VectorReport) -> dict[str, bytes]:
    return report_files(report) if isinstance(report, Report) else vector_files(report)


def _figures(candidate: Candidate | VectorCandidate) -> dict[str, object]:
    if isinstance(candidate, VectorCandidate):
        found: dict[str, object] = to_json(candidate.vectors or candidate.scores)
        return found
    return {
        "kl": candidate.divergence.mean,
        "perplexity_ratio": candidate.divergence.perplexity_ratio,
        "top1_agreement": candidate.divergence.top1_agreement,
        "defects": [weight.name for weight in candidate.defects],
    }
