"""Accuracy before and after on questions with one right answer, paired question by question."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quantkit_eval.errors import EvaluationError
from quantkit_eval.figures.scoring import Scores
from quantkit_eval.figures.statistics import (
    Interval,
    detectable_drop,
    holm,
    mcnemar,
    paired_drop,
    wilson,
)
from quantkit_eval.sequences import Scored, Workload

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALL = "all"


class Example(Protocol):
    """A question: the model should continue `prompt` with `answer` and a newline."""

    @property
    def task(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question as tokens: one sequence per choice, or one that greedy decoding has to produce.

    gold     index of the right choice; None for exact match
    """

    task: str
    label: str
    sequences: tuple[Scored, ...]
    gold: int | None

    def right(self, scores: Scores, workload: Workload, start: int) -> bool:
        """Whether the model answers it; `start` is where the item's sequences are."""
        if self.gold is None:
            found = workload.slice(start)
            return bool((scores.best[found] == workload.targets[found]).all())
        totals = [
            scores.nll[workload.slice(start + k)].double().sum().item()
            for k in range(len(self.sequences))
        ]
        return min(range(len(totals)), key=totals.__getitem__) == self.gold


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """Accuracy of one task (or "all") with flips each way.

    lost              right before, wrong after; gained: the other way
    accuracy_*        shares of right answers, each with its Wilson interval
    drop              accuracy before minus after; its interval is paired
    mcnemar_p         exact p that both kinds of flips are equally likely; holm_p is corrected for
                      the number of tasks ("all" is not one of them)
    detectable        smallest drop that this many questions show with a probability of 80 %
    """

    task: str
    count: int
    right_original: int
    right_quantized: int
    lost: int
    gained: int
    accuracy_original: float
    accuracy_original_interval: Interval
    accuracy_quantized: float
    accuracy_quantized_interval: Interval
    drop: float
    drop_interval: Interval
    mcnemar_p: float
    holm_p: float
    detectable: float


def exact_item(
    tokenizer: PreTrainedTokenizerBase, *, task: str, label: str, prompt: str, answer: str
) -> Item:
    """An item that is right when greedy decoding gives the answer exactly.

    Teacher forced: that is so when every answer token is the argmax given the ones before it.
    """
    before: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    after: list[int] = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
    if not before or not after:
        raise EvaluationError(f"{label}: its {'prompt' if not before else 'answer'} has no tokens")
    ids = (*before, *after)
    sequence = Scored(ids=ids, spans=((len(before), len(ids)),), label=label)
    return Item(task=task, label=label, sequences=(sequence,), gold=None)


def choice_item(
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
    label: str,
    prompt: str,
    choices: Sequence[str],
    gold: int,
) -> Item:
    """An item that is right when the gold choice is the most likely continuation of the prompt."""
    items = [
        exact_item(tokenizer, task=task, label=label, prompt=prompt, answer=choice)
        for choice in choices
    ]
    sequences = tuple(item.sequences[0] for item in items)
    return Item(task=task, label=label, sequences=sequences, gold=gold)


def example_items(
    tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example]
) -> tuple[Item, ...]:
    """Exact-match items of examples such as the demo's; the answer ends with a newline."""
    return tuple(
        exact_item(
            tokenizer,
            task=example.task,
            label=f"{example.task} item {number}",
            prompt=example.prompt,
            answer=f"{example.answer}\n",
        )
        for number, example in enumerate(examples)
    )


def answers(items: Sequence[Item], scores: Scores, workload: Workload, start: int) -> list[bool]:
    """Whether each item was answered; their sequences are in the workload from `start` on."""
    right = []
    for item in items:
        right.append(item.right(scores, workload, start))
        start += len(item.sequences)
    return right


def compare_answers(
    tasks: Sequence[str], before: Sequence[bool], after: Sequence[bool]
) -> tuple[TaskComparison, ...]:
    """One comparison per task, in order of appearance, and "all" at the end if there are several.

    tasks: each question's; before and after: whether the two models answered it.
    """
    if not tasks:
        raise EvaluationError("no task questions; give at least one")
    names = list(dict.fromkeys(tasks))
    pairs = list(zip(tasks, before, after, strict=True))
    found = [_compare(name, [(b, a) for task, b, a in pairs if task == name]) for name in names]
    adjusted = holm([comparison.mcnemar_p for comparison in found])
    found = [dataclasses.replace(c, holm_p=p) for c, p in zip(found, adjusted, strict=True)]
    if len(found) > 1:
        found.append(_compare(ALL, [(b, a) for _, b, a in pairs]))
    return tuple(found)


def _compare(task: str, pairs: Sequence[tuple[bool, bool]]) -> TaskComparison:
    count = len(pairs)
    lost = sum(before and not after for before, after in pairs)
    gained = sum(after and not before for before, after in pairs)
    right_original = sum(before for before, _ in pairs)
    right_quantized = sum(after for _, after in pairs)
    p = mcnemar(lost, gained)
    return TaskComparison(
        task=task,
        count=count,
        right_original=right_original,
        right_quantized=right_quantized,
        lost=lost,
        gained=gained,
        accuracy_original=right_original / count,
        accuracy_original_interval=wilson(right_original, count),
        accuracy_quantized=right_quantized / count,
        accuracy_quantized_interval=wilson(right_quantized, count),
        drop=(lost - gained) / count,
        drop_interval=paired_drop(lost, gained, count),
        mcnemar_p=p,
        holm_p=p,
        detectable=detectable_drop(lost + gained, count),
    )
