"""What a run has safely written: an append-only file of JSON lines, each on the disk when added.

The first line is the run's fingerprint (recipe, model, calibration, versions): a resumed run must
have the same.  A last line torn by a kill is dropped; what it stood for is simply done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.disk import disk_errors, open_own, sync_directory
from quantkit.errors import ResumeError


class Journal:
    """The journal at `path`, made if there is none.  Raises ResumeError if it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors(path):
            self._descriptor = open_own(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            try:
                content = path.read_bytes()
                records, length = _parse(path, content)
                if length < len(content):
                    os.ftruncate(self._descriptor, length)
                os.fsync(self._descriptor)
                sync_directory(path.parent)
            except BaseException:
                self.close()
                raise
        self._records = records

    def records(self) -> tuple[dict[str, Any], ...]:
        """What was appended after the fingerprint, in order, by this run and those it resumes."""
        return tuple(self._records[1:])

    @property
    def fingerprint(self) -> dict[str, str] | None:
        """Fingerprint of the run that began this journal; None if none was recorded yet."""
        return dict(self._records[0]) if self._records else None

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record (JSON values); it is on the disk on return.  Needs `check` first."""
        assert self._records, "the fingerprint comes first"
        self._write(record)

    def check(self, fingerprint: Mapping[str, str]) -> None:
        """Begins the journal with this fingerprint, or compares it with the one it began with.

        Raises ResumeError naming the first field that differs.
        """
        if self._records:
            compare_fingerprints(self.path.parent.parent, self._records[0], fingerprint)
        else:
            self._write(fingerprint)

    def close(self) -> None:
        """Closes the file; the journal stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, sort_keys=True).encode() + b"\n"
        length = os.fstat(self._descriptor).st_size
        with disk_errors(self.path):
            try:
                written = os.write(self._descriptor, line)
                while written < len(line):
                    written += os.write(self._descriptor, line[written:])
                os.fsync(self._descriptor)
            except OSError:
                # Half a line in the middle would make the journal unreadable.
                os.ftruncate(self._descriptor, length)
                raise
        self._records.append(json.loads(line))


def compare_fingerprints(where: Path, was: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises ResumeError naming the first field (sorted) that differs, what it was and is now."""
    for field in sorted(set(was) | set(now)):
        before, after = was.get(field), now.get(field)
        if before != after:
            again = "repeat that run's command"
            if field == "threads":
                # Sums are split among them, so bytes depend on their number.
                again = f"set OMP_NUM_THREADS={before} to go on with it"
            raise ResumeError(
                f"{where}: begun by another run: {field} was {_shown(before)}, is {_shown(after)}; "
                f"{again}, choose another --out, or use --fresh to start over"
            )


def _parse(path: Path, content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records, and how many bytes of the file they take (a torn last line is not counted)."""
    records: list[dict[str, Any]] = []
    length = 0
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            record = None
        if not isinstance(record, dict):
            if number < len(lines) - 1:
                raise ResumeError(
                    f"{path}: line {number + 1} is damaged; use --fresh to start over"
                )
            break
        records.append(record)
        length += len(line)
    return records, length


def _shown(value: str | None) -> str:
    return "not recorded" if value is None else f"{value}"
