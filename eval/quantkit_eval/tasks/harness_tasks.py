"""What `--tasks lm-eval:...` names: tasks of lm-evaluation-harness (the extra `[tasks]`).

https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.door import given_path
from quantkit_eval.errors import EvaluationError

PREFIX = "lm-eval:"


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


def load_harness_tasks(
    specs: Sequence[str], *, limit: int | None = None
) -> tuple[HarnessTask, ...]:
    """The tasks of `lm-eval:NAME`, `lm-eval:FILE.yaml` and `lm-eval:DIRECTORY` of YAML files.

    `:METRIC` and `:METRIC:FILTER` may follow.  `limit`: questions of each task.  Reads the tasks'
    data, from the Hub if they lie there.  Raises EvaluationError for what cannot be asked of a
    causal model question by question.
    """
    if not specs:
        return ()
    _require()
    found: list[HarnessTask] = []
    for spec in specs:
        found += _load(spec, limit)
    members = [member for task in found for member in task.members]
    if twice := sorted({name for name in members if members.count(name) > 1}):
        raise EvaluationError(f"--tasks: lm-eval's {twice[0]} is asked for twice; name it once")
    return tuple(found)


def _require() -> None:
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise EvaluationError(
            f'--tasks {PREFIX}...: needs lm-evaluation-harness: pip install "quantkit[tasks]" '
            f"({error})"
        ) from error


def _load(spec: str, limit: int | None) -> list[HarnessTask]:
    """The tasks of one spec: a directory gives one for each of its YAML tasks."""
    from lm_eval.tasks import TaskManager

    name, metric, filter_name = _split(spec)
    path = given_path(name, error=EvaluationError)
    if path.is_dir():
        manager = TaskManager(include_path=str(path), include_defaults=False)
        wanted = list(manager.all_subtasks)
        if not wanted:
            raise EvaluationError(f"--tasks {spec}: no YAML file in it defines an lm-eval task")
    elif path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise EvaluationError(f"--tasks {spec}: there is no such file")
        manager = TaskManager(include_path=str(path.parent), include_defaults=False)
        wanted = [n for n, entry in manager.task_index.items() if _is_at(entry, path)]
        if not wanted:
            raise EvaluationError(f"--tasks {spec}: it defines no lm-eval task")
    else:
        manager = TaskManager()
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=4)
            raise EvaluationError(
                f"--tasks {spec}: lm-eval has no task {name!r}; "
                + (f"near are {', '.join(near)}" if near else "see `lm-eval ls tasks`")
            )
        wanted = [name]
    found = []
    for each in wanted:
        members = _members(spec, manager, each)
        for member, task in members.items():
            _check(spec, member, task, metric, filter_name)
            _check_answers(spec, member, task, limit)
        found.append(HarnessTask(name=each, members=members, metric=metric, filter=filter_name))
    return found


def _is_at(entry: Any, path: Path) -> bool:
    return entry.yaml_path is not None and entry.yaml_path.resolve() == path.resolve()


def _members(spec: str, manager: Any, name: str) -> dict[str, Any]:
    try:
        return dict(manager.load([name])["tasks"])
    # Whatever a task's own code, its data set or the network may raise.
    except Exception as error:
        text = (str(error).strip().splitlines() or ["without a reason"])[0]
        entry = manager.task_index.get(name)
        config = {} if entry is None else entry.cfg or {}
        if "task" in config and not {"doc_to_target", "class", "process_results"} & set(config):
            text += "; it names no gold answers (doc_to_target)"
        raise EvaluationError(
            f"--tasks {spec}: lm-eval cannot load {name}: {type(error).__name__}: {text}"
        ) from error


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
    known = [found for found in task.aggregation() if rises(task, found)]
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


def _check_answers(spec: str, name: str, task: Any, limit: int | None) -> None:
    """Raises EvaluationError for a question without a gold answer: lm-eval calls it wrong."""
    choices = task.get_config("output_type") == "multiple_choice"
    if task.get_config("process_results") is not None or getattr(task, "multiple_input", False):
        # What the answer is only their own code knows.
        return
    for number, doc in enumerate(itertools.islice(task.eval_docs, limit)):
        gold = task.doc_to_target(doc)
        missing = gold is None or (isinstance(gold, str) and not gold.strip())
        if choices and isinstance(gold, int):
            missing = not 0 <= gold < len(task.doc_to_choice(doc))
        elif choices and isinstance(gold, str):
            missing = gold not in task.doc_to_choice(doc)
        if missing:
            raise EvaluationError(
                f"--tasks {spec}: question {number} of {name} has no gold answer ({gold!r}); a "
                "question needs one to be scored"
            )


def rises(task: Any, metric: str) -> bool:
    """Whether more of a metric is better, as far as the task says."""
    return bool(task.higher_is_better().get(metric, True))
