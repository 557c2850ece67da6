"""A report directory that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from quantkit.checkpoint.disk import disk_errors, refuse_links, sync_directory, write_file
from quantkit.checkpoint.door import RECORD_BYTES, given_path, read_json
from quantkit.errors import CheckpointError, OutputError
from quantkit_eval.records import SCHEMA

REPORT_JSON = "report.json"
_SCRATCH = ".scratch"


@contextmanager
def report_directory(out: Path) -> Iterator[Path]:
    """A directory to work in, removed in the end whatever happens; it lies beside `out`.

    Raises OutputError at once if `out` holds something else than an earlier report.
    """
    out = Path(os.path.abspath(given_path(out, error=OutputError)))
    check_replaceable(out)
    work = Path(f"{out}.partial")
    with disk_errors(work):
        refuse_links(work)
        if work.exists() and not (work / _SCRATCH).is_dir():
            raise OutputError(f"{work}: exists and is no unfinished report; remove it")
        shutil.rmtree(work, ignore_errors=True)
        (work / _SCRATCH).mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def scratch(work: Path) -> Path:
    """Where hidden states go."""
    return work / _SCRATCH


def publish(work: Path, out: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files to `work` and puts it in the place of `out` by renaming."""
    out = Path(os.path.abspath(given_path(out, error=OutputError)))
    check_replaceable(out)
    with disk_errors(work):
        shutil.rmtree(work / _SCRATCH, ignore_errors=True)
        for name, content in files.items():
            write_file(work / name, content)
        old = out.with_name(out.name + ".replaced")
        shutil.rmtree(old, ignore_errors=True)
        if out.is_dir() and any(out.iterdir()):
            out.rename(old)
        work.rename(out)
        sync_directory(out.parent)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(out: Path) -> None:
    """Raises OutputError unless `out` is free, empty, or holds an earlier report alone."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        schema = read_json(out / REPORT_JSON, largest=RECORD_BYTES).get("schema")
    except CheckpointError:
        schema = None
    family = SCHEMA.partition("/")[0]
    foreign = [] if not out.is_dir() else [p.name for p in out.iterdir() if not p.match("report.*")]
    if not str(schema).startswith(family) or foreign:
        raise OutputError(
            f"{out}: exists and holds something else than an evaluation report; choose another "
            "--out or remove it"
        )
