"""Tasks of lm-evaluation-harness, asked question by question (the extra `[tasks]`).

https://github.com/EleutherAI/lm-evaluation-harness.  Its own standard errors treat two models as
unrelated; here only its logs are used, and the questions are paired.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantkit_eval.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "lm-eval:"
# lm-eval's own seeds, so that few-shot examples are those of its published numbers.
_PYTHON_SEED, _OTHER_SEED = 0, 1234


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """One `lm-eval:` of `--tasks`: a task, or a group of tasks that are pooled.

    name       what the report calls it
    members    lm-eval's task objects by their names
    metric     the score of a question, filter: lm-eval's filter of responses; None: its first
    """

    name: str
    members: dict[str, Any]
    metric: str | None
    filter: str | None


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


def load_harness_tasks(specs: Sequence[str]) -> tuple[HarnessTask, ...]:
    """The tasks of `lm-eval:NAME`, `lm-eval:FILE.yaml` and `lm-eval:DIRECTORY` of YAML files.

    `:METRIC` and `:METRIC:FILTER` may follow.  Reads the tasks' data, from the Hub if they lie
    there.  Raises EvaluationError for what cannot be asked of a causal model question by question.
    """
    if not specs:
        return ()
    _require()
    found: list[HarnessTask] = []
    for spec in specs:
        found += _load(spec)
    members = [member for task in found for member in task.members]
    if twice := sorted({name for name in members if members.count(name) > 1}):
        raise EvaluationError(f"--tasks: lm-eval's {twice[0]} is asked for twice; name it once")
    return tuple(found)


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


def _require() -> None:
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise EvaluationError(
            f'--tasks {PREFIX}...: needs lm-evaluation-harness: pip install "quantkit[tasks]" '
            f"({error})"
        ) from error


def _load(spec: str) -> list[HarnessTask]:
    """The tasks of one spec: a directory gives one for each of its YAML tasks."""
    from lm_eval.tasks import TaskManager

    name, metric, filter_name = _split(spec)
    path = Path(name).expanduser()
    if path.is_dir():
        manager = TaskManager(include_path=str(path), include_defaults=False)
        names = list(manager.all_subtasks)
        if not names:
            raise EvaluationError(f"--tasks {spec}: no YAML file in it defines an lm-eval task")
        wanted = {each: each for each in names}
    elif path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise EvaluationError(f"--tasks {spec}: there is no such file")
        manager = TaskManager(include_defaults=False)
        wanted = {"": str(path)}
    else:
        manager = TaskManager()
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=4)
            raise EvaluationError(
                f"--tasks {spec}: lm-eval has no task {name!r}; "
                + (f"near are {', '.join(near)}" if near else "see `lm-eval ls tasks`")
            )
        wanted = {name: name}
    found = []
    for title, each in wanted.items():
        try:
            members = dict(manager.load([each])["tasks"])
        # Whatever a task's own code, its data set or the network may raise.
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            raise EvaluationError(
                f"--tasks {spec}: lm-eval cannot load {each}: {type(error).__name__}: {text}"
            ) from error
        for member, task in members.items():
            _check(spec, member, task, metric, filter_name)
        found.append(
            HarnessTask(
                name=title or next(iter(members)),
                members=members,
                metric=metric,
                filter=filter_name,
            )
        )
    return found


def _split(spec: str) -> tuple[str, str | None, str | None]:
    """Name or path, metric and filter."""
    name, *more = spec.removeprefix(PREFIX).split(":")
    if not name or len(more) > 2 or not all(more):
        raise EvaluationError(
            f"--tasks {spec!r}: write {PREFIX}NAME, {PREFIX}NAME:METRIC or "
            f"{PREFIX}NAME:METRIC:FILTER; NAME may be a YAML file or a directory of them"
        )
    metric, filter_name = [*more, None, None][:2]
    return name, metric, filter_name


def _check(spec: str, name: str, task: Any, metric: str | None, filter_name: str | None) -> None:
    """Raises EvaluationError for what shows before models run."""
    if task.get_config("output_type") == "loglikelihood_rolling":
        raise EvaluationError(
            f"--tasks {spec}: {name} is the perplexity of documents, not questions; use --text"
        )
    if getattr(task, "UNSAFE_CODE", False):
        raise EvaluationError(f"--tasks {spec}: {name} runs code that models write; not done here")
    known = [found for found in task.aggregation() if _rises(task, found)]
    if metric is not None and metric not in known:
        raise EvaluationError(
            f"--tasks {spec}: {name} has no metric {metric!r} of which more is better; it has "
            f"{', '.join(known)}"
        )
    filters = [part["name"] for part in task.get_config("filter_list") or ()] or ["none"]
    if filter_name is not None and filter_name not in filters:
        raise EvaluationError(
            f"--tasks {spec}: {name} has no filter {filter_name!r}; it has {', '.join(filters)}"
        )


def _metric(task: HarnessTask, logs: Sequence[Sequence[LogLine]]) -> str:
    """The metric asked for, or the first that is 0 or 1 for every question of every model."""
    known = list(dict.fromkeys(metric for line in logs[0] for metric in line.scores))
    rising = [m for m in known if all(_rises(member, m) for member in task.members.values())]
    for metric in rising if task.metric is None else [task.metric]:
        if all(_is_binary(line.scores.get(metric)) for log in logs for line in log):
            return metric
    given = "none of its metrics is" if task.metric is None else f"its {task.metric} is not"
    raise EvaluationError(
        f"--tasks: {task.name}: {given} 0 or 1 for each question, so answers cannot be paired; "
        f"it has {', '.join(known)}"
    )


def _rises(task: Any, metric: str) -> bool:
    return bool(task.higher_is_better().get(metric, True))


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
