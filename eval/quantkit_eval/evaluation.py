"""Quantized models measured against their original: from what a user asks for to a report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from quantkit.checkpoint.memory import peak_rss
from quantkit_eval.budget import check_budget
from quantkit_eval.figures.divergence import Divergence, divergence_of
from quantkit_eval.figures.measure import Measured, measure
from quantkit_eval.figures.perplexity import perplexity_of
from quantkit_eval.figures.sensitivity import (
    BlockSensitivity,
    cost,
    few_windows,
    measure_sensitivity,
)
from quantkit_eval.figures.stream import ModelStream, cached_as
from quantkit_eval.gate import judge, worst
from quantkit_eval.machine import machine_facts, version_facts
from quantkit_eval.records import SCHEMA, Answer, Candidate, Fact, NoiseFloor, Report, TokenShown
from quantkit_eval.setting import EvaluationRequest, Setting, prepare
from quantkit_eval.subjects import Subject
from quantkit_eval.tasks.accuracy import TaskComparison, answers, compare_answers
from quantkit_eval.tasks.harness import Verdicts, description, verdicts
from quantkit_eval.whole import Whole, check_whole, run_whole, whole_dtype

_CONTEXT_TOKENS = 24
_NOISE_DTYPE = torch.bfloat16


def evaluate(
    request: EvaluationRequest,
    scratch: Path,
    *,
    names: Sequence[str] | None = None,
    progress: bool = True,
    tell: Callable[[str], object] = lambda _: None,
) -> Report:
    """The report on every quantized model; hidden states go below `scratch`.

    names: what to call the quantized models (default: their directories' names).  `tell` hears what
    an expensive part will cost before it starts.  Raises the QuantkitError of whatever does not
    work out; what can be checked is checked before models run.
    """
    began = time.monotonic()
    setting = prepare(request, names)
    check_whole(request, setting)
    measured = _measure(request, setting, scratch, progress)
    sensitivity = _sensitivity(request, setting, scratch, progress, tell)
    whole = run_whole(request, setting)
    asked = [verdicts(task, whole.logs) for task in setting.harness]
    windows = range(len(setting.sequences))
    candidates = []
    for number, subject in enumerate(setting.quantized):
        divergence = divergence_of(measured.base, measured.pairs[number], setting.workload, windows)
        candidates.append(
            _candidate(
                setting,
                subject,
                measured,
                number,
                divergence,
                sensitivity[number],
                whole,
                asked,
                request.kv,
            )
        )
    noise = None
    if request.noise_floor:
        pair = measured.pairs[len(setting.quantized)]
        noise = NoiseFloor(
            dtype=str(_NOISE_DTYPE).removeprefix("torch."),
            divergence=divergence_of(measured.base, pair, setting.workload, windows),
        )
    return Report(
        schema=SCHEMA,
        title=request.title or f"What quantization cost {setting.original.name}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        original=setting.original.identity,
        perplexity=perplexity_of(measured.base, setting.workload, windows),
        text=setting.text,
        noise=noise,
        candidates=tuple(candidates),
        tasks=(
            *setting.task_sources,
            *(
                Fact(name=task.name, value=description(task, answered))
                for task, answered in zip(setting.harness, asked, strict=True)
            ),
        ),
        computed=_computed(request, setting, whole),
        seed=request.seed,
        limits_given=bool(request.limits),
        machine=machine_facts(request.device),
        versions=version_facts(),
        seconds=round(time.monotonic() - began, 1),
        peak_rss_bytes=peak_rss(),
        max_ram_bytes=request.max_ram,
    )


def _measure(
    request: EvaluationRequest, setting: Setting, scratch: Path, progress: bool
) -> Measured:
    with contextlib.ExitStack() as stack:

        def stream(
            subject: Subject, place: str, dtype: torch.dtype, kv: str = "none"
        ) -> ModelStream:
            return stack.enter_context(
                ModelStream(
                    subject.name,
                    subject.source,
                    setting.workload,
                    scratch / place,
                    dtype=dtype,
                    device=request.device,
                    trust_remote_code=request.trust_remote_code,
                    kv=kv,
                )
            )

        base = stream(setting.original, "original", torch.float32)
        others = [
            stream(subject, f"quantized-{number}", torch.float32, request.kv)
            for number, subject in enumerate(setting.quantized)
        ]
        subjects: list[Subject | None] = [*setting.quantized]
        if request.noise_floor:
            others.append(stream(setting.original, "noise", _NOISE_DTYPE))
            subjects.append(None)
        head_bytes = check_budget([base, *others], request.max_ram)
        return measure(base, others, subjects, head_bytes=head_bytes, progress=progress)


def _sensitivity(
    request: EvaluationRequest,
    setting: Setting,
    scratch: Path,
    progress: bool,
    tell: Callable[[str], object],
) -> list[tuple[BlockSensitivity, ...]]:
    """The blocks' sensitivities of every quantized model; empty ones if nobody asked."""
    if not request.sensitivity:
        return [()] * len(setting.quantized)
    workload = few_windows(setting.sequences, setting.positions, setting.workload.pictured)
    found = []
    for number, subject in enumerate(setting.quantized):
        with contextlib.ExitStack() as stack:
            base, other = (
                stack.enter_context(
                    ModelStream(
                        one.name,
                        one.source,
                        workload,
                        scratch / f"sensitivity-{number}-{place}",
                        device=request.device,
                        trust_remote_code=request.trust_remote_code,
                        kv=request.kv if place == "quantized" else "none",
                    )
                )
                for place, one in (("original", setting.original), ("quantized", subject))
            )
            head_bytes = check_budget([base, other], request.max_ram)
            tell(cost(base.num_blocks, workload))
            directory = scratch / f"sensitivity-{number}-branches"
            found.append(
                measure_sensitivity(
                    base, other, directory, head_bytes=head_bytes, progress=progress
                )
            )
    return found


def _candidate(
    setting: Setting,
    subject: Subject,
    measured: Measured,
    number: int,
    divergence: Divergence,
    sensitivity: tuple[BlockSensitivity, ...],
    whole: Whole,
    asked: Sequence[Verdicts],
    kv: str,
) -> Candidate:
    seen = measured.looked[number]
    found = (*_answers(setting, measured, number), *_harness_answers(asked, number))
    tasks: tuple[TaskComparison, ...] = ()
    if found:
        tasks = compare_answers(
            [answer.task for answer in found],
            [answer.original for answer in found],
            [answer.quantized for answer in found],
        )
    defects = None
    if subject.comparable is None:
        defects = sum(weight.defect is not None for weight in seen.weights)
    tokens = setting.text.protocol.scored_tokens
    judgements = tuple(judge(limit, divergence, tasks, defects, tokens) for limit in setting.limits)
    return Candidate(
        identity=subject.identity,
        divergence=divergence,
        tasks=tasks,
        answers=found,
        blocks=tuple(seen.blocks),
        sensitivity=sensitivity,
        weights=tuple(seen.weights),
        weights_note=subject.comparable,
        judgements=judgements,
        outcome=worst(judgement.outcome for judgement in judgements),
        completions=whole.completions(number),
        completions_note=whole.note,
        worst_tokens=_worst_tokens(setting, divergence),
        notes=_notes(setting, subject, kv),
    )


def _answers(setting: Setting, measured: Measured, number: int) -> tuple[Answer, ...]:
    """Who answered each question of the tasks that are part of the workload."""
    start = len(setting.sequences)
    before, after = (
        answers(setting.items, scores, setting.workload, start)
        for scores in (measured.base, measured.pairs[number].scores)
    )
    return tuple(
        Answer(task=item.task, label=item.label, original=one, quantized=other)
        for item, one, other in zip(setting.items, before, after, strict=True)
    )


def _harness_answers(asked: Sequence[Verdicts], number: int) -> tuple[Answer, ...]:
    """Who answered each question of lm-eval's tasks."""
    return tuple(
        Answer(task=task.task, label=label, original=one, quantized=other)
        for task in asked
        for label, one, other in zip(
            task.labels, task.right[0], task.right[number + 1], strict=True
        )
    )


def _computed(request: EvaluationRequest, setting: Setting, whole: Whole) -> tuple[Fact, ...]:
    streamed = "float32, block by block, quantized weights decoded"
    facts = [Fact(name="divergence, perplexity, own tasks", value=streamed)]
    if whole.texts or whole.logs:
        dtype = str(whole_dtype(setting)).removeprefix("torch.")
        names = [
            *(["completions"] if whole.texts else []),
            *(["lm-eval's tasks"] if whole.logs else []),
        ]
        facts.append(
            Fact(name=", ".join(names), value=f"{dtype}, whole models, backend {request.backend}")
        )
    return tuple(facts)


def _worst_tokens(setting: Setting, divergence: Divergence) -> tuple[TokenShown, ...]:
    decode = setting.tokenizer.decode
    found = []
    for worst_token in divergence.worst:
        ids = setting.sequences[worst_token.window].ids
        start = max(0, worst_token.position - _CONTEXT_TOKENS)
        found.append(
            TokenShown(
                before=decode(ids[start : worst_token.position]),
                token=decode([worst_token.token]),
                best_original=decode([worst_token.best_original]),
                best_quantized=decode([worst_token.best_quantized]),
                kl=worst_token.kl,
            )
        )
    return tuple(found)


def _notes(setting: Setting, subject: Subject, kv: str) -> tuple[str, ...]:
    """What a reader should know before trusting the numbers."""
    notes = []
    if (cached := cached_as(subject.source, kv)) is not None:
        notes.append(
            f"Keys and values were rounded to {cached} as a cache holds them, but not in "
            "completions and lm-eval's tasks."
        )
    calibration = None if subject.recorded is None else subject.recorded.get("calibration")
    if calibration is not None:
        used = {calibration.get("file_sha256"), calibration.get("revision")} - {None}
        here = {fact.value for fact in setting.text.facts}
        same_split = calibration.get("split") in (None, setting.text.split)
        if used & here and same_split:
            notes.append(
                "It was calibrated on this very text: the numbers look better than they are. "
                "Evaluate on other text."
            )
    if (count := len(setting.sequences)) < 20:
        kind = "windows" if setting.talks is None else "conversations"
        notes.append(
            f"The text gives {count} {kind} only: intervals are wide, and "
            "rare large errors may not have shown."
        )
    return tuple(notes)
