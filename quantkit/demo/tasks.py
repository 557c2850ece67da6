"""Generated tasks whose answers are known, so that accuracy can be measured offline."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Split = Literal["train", "heldout"]

HELDOUT_PERCENT = 15
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question: the model should continue `prompt` with `answer` and a newline."""

    task: str
    prompt: str
    answer: str

    @property
    def line(self) -> str:
        """The example as it stands in a training document, newline included."""
        return f"{self.prompt}{self.answer}\n"


class _Draw(NamedTuple):
    # `key` is what decides the split: all prompts that ask the same thing share it.
    key: str
    prompt: str
    answer: str


def _addition(rng: random.Random) -> _Draw:
    first, second = rng.randrange(100), rng.randrange(100)
    low, high = sorted((first, second))
    return _Draw(f"{low} {high}", f"{first}+{second}=", str(first + second))


def _recall(rng: random.Random) -> _Draw:
    keys = rng.sample(LETTERS, rng.randint(3, 5))
    pairs = {key: rng.randrange(10) for key in keys}
    asked = rng.choice(keys)
    listing = " ".join(f"{key}={value}" for key, value in pairs.items())
    return _Draw(f"{listing} {asked}", f"given {listing} then {asked}=", str(pairs[asked]))


def _sort(rng: random.Random) -> _Draw:
    letters = rng.sample(LETTERS, 4)
    answer = "".join(f" {letter}" for letter in sorted(letters))
    return _Draw(answer, f"sort {' '.join(letters)}:", answer)


def _larger(rng: random.Random) -> _Draw:
    first, second = rng.sample(range(10, 100), 2)
    low, high = sorted((first, second))
    return _Draw(f"{low} {high}", f"larger of {first} and {second}: ", str(high))


def _reverse(rng: random.Random) -> _Draw:
    letters = rng.sample(LETTERS, 4)
    prompt = f"reverse {' '.join(letters)}:"
    return _Draw(prompt, prompt, "".join(f" {letter}" for letter in reversed(letters)))


_DRAWS: tuple[tuple[str, Callable[[random.Random], _Draw]], ...] = (
    ("addition", _addition),
    ("recall", _recall),
    ("sort", _sort),
    ("larger", _larger),
    ("reverse", _reverse),
)

TASKS: tuple[str, ...] = tuple(name for name, _ in _DRAWS)

# Addition is the hardest to learn, so training shows it more often.
_TRAINING_WEIGHTS = tuple(2 if name == "addition" else 1 for name in TASKS)


def split_of(task: str, key: str) -> Split:
    """The split that a question belongs to, by a hash of what it asks."""
    digest = hashlib.sha256(f"{task}/{key}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % 100 < HELDOUT_PERCENT else "train"


def examples(task: str, split: Split, count: int, seed: int) -> list[Example]:
    """`count` examples of a task from one split, the same ones for the same seed.

    The two splits share no question: for the arithmetic and ordering tasks not even with the
    operands swapped.  Examples may repeat.  Raises CalibrationError for an unknown task or split.
    """
    rng = random.Random(f"{task}/{split}/{seed}")
    return [draw(task, split, rng) for _ in range(count)]


def draw(task: str, split: Split, rng: random.Random) -> Example:
    """One example of a task from one split, drawn with `rng`."""
    from quantkit.errors import CalibrationError

    make = dict(_DRAWS).get(task)
    if make is None:
        raise CalibrationError(f"task {task!r} is unknown; use one of {', '.join(TASKS)}")
    if split not in ("train", "heldout"):
        raise CalibrationError(f'split {split!r} is unknown; use "train" or "heldout"')
    while True:
        drawn = make(rng)
        if split_of(task, drawn.key) == split:
            return Example(task=task, prompt=drawn.prompt, answer=drawn.answer)


def task_text(split: Split, rng: random.Random) -> str:
    """A document of 1 to 12 examples, one a line."""
    return "".join(example.line for example in task_examples(split, rng))


def task_examples(split: Split, rng: random.Random) -> list[Example]:
    """The 1 to 12 examples of one document, of one task or of all of them mixed."""
    count = rng.randint(1, 12)
    if rng.random() < 0.5:
        chosen = rng.choices(TASKS, _TRAINING_WEIGHTS) * count
    else:
        chosen = rng.choices(TASKS, _TRAINING_WEIGHTS, k=count)
    return [draw(task, split, rng) for task in chosen]
