"""Perplexity and KL where the Hub looks: `model-index` in a model card, and `.eval_results`.

Both are written by huggingface_hub's own classes.  What the figures are of (interval, sample) goes
into `notes` and metric arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantkit.checkpoint.disk import disk_errors, write_file
from quantkit.checkpoint.door import RECORD_BYTES, read_json
from quantkit.checkpoint.manifest import EVALUATION, amend_manifest
from quantkit_eval.errors import EvaluationError

CARD, RESULTS = "README.md", ".eval_results/quantkit.yaml"
_NAME = r"[A-Za-z0-9][\w.-]*"
_NAMES = re.compile(rf"(?P<dataset>{_NAME}/{_NAME}):(?P<perplexity>{_NAME})(?:,(?P<kl>{_NAME}))?")


@dataclass(frozen=True, kw_only=True)
class CardNames:
    """Under which names the Hub lists the figures; without `kl` it stands in the notes alone."""

    dataset: str
    perplexity: str
    kl: str | None


def parse_card_names(text: str) -> CardNames:
    """The names in "ORG/DATASET:TASK" or "ORG/DATASET:TASK,KL_TASK".  Raises EvaluationError."""
    found = _NAMES.fullmatch(text)
    if found is None:
        raise EvaluationError(
            f"--card-results {text[:80]!r}: name a dataset of the Hub and its task, and another "
            "task for KL if that is to have an entry: Salesforce/wikitext:perplexity or "
            "Salesforce/wikitext:perplexity,kl"
        )
    return CardNames(**found.groupdict())


def write_card_results(out: Path, names: CardNames) -> None:
    """Adds the figures of a finished checkpoint's evaluation to what goes to the Hub.

    Changes README.md and the manifest and writes `.eval_results/quantkit.yaml`; again for the same
    evaluation it is the same.  Raises OutputError for a full disk.
    """
    from huggingface_hub import (
        EvalResult,
        EvalResultEntry,
        ModelCard,
        ModelCardData,
        eval_result_entries_to_yaml,
    )

    report = read_json(out / EVALUATION / "report.json", largest=RECORD_BYTES)
    figures = list(_figures(report, names))
    card = ModelCard((out / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=False)
    assert isinstance(card.data, ModelCardData)
    card.data.model_name = out.name
    card.data.eval_results = [
        EvalResult(
            task_type="text-generation",
            task_name=names.perplexity,
            dataset_type=names.dataset,
            dataset_name=names.dataset,
            metric_type=figure.kind,
            metric_name=figure.name,
            metric_value=figure.value,
            metric_args=figure.arguments,
        )
        for figure in figures
    ]
    entries = [
        EvalResultEntry(
            dataset_id=names.dataset, task_id=figure.task, value=figure.value, notes=figure.notes
        )
        for figure in figures
        if figure.task is not None
    ]
    listed = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    with disk_errors(out):
        (out / RESULTS).parent.mkdir(exist_ok=True)
        write_file(out / RESULTS, listed.encode())
        write_file(out / CARD, str(card).encode())
    amend_manifest(out, (CARD, RESULTS))


@dataclass(frozen=True, kw_only=True)
class _Figure:
    """A metric with what it is of."""

    kind: str
    name: str
    task: str | None
    value: float
    arguments: dict[str, Any]
    notes: str


def _figures(report: Mapping[str, Any], names: CardNames) -> Iterator[_Figure]:
    (candidate,) = report["candidates"]
    measured, protocol = candidate["divergence"], report["text"]["protocol"]
    sample = {
        "tokens": protocol["scored_tokens"],
        "windows": protocol["windows"],
        "window_tokens": protocol["seq_len"],
        "text": protocol["source"],
        "text_sha256": report["text"]["sha256"],
    }
    of = (
        f"{sample['tokens']:,} tokens in {sample['windows']} windows of {sample['window_tokens']} "
        f"of {sample['text']} (sha256 {sample['text_sha256'][:16]}); measured by quantkit eval in "
        "float32"
    )
    perplexity, kl = measured["perplexity"], measured["mean"]
    spread = measured["mean_interval"]
    cost = f"KL divergence to the original {kl:.6g} nats per token{_interval(spread)}"
    beside = "" if names.kl is not None else f"{cost}; "
    yield _Figure(
        kind="perplexity",
        name="Perplexity",
        task=names.perplexity,
        value=perplexity["value"],
        arguments={**sample, "interval_95": perplexity["interval"]},
        notes=f"perplexity{_interval(perplexity['interval'])}; {beside}{of}",
    )
    yield _Figure(
        kind="kl_divergence",
        name="KL divergence to the original, nats per token",
        task=names.kl,
        value=kl,
        arguments={**sample, "interval_95": spread},
        notes=f"{cost}; {of}",
    )


def _interval(found: Mapping[str, float | None]) -> str:
    """As words; one window has none."""
    if found["low"] is None or found["high"] is None:
        return ", without an interval"
    return f", 95 % interval {found['low']:.6g} to {found['high']:.6g}"
