"""Tables of documents through the `datasets` library: files, saved datasets and the Hub."""

from __future__ import annotations

import contextlib
import glob
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.calibration.data.documents import (
    Corpus,
    Origin,
    Wanted,
    dataset_corpus,
    first_line,
    no_such_file,
    unreadable,
)
from quantkit.checkpoint.door import TEXT_BYTES, file_sha256, given_path
from quantkit.errors import CalibrationError

# Suffix -> module and class, in the datasets library, of what reads such a file.
BUILDERS = {
    ".jsonl": ("json.json", "Json"),
    ".json": ("json.json", "Json"),
    ".parquet": ("parquet.parquet", "Parquet"),
}


def table_file(path: Path, wanted: Wanted) -> Corpus:
    """The rows of a .jsonl or .parquet file."""
    if not path.exists():
        raise no_such_file(path)
    digest = file_sha256(path, largest=TEXT_BYTES, error=CalibrationError)
    if path.stat().st_size == 0:
        raise CalibrationError(f"calibration file {path} is empty")
    datasets = _datasets(str(path))
    _refuse_chained(path)
    try:
        with _quiet_unless_terminal(datasets):
            rows = _rows_of(datasets, path, digest)
    except Exception as error:
        raise unreadable(str(path), error) from error
    origin = Origin(source=path.name, file_sha256=digest)
    return dataset_corpus(rows, origin, wanted)


def _rows_of(datasets: Any, path: Path, digest: str) -> Any:
    """The rows of this very file: `load_dataset` would take its name for a pattern.

    The library's cache goes by the content's sha256, so a file that was changed is read again.
    """
    module, name = BUILDERS[path.suffix.lower()]
    builder_class = getattr(importlib.import_module(f"datasets.packaged_modules.{module}"), name)
    absolute = str(path.absolute())
    files = datasets.data_files.DataFilesList([absolute], [(digest,)])
    builder = builder_class(data_files=datasets.data_files.DataFilesDict({"train": files}))
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


def _refuse_chained(path: Path) -> None:
    """CalibrationError for a name that the datasets library would take apart."""
    if "::" in str(path) or "://" in str(path):
        raise CalibrationError(
            f"calibration {path}: the datasets library takes :: and :// in a name for addresses; "
            "rename the file or its folder, or link to it by another name"
        )


def saved_dataset(path: Path, split: str | None, wanted: Wanted) -> Corpus:
    """The rows of a directory that `save_to_disk` wrote."""
    datasets = _datasets(str(path))
    _refuse_chained(path)
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise unreadable(str(path), error) from error
    rows, chosen = _choose_split(loaded, split, str(path))
    origin = Origin(source=path.name, split=chosen, revision=dataset_fingerprint(rows))
    return dataset_corpus(rows, origin, wanted)


def named_dataset(source: str, wanted: Wanted) -> Corpus:
    """The rows of NAME[@revision][:config[:split]], on the Hub or a folder of data files."""
    if given_path(source, error=CalibrationError).is_dir():
        # A folder's own name may hold colons.
        name, config, split = source, None, None
    else:
        name, config, split = _parse_name(source)
    local = given_path(name, error=CalibrationError)
    if local.is_dir() and (local / "dataset_dict.json").is_file():
        return saved_dataset(local, split or config, wanted)
    if not local.is_dir() and name.startswith(("/", ".", "~")):
        raise no_such_file(local)
    if local.is_dir():
        _refuse_chained(local)
        if glob.has_magic(str(local.absolute())):
            raise CalibrationError(
                f"calibration {source}: the datasets library takes [, * and ? in the path of a "
                "folder for a pattern; give one file, or rename the folder"
            )
    name, _, revision = (name, "", "") if local.is_dir() else name.partition("@")
    datasets = _datasets(source)
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision or None)
        # Streaming reads no more of a dataset than the windows need.
        loaded = builder.as_streaming_dataset()
    except Exception as error:
        raise CalibrationError(
            f"calibration {source!r} is no readable file and cannot be opened as a dataset: "
            f"{first_line(error)}; give demo, NAME[:config[:split]], .txt, .jsonl, .parquet "
            "or a saved dataset directory"
        ) from error
    rows, chosen = _choose_split(loaded, split, source)
    origin = Origin(
        source=local.name if local.is_dir() else name,
        config=str(builder.config.name),
        split=chosen,
        revision=_revision(builder) or revision or None,
    )
    return dataset_corpus(rows, origin, wanted)


def _parse_name(source: str) -> tuple[str, str | None, str | None]:
    name, *rest = source.split(":")
    if not name or len(rest) > 2:
        raise CalibrationError(
            f"calibration {source!r}: write NAME, NAME:config, NAME:config:split"
        )
    config, split = [part or None for part in (*rest, "", "")[:2]]
    return name, config, split


def _revision(builder: Any) -> str | None:
    base = str(builder.base_path or "")
    if base.startswith("hf://"):
        # hf://datasets/OWNER/NAME@COMMIT/...
        return base.partition("@")[2].partition("/")[0] or None
    return None if builder.hash is None else str(builder.hash)


def _choose_split(loaded: Any, wanted: str | None, source: str) -> tuple[Any, str | None]:
    if not isinstance(loaded, Mapping):
        if wanted is not None:
            raise CalibrationError(f"calibration {source} has no splits, {wanted!r} was asked for")
        return loaded, None
    names = sorted(loaded)
    chosen = wanted or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    if chosen not in loaded:
        asked = f"no split {wanted!r}" if wanted else "several splits"
        raise CalibrationError(
            f"calibration {source} has {asked}; its splits: {', '.join(names)}; "
            "write NAME:config:split"
        )
    return loaded[chosen], chosen


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"calibration {source} needs the package datasets (pip install datasets); "
            "demo and .txt files work without it"
        ) from error
    return datasets


@contextlib.contextmanager
def _quiet_unless_terminal(datasets: Any) -> Iterator[None]:
    hide = not sys.stderr.isatty() and not datasets.utils.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def dataset_fingerprint(rows: Any) -> str | None:
    """What the `datasets` library knows the rows by."""
    fingerprint = getattr(rows, "_fingerprint", None)
    return None if fingerprint is None else str(fingerprint)
