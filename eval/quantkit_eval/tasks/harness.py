"""Tasks of lm-evaluation-harness asked of models, question by question.

Its own standard errors treat two models as
unrelated; here only its logs are used, and the questions are paired.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantkit_eval.errors import EvaluationError
from quantkit_eval.tasks.harness_tasks import HarnessTask, rises

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# lm-eval's own seeds, so that few-shot examples are those of its published numbers.
_PYTHON_SEED, _OTHER_SEED = 0, 1234


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """What one model got for one question: `scores` by metric; `prompt` is a hash of the prompt."""

    member: str
    number: int
    prompt: str
    filter: str
    scores: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """A task's questions and, for each model in turn, which of them were right."""

    task: str
    metric: str
    filter: str
    labels: tuple[str, ...]
    right: tuple[tuple[bool, ...], ...]


def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[HarnessTask],
    *,
    limit: int | None,
    batch_size: int,
) -> tuple[LogLine, ...]:
    """The model's log of all questions, of each task the first `limit`.

    The model loses its `quantization_config`: lm-eval hands that to transformers' quantizers, and
    they are not what runs here.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model.config.__dict__.pop("quantization_config", None)
    members = {name: member for task in tasks for name, member in task.members.items()}
    with _seeded():
        for member in members.values():
            if member.get_config("num_fewshot") is None:
                member.set_config("num_fewshot", 0)
            # Each model gets the same examples in its prompts.
            member.set_fewshot_seed(seed=_OTHER_SEED)
        # It warns of models that are handed over, which is meant here.
        with _only_errors("lm_eval"):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = evaluate(
            lm=wrapped,
            task_dict={"tasks": members},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    return tuple(
        LogLine(
            member=name,
            number=sample["doc_id"],
            prompt=sample["prompt_hash"],
            filter=sample["filter"],
            scores={metric: sample[metric] for metric in sample["metrics"]},
        )
        for name in members
        for sample in results["samples"][name]
    )


def verdicts(task: HarnessTask, logs: Sequence[Sequence[LogLine]]) -> Verdicts:
    """Who answered each question of a task; `logs` are those of the models, the original's first.

    Raises EvaluationError if the metric is no yes or no, or if prompts differ between models.
    """
    own = [[line for line in log if line.member in task.members] for log in logs]
    chosen = task.filter or own[0][0].filter
    own = [[line for line in log if line.filter == chosen] for log in own]
    if not own[0]:
        filters = ", ".join(dict.fromkeys(line.filter for line in logs[0]))
        raise EvaluationError(f"--tasks: {task.name} has no filter {chosen!r}; it has {filters}")
    metric = _metric(task, own)
    questions = [[(line.member, line.number, line.prompt) for line in log] for log in own]
    if any(other != questions[0] for other in questions[1:]):
        raise EvaluationError(
            f"--tasks: lm-eval's {task.name} asks two models different questions: it draws them "
            "anew each time, so its answers cannot be paired"
        )
    return Verdicts(
        task=task.name,
        metric=metric,
        filter=chosen,
        labels=tuple(f"{line.member} {line.number}" for line in own[0]),
        right=tuple(tuple(float(line.scores[metric]) == 1 for line in log) for log in own),
    )


def description(task: HarnessTask, asked: Verdicts) -> str:
    """Where a task's questions come from and how they are scored, in a line."""
    some = next(iter(task.members.values()))
    shots = sorted({member.get_config("num_fewshot") or 0 for member in task.members.values()})
    parts = [
        f"lm-eval {importlib.metadata.version('lm-eval')}",
        f"task version {some.VERSION}",
        f"{' or '.join(map(str, shots))} examples in the prompt",
        f"{asked.metric} of filter {asked.filter}",
        f"{len(asked.labels)} questions",
    ]
    if len(task.members) > 1:
        parts.insert(1, f"{len(task.members)} tasks pooled")
    return ", ".join(parts)


def _metric(task: HarnessTask, logs: Sequence[Sequence[LogLine]]) -> str:
    """The metric asked for, or the first that is 0 or 1 for every question of every model."""
    known = list(dict.fromkeys(metric for line in logs[0] for metric in line.scores))
    rising = [m for m in known if all(rises(member, m) for member in task.members.values())]
    for metric in rising if task.metric is None else [task.metric]:
        if all(_is_binary(line.scores.get(metric)) for log in logs for line in log):
            return metric
    given = "none of its metrics is" if task.metric is None else f"its {task.metric} is not"
    raise EvaluationError(
        f"--tasks: {task.name}: {given} 0 or 1 for each question, so answers cannot be paired; "
        f"it has {', '.join(known)}"
    )


def _is_binary(score: object) -> bool:
    return isinstance(score, bool | int | float | np.number | np.bool_) and float(score) in (0, 1)


@contextlib.contextmanager
def _only_errors(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers as lm-eval seeds them, and in the end as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(_PYTHON_SEED)
        np.random.seed(_OTHER_SEED)
        torch.manual_seed(_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
