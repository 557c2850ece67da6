"""What `--tasks` names: the demo's tasks, and questions in a JSON lines file.

A line of a file is {"prompt": ..., "answer": ...} for an exact match, or {"prompt": ...,
"choices": [...], "answer": index or text} for multiple choice; "task" names its task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit_eval.errors import EvaluationError
from quantkit_eval.tasks import Item, choice_item, exact_item, example_items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEYS = ("prompt", "answer", "choices", "task")


def parse_tasks(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, limit: int, seed: int
) -> tuple[Item, ...]:
    """The questions of `demo`, `demo:NAME` and FILE.jsonl, in the given order.

    limit   questions of each demo task
    Raises EvaluationError for names that are none of these, and for questions without an answer.
    """
    items: list[Item] = []
    for name in names:
        if name.partition(":")[0] == "demo":
            items += _demo_items(name, tokenizer, limit, seed)
        elif name.endswith((".jsonl", ".json")):
            items += read_items(Path(name), tokenizer)
        else:
            raise EvaluationError(
                f"--tasks {name!r}: write demo, demo:NAME or a .jsonl file of questions"
            )
    return tuple(items)


def read_items(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Item, ...]:
    """The questions of a JSON lines file.  Raises EvaluationError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"--tasks {path}: cannot be read: {error}") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            items.append(_item(line, f"{path.name} line {number}", path.stem, tokenizer))
    if not items:
        raise EvaluationError(f"--tasks {path}: there are no questions in it")
    return tuple(items)


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
    except ValueError as error:
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
