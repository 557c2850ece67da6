"""Documents for calibration: what a source's name, or a Python object, stands for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.calibration.data.documents import (
    Corpus,
    Document,
    Origin,
    Wanted,
    dataset_corpus,
    no_such_file,
    shuffled,
    to_document,
)
from quantkit.calibration.data.tables import (
    BUILDERS,
    dataset_fingerprint,
    named_dataset,
    saved_dataset,
    table_file,
)
from quantkit.calibration.data.talks import holds_images, to_talk
from quantkit.checkpoint.door import TEXT_BYTES, file_sha256, given_path, open_plain
from quantkit.errors import CalibrationError


def open_corpus(
    spec: Any,
    *,
    column: str | None,
    seed: int | None,
    prefer_messages: bool,
    max_characters: int,
    images: bool = False,
) -> Corpus:
    """The documents of a source, read lazily.

    max_characters    how much of a .txt file is read at most
    The rest is as in `Wanted`.  Raises CalibrationError, also later while the documents are read.
    """
    wanted = Wanted(column=column, seed=seed, prefer_messages=prefer_messages, images=images)
    if isinstance(spec, Path):
        spec = str(spec)
    if not isinstance(spec, str):
        return _python_corpus(spec, wanted)
    source, column = _split_column(spec, column)
    wanted = dataclasses.replace(wanted, column=column)
    if source == "demo":
        return _demo_corpus(seed)
    path = given_path(source, error=CalibrationError)
    suffix = path.suffix.lower()
    if path.exists() and not (path.is_file() or path.is_dir()):
        # A FIFO or a device; the error says which.
        os.close(open_plain(path, error=CalibrationError))
    if path.is_file() and suffix not in (".txt", *BUILDERS):
        raise CalibrationError(
            f"calibration file {source}: {suffix or 'no'} extension; "
            "allowed are .txt, .jsonl, .parquet and saved dataset directories"
        )
    if suffix == ".txt":
        return _text_file(path, max_characters)
    if suffix in BUILDERS:
        return table_file(path, dataclasses.replace(wanted, folder=path.parent))
    if path.is_dir() and any((path / n).is_file() for n in ("state.json", "dataset_dict.json")):
        return saved_dataset(path, None, wanted)
    return named_dataset(source, wanted)


def _split_column(spec: str, column: str | None) -> tuple[str, str | None]:
    source, mark, named = spec.rpartition("#")
    if not mark or given_path(spec, error=CalibrationError).exists():
        return spec, column
    if not source or not named:
        raise CalibrationError(f"calibration {spec!r}: write SOURCE#column")
    if column is not None and column != named:
        raise CalibrationError(
            f"calibration {spec!r} names column {named!r}, but column {column!r} was also given"
        )
    return source, named


def _demo_corpus(seed: int | None) -> Corpus:
    from quantkit.demo.corpus import calibration_text

    return Corpus(origin=Origin(source="demo"), documents=shuffled(calibration_text(), seed))


def _text_file(path: Path, max_characters: int) -> Corpus:
    if not path.exists():
        raise no_such_file(path)
    descriptor = open_plain(path, largest=TEXT_BYTES, error=CalibrationError)
    try:
        with os.fdopen(descriptor, encoding="utf-8-sig") as file:
            text = file.read(max_characters)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"calibration file {path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise CalibrationError(f"calibration file {path} cannot be read: {error}") from error
    if not text.strip():
        raise CalibrationError(f"calibration file {path} holds no text")
    origin = Origin(source=path.name, file_sha256=file_sha256(path, error=CalibrationError))
    return Corpus(origin=origin, documents=iter([text]), one_text=True)


def _python_corpus(spec: Any, wanted: Wanted) -> Corpus:
    if hasattr(spec, "column_names") and hasattr(spec, "features"):
        origin = Origin(source="python", revision=dataset_fingerprint(spec))
        return dataset_corpus(spec, origin, wanted)
    if not isinstance(spec, Sequence) or not spec:
        raise CalibrationError(
            f"calibration of type {type(spec).__name__}, {'empty' if not spec else 'unusable'}: "
            "give a source name, a list of strings, a datasets.Dataset or token ids"
        )
    documents: list[Document | None] = []
    for index, value in enumerate(spec):
        where = f"entry {index}"
        if wanted.images and any(holds_images(one) for one in spec):
            documents.append(to_talk(value, None, where, None))
        else:
            documents.append(to_document(value, where))
    return Corpus(
        origin=Origin(source="python"),
        documents=shuffled([d for d in documents if d], wanted.seed),
    )
