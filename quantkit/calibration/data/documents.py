"""Documents from the rows of a table: which column, in which order, texts or messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from quantkit_kernels.lazy import torch

from quantkit.calibration.data.talks import (
    IMAGE_COLUMNS,
    holds_images,
    renamed,
    rows_of_structs,
    to_talk,
    undecoded,
)
from quantkit.checkpoint.processor import Talk
from quantkit.errors import CalibrationError

T = TypeVar("T")
Message = Mapping[str, Any]

_MESSAGE_COLUMNS = ("messages", "conversations")
_TEXT_COLUMNS = ("text", "content")
# Rows of a streamed dataset that are shuffled among one another.
_SHUFFLE_BUFFER = 10_000


Document = str | list[dict[str, Any]] | Talk


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where documents came from: a name without directories, and hashes."""

    source: str
    config: str | None = None
    split: str | None = None
    column: str | None = None
    revision: str | None = None
    file_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in their final order; `one_text` is a single text without document boundaries."""

    origin: Origin
    documents: Iterator[Document]
    one_text: bool = False


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which documents of a source are read.

    column            the one of texts or messages; None lets it be found
    seed              decides their order; None keeps the stored one, empty rows too
    prefer_messages   where rows have both text and messages, take the messages
    images            where rows or messages hold images, take these too
    folder            where names of image files begin
    """

    column: str | None
    seed: int | None
    prefer_messages: bool
    images: bool = False
    folder: Path | None = None


def dataset_corpus(rows: Any, origin: Origin, wanted: Wanted) -> Corpus:
    """The documents of a datasets.Dataset or IterableDataset, in an order that the seed decides.

    Without a seed every row in its stored order, empty ones as empty texts: what perplexity
    protocols join.
    """
    seed = wanted.seed
    rows, pictures = undecoded(rows)
    first = next(iter(guarded(rows, origin.source)), None)
    if first is None:
        raise CalibrationError(f"calibration {origin.source} has no rows")
    pictures = pictures or next((name for name in IMAGE_COLUMNS if name in first), None)
    column = _choose_column(first, wanted.column, wanted.prefer_messages, origin.source)
    ordered: Any
    if seed is None:
        ordered = rows
    elif hasattr(rows, "__len__"):
        ordered = (rows[index] for index in _order(len(rows), seed))
    else:
        ordered = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    origin = dataclasses.replace(origin, column=column)
    checked = guarded(ordered, origin.source)
    if wanted.images and (pictures is not None or holds_images(first[column])):
        where = f"{origin.source}, column {column!r}"
        talks = (
            to_talk(row[column], row[pictures] if pictures else None, where, wanted.folder)
            for row in checked
        )
        return Corpus(origin=origin, documents=(talk for talk in talks if talk is not None))
    return Corpus(
        origin=origin,
        documents=_column_documents(checked, column, origin.source, keep_empty=seed is None),
    )


def to_document(value: Any, where: str) -> str | list[dict[str, Any]] | None:
    """A text, a list of {role, content} messages, or None if there is nothing in it."""
    if value is None:
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    value = rows_of_structs(value)
    if isinstance(value, Sequence) and all(isinstance(part, Mapping) for part in value):
        return [_message(part, where) for part in value] or None
    raise CalibrationError(
        f"calibration {where}: holds {type(value).__name__}; "
        "text or a list of {role, content} messages is needed"
    )


def shuffled(items: Sequence[T], seed: int | None) -> Iterator[T]:
    """The items in an order that the seed decides; without one in their own."""
    if seed is None:
        return iter(items)
    return (items[index] for index in _order(len(items), seed))


def guarded(rows: Iterable[Any], source: str) -> Iterator[Any]:
    """The rows; whatever a reader raises while reading them becomes a CalibrationError."""
    try:
        yield from rows
    except CalibrationError:
        raise
    except Exception as error:
        raise unreadable(source, error) from error


def no_such_file(path: Path) -> CalibrationError:
    """The error for a file that is not there."""
    return CalibrationError(f"calibration file {path} does not exist")


def unreadable(source: str, error: Exception) -> CalibrationError:
    """The error for a source that cannot be read, with the innermost reason."""
    return CalibrationError(f"calibration {source} cannot be read: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The innermost cause in one line."""
    # datasets wraps the reason that a user can act on.
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _column_documents(
    rows: Iterable[Mapping[str, Any]], column: str, source: str, *, keep_empty: bool
) -> Iterator[Document]:
    found = False
    for row in rows:
        document = to_document(row[column], f"{source}, column {column!r}")
        if document:
            found = True
            yield document
        elif keep_empty:
            yield row[column] or ""
    if not found:
        raise CalibrationError(f"calibration {source}: column {column!r} is empty in every row")


def _choose_column(
    row: Mapping[str, Any], wanted: str | None, prefer_messages: bool, source: str
) -> str:
    """The column of text or messages: `wanted`, one of the usual names, or the only string."""
    columns = list(row)
    if wanted is not None:
        if wanted not in columns:
            raise CalibrationError(
                f"calibration {source} has no column {wanted!r}; its columns: {', '.join(columns)}"
            )
        return wanted
    messages = [name for name in _MESSAGE_COLUMNS if name in columns]
    texts = [name for name in _TEXT_COLUMNS if name in columns]
    for name in [*messages, *texts] if prefer_messages else [*texts, *messages]:
        return name
    strings = [name for name in columns if isinstance(row[name], str)]
    if len(strings) == 1:
        return strings[0]
    raise CalibrationError(
        f"calibration {source}: which column holds the text? Its columns: {', '.join(columns)}; "
        "write SOURCE#column"
    )


def _message(message: Message, where: str) -> dict[str, Any]:
    found = renamed(message, where)
    return {**found, "content": _content(found["content"], where)}


def _content(content: Any, where: str) -> Any:
    """A message's text; of a list of parts their texts, one to a line, as servers join them.

    Chat templates of text models would write the list itself.  CalibrationError for other parts.
    """
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise CalibrationError(
                f"calibration {where}: a message holds a part of type {kind!r}; only parts of "
                "text can be calibrated on"
            )
        texts.append(text)
    return "\n".join(texts)


def _order(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    return (int(index) for index in torch.randperm(count, generator=generator))
