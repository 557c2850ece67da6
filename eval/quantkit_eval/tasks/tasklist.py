"""What `--tasks` names: the demo's tasks, questions in a JSON lines file, lm-eval's tasks.

A line of a file is {"prompt": ..., "answer": ...} for an exact match, or {"prompt": ...,
"choices": [...], "answer": index or text} for multiple choice; "task" names its task.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.door import given_path, read_plain
from quantkit_eval.errors import EvaluationError
from quantkit_eval.tasks.accuracy import ALL, Item, choice_item, exact_item, example_items
from quantkit_eval.tasks.harness_tasks import PREFIX, HarnessTask, load_harness_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Questions are held in memory, tokenised.
_LARGEST = 256 * 2**20
_KEYS = ("prompt", "answer", "choices", "task")
# Of each of the demo's tasks, which have no end.
_DEMO_QUESTIONS = 200


@dataclass(frozen=True, kw_only=True)
class TaskList:
    """All that `--tasks` names; `sources` says of each task of `items` where it comes from."""

    items: tuple[Item, ...]
    harness: tuple[HarnessTask, ...]
    sources: dict[str, str]

    @property
    def names(self) -> list[str]:
        """Of all tasks, in order."""
        return [*self.sources, *(task.name for task in self.harness)]


def parse_tasks(
    listed: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, limit: int | None, seed: int
) -> TaskList:
    """The tasks of lists such as `demo,questions.jsonl,lm-eval:arc_easy`.

    limit   questions of each task of the demo (None: 200); lm-eval's know it when they are asked
    Raises EvaluationError for names that are none of these, and for questions without an answer.
    """
    items: list[Item] = []
    sources: dict[str, str] = {}
    names = [name for one in listed for name in _split(one)]
    for name in names:
        if name.startswith(PREFIX):
            continue
        if name.partition(":")[0] == "demo":
            count = _DEMO_QUESTIONS if limit is None else limit
            found = _demo_items(name, tokenizer, count, seed)
            source = f"the demo's held-out questions, {count} of seed {seed}"
        elif name.endswith((".jsonl", ".json")):
            found, digest = read_items(given_path(name, error=EvaluationError), tokenizer)
            source = f"{Path(name).name}, sha256 {digest}"
        else:
            raise EvaluationError(
                f"--tasks {name!r}: write demo, demo:NAME, a .jsonl file of questions, or "
                f"{PREFIX}NAME for a task of lm-evaluation-harness"
            )
        items += found
        for item in found:
            sources[item.task] = source
    harness = load_harness_tasks([name for name in names if name.startswith(PREFIX)], limit=limit)
    for task in harness:
        if task.name in sources or task.name == ALL:
            raise EvaluationError(f"--tasks: two tasks are called {task.name!r}; rename one")
    return TaskList(items=tuple(items), harness=harness, sources=sources)


def _split(listed: str) -> list[str]:
    """Names between commas; a file's name may hold commas itself."""
    if given_path(listed, error=EvaluationError).is_file():
        return [listed]
    return [name.strip() for name in listed.split(",") if name.strip()] or [listed]


def read_items(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[Item, ...], str]:
    """A JSON lines file's questions and its sha256.  Raises EvaluationError naming the line."""
    content = read_plain(path, largest=_LARGEST, error=EvaluationError)
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise EvaluationError(f"--tasks {path}: cannot be read: {error}") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            items.append(_item(line, f"{path.name} line {number}", path.stem, tokenizer))
    if not items:
        raise EvaluationError(f"--tasks {path}: there are no questions in it")
    return tuple(items), hashlib.sha256(content).hexdigest()


def _demo_items(
    name: str, tokenizer: PreTrainedTokenizerBase, limit: int, seed: int
) -> tuple[Item, ...]:
    from quantkit.demo.tasks import TASKS, examples

    asked = name.partition(":")[2]
    if asked and asked not in TASKS:
        raise EvaluationError(f"--tasks {name!r}: the demo's tasks are {', '.join(TASKS)}")
    chosen = [asked] if asked else list(TASKS)
    return example_items(
        tokenizer, [e for task in chosen for e in examples(task, "heldout", limit, seed)]
    )


def _item(line: str, where: str, default_task: str, tokenizer: PreTrainedTokenizerBase) -> Item:
    try:
        question: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where}: is not JSON: {error}") from error
    if not isinstance(question, Mapping) or not isinstance(question.get("prompt"), str):
        raise EvaluationError(f'{where}: write {{"prompt": ..., "answer": ...}}')
    if unknown := [key for key in question if key not in _KEYS]:
        raise EvaluationError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}")
    answer = question.get("answer")
    if answer is None:
        raise EvaluationError(
            f"{where}: there is no gold answer; a question needs one to be scored"
        )
    task = str(question.get("task", default_task))
    prompt = question["prompt"]
    if "choices" not in question:
        if not isinstance(answer, str):
            raise EvaluationError(f"{where}: the answer of an exact match is a text")
        return exact_item(tokenizer, task=task, label=where, prompt=prompt, answer=answer)
    choices = question["choices"]
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) for choice in choices)
    ):
        raise EvaluationError(f"{where}: choices are a list of two or more texts")
    return choice_item(
        tokenizer,
        task=task,
        label=where,
        prompt=prompt,
        choices=choices,
        gold=_gold(answer, choices, where),
    )


def _gold(answer: object, choices: Sequence[str], where: str) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    raise EvaluationError(
        f"{where}: the answer {answer!r} is neither one of the choices nor its index "
        f"0..{len(choices) - 1}"
    )
