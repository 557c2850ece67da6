"""Text that every CPython carries, and generated tasks, split into training and held-out."""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import random
import re
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import overload

from quantkit.demo.tasks import Split, task_text

HELDOUT_PERCENT = 10

# Enough for 128 calibration rows of 512 tokens and more than 60k held-out tokens with the English.
_NUM_TASK_DOCUMENTS = {"train": 2500, "heldout": 400}
_SEED = 20240
_MIN_CHARACTERS = 200
# Comments, then a string in three quotes.
_FIRST_STRING = re.compile(
    rb"(?:[ \t]*(?:#[^\n]*)?\r?\n)*[rR]?(?P<quotes>\"\"\"|''')(?P<text>.*?)(?P=quotes)[ \t]*\r?\n",
    re.DOTALL,
)
# The same on lines of its own, further in.
_INNER_STRING = re.compile(
    rb"^[ \t]+[rR]?(?P<quotes>\"\"\"|''')(?P<text>.*?)(?P=quotes)[ \t]*\r?\n",
    re.DOTALL | re.MULTILINE,
)
# A document's name, and what makes its text.
_Named = tuple[str, Callable[[], str]]
_SKIPPED_DIRECTORIES = frozenset(
    {
        "__pycache__",
        "_bundled",
        "dist-packages",
        "encodings",
        "idle_test",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text; its name alone decides whether it is for training or held out."""

    name: str
    text: str


def documents(split: Split) -> list[Document]:
    """English and task documents of one split, in an order that depends on nothing but names.

    The English differs a little between Python versions; the split of a name does not.
    """
    return [Document(name=name, text=text()) for name, text in _ordered(split)]


def calibration_text() -> Sequence[str]:
    """The training documents' texts: at least 128 rows of 512 tokens when packed."""
    return _Texts([text for _, text in _ordered("train")])


def heldout_text() -> list[str]:
    """The held-out documents' texts, none seen in training: at least 60k tokens."""
    return [document.text for document in documents("heldout")]


def english_documents(split: Split) -> list[Document]:
    """The language reference topics and the standard library's docstrings, sorted by name."""
    return [Document(name=name, text=text()) for name, text in _english(split)]


class _Texts(Sequence[str]):
    """Texts that are made when they are asked for: few calibrations need all of them."""

    def __init__(self, texts: Sequence[Callable[[], str]]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return _Texts(self._texts[index])
        return self._texts[index]()


def _ordered(split: Split) -> list[_Named]:
    """Name and text of all documents of a split, in their order."""
    mixed = [*_english(split), *_task_documents(split)]
    return sorted(mixed, key=lambda named: _hash(f"order/{named[0]}"))


def _english(split: Split) -> list[_Named]:
    return [*_topic_documents(split), *_library_documents(split)]


def name_split(name: str) -> Split:
    """The split of an English document, by a hash of its name."""
    return "heldout" if _hash(name) % 100 < HELDOUT_PERCENT else "train"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _topic_documents(split: Split) -> list[_Named]:
    from pydoc_data.topics import topics

    return [
        (f"topics/{name}", partial(str, text.strip() + "\n"))
        for name, text in sorted(topics.items())
        if name_split(f"topics/{name}") == split
    ]


def _library_documents(split: Split) -> list[_Named]:
    root = Path(sysconfig.get_path("stdlib"))
    found: list[_Named] = []
    for relative in sorted(_source_files(root)):
        name = f"library/{relative}"
        # Parsing is the slow part, so it comes after the choice by name.
        if name_split(name) == split:
            source = (root / relative).read_bytes()
            if _surely_long(source) or _long_from_the_start(source):
                found.append((name, partial(_docstrings, source)))
            elif len(text := _docstrings(source)) >= _MIN_CHARACTERS:
                found.append((name, partial(str, text)))
    return found


def _surely_long(source: bytes) -> bool:
    """True if the docstring that a module starts with is long enough alone, which tells without
    parsing the rest; False does not mean that it is not."""
    start = _FIRST_STRING.match(source)
    if start is None or b"coding" in start[0][: start.start("text")] or b"\\" in start["text"]:
        return False
    text = inspect.cleandoc(start["text"].decode("utf-8", "replace"))
    # Names are nothing a module's docstring has, and the last line's end is one more character.
    return len(text) >= _MIN_CHARACTERS


def _long_from_the_start(source: bytes) -> bool:
    """True if docstrings are long enough up to a place that is likely to tell, which takes parsing
    that much only; False does not mean that all of them are not."""
    likely = 0
    for found in _INNER_STRING.finditer(source):
        likely += len(found["text"])
        if likely >= 2 * _MIN_CHARACTERS:
            try:
                return len(_docstrings(source[: found.end()])) >= _MIN_CHARACTERS
            except SyntaxError:
                # Within a statement that ends further down, or within another string.
                return False
    return False


def _source_files(root: Path) -> Iterator[str]:
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_DIRECTORIES]
        for file in files:
            # _sysconfigdata holds build settings of this one machine.
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                yield (Path(directory) / file).relative_to(root).as_posix()


def _docstrings(source: bytes) -> str:
    """All docstrings of a module, level by level."""
    parts = []
    todo: deque[ast.AST] = deque([ast.parse(source)])
    while todo:
        node = todo.popleft()
        # As ast.walk, but for expressions, which hold no docstrings and are most of the nodes.
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            inner = getattr(node, field, None)
            todo.extend(inner if isinstance(inner, list) else ())
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is None or not text.strip():
                continue
            name = "" if isinstance(node, ast.Module) else f"{node.name}: "
            parts.append(name + inspect.cleandoc(text))
    return "\n\n".join(parts) + "\n"


def _task_documents(split: Split) -> list[_Named]:
    rng = random.Random(f"{_SEED}/{split}")
    return [
        (f"tasks/{split}/{index:05d}", partial(str, task_text(split, rng)))
        for index in range(_NUM_TASK_DOCUMENTS[split])
    ]
