"""The output directory: built in OUT.partial, which a kill at any instant leaves resumable, and
renamed to OUT when it is complete and on the disk.

    OUT.partial/             what OUT will hold
    OUT.partial/.scratch/    journal.jsonl and hidden states: removed before the rename
    OUT.partial.lock         held while a run works on it
    OUT.replaced/            the finished output that a fresh run is just replacing
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path

from quantkit.checkpoint.disk import (
    disk_errors,
    open_own,
    refuse_links,
    sync_directory,
    sync_tree,
    write_file,
)
from quantkit.checkpoint.door import RECORD_BYTES, given_path, read_json
from quantkit.checkpoint.journal import Journal, compare_fingerprints
from quantkit.checkpoint.manifest import MANIFEST, write_manifest
from quantkit.errors import CheckpointError, OutputError

FINGERPRINT = "quantkit/fingerprint.json"
_SCRATCH = ".scratch"
_JOURNAL = "journal.jsonl"


class OutputState(Enum):
    """What is found where the output should go."""

    ABSENT = "absent"
    PARTIAL = "partial"
    COMPLETE = "complete"


class OutputDirectory:
    """The output at `out`, locked for this process until `close` or the end of a with block.

    Opening changes nothing that was there, except that it ends what a run killed between its
    manifest and its rename had left to do.  Raises OutputError if another run holds the lock, or if
    `out` or `out`.partial holds something that quantkit did not make.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(os.path.abspath(given_path(out, error=OutputError)))
        if self.out.is_symlink():
            self.out = self.out.resolve()
        if not self.out.name:
            raise OutputError(f"{self.out}: cannot be an output directory; choose another --out")
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.scratch = self.partial / _SCRATCH
        self._lock_path = self.out.with_name(self.out.name + ".partial.lock")
        self._replaced = self.out.with_name(self.out.name + ".replaced")
        self._lock = -1
        self._journal: Journal | None = None
        with disk_errors(self.out):
            self._refuse_foreign()
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _acquire(self._lock_path, self.out)
        try:
            with disk_errors(self.out):
                # Another run may have finished before the lock was free.
                self._refuse_foreign()
                if _has_manifest(self.partial) and not _has_manifest(self.out):
                    self._seal()
                self._remove_replaced()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OutputDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def state(self) -> OutputState:
        """COMPLETE: `out` is finished; PARTIAL: a run can be resumed; ABSENT: neither."""
        if _has_manifest(self.out):
            return OutputState.COMPLETE
        journal = self.scratch / _JOURNAL
        if journal.is_file() and b"\n" in journal.read_bytes():
            return OutputState.PARTIAL
        return OutputState.ABSENT

    def check_complete(self, fingerprint: Mapping[str, str]) -> None:
        """Returns if the finished `out` came from a run with this fingerprint, else ResumeError.

        For state COMPLETE; the error names the first field that differs.
        """
        path = self.out / FINGERPRINT
        try:
            was = read_json(path, largest=RECORD_BYTES, error=OutputError)
        except OutputError as error:
            raise OutputError(
                f"{error}; choose another --out, or use --fresh to replace it"
            ) from error
        compare_fingerprints(self.out, was, fingerprint)

    def begin(self, fingerprint: Mapping[str, str], *, fresh: bool = False) -> Journal:
        """The journal of the run to resume, or with `fresh` or nothing to resume an empty one.

        Afterwards `partial` and `scratch` exist.  `fresh` removes what an earlier run left there;
        a complete `out` stays until `finish` replaces it.  Raises ResumeError naming the field if
        the run to resume has another fingerprint.
        """
        assert self._journal is None, "begin is called once"
        if self.state is OutputState.COMPLETE and not fresh:
            raise OutputError(
                f"{self.out}: already complete; choose another --out, or use --fresh to replace it"
            )
        if self.state is OutputState.COMPLETE and os.path.lexists(self._replaced):
            raise OutputError(
                f"{self._replaced}: exists, but its name is needed while {self.out} is replaced; "
                "remove it"
            )
        with disk_errors(self.partial):
            self.scratch.mkdir(parents=True, exist_ok=True)
            path = self.scratch / _JOURNAL
            if fresh:
                # An empty journal marks what is being removed as ours, and as nothing to resume.
                descriptor = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.fsync(descriptor)
                os.close(descriptor)
            journal = Journal(path)
            try:
                if journal.fingerprint is None:
                    (self.partial / MANIFEST).unlink(missing_ok=True)
                    _clear(self.partial, spare=_SCRATCH)
                    _clear(self.scratch, spare=_JOURNAL)
                sync_directory(self.partial)
                sync_directory(self.partial.parent)
                journal.check(fingerprint)
            except BaseException:
                journal.close()
                raise
        self._journal = journal
        return journal

    def finish(self, check: Callable[[Path], object]) -> None:
        """Completes the output: everything synced, manifest written, `partial` renamed to `out`.

        `check` reads `partial` back and raises if it is not what it should be: then nothing is
        finished, and `partial` stays.  Killed at any instant, `out` is absent, as it was, or
        complete; opening or running the same command again finishes the rest.
        """
        assert self._journal is not None and self._journal.fingerprint is not None, "begin first"
        text = json.dumps(self._journal.fingerprint, indent=2, sort_keys=True) + "\n"
        with disk_errors(self.partial):
            (self.partial / FINGERPRINT).parent.mkdir(exist_ok=True)
            write_file(self.partial / FINGERPRINT, text.encode())
            sync_tree(self.partial, skip=_SCRATCH)
        check(self.partial)
        with disk_errors(self.partial):
            write_manifest(self.partial, ignore=frozenset({_SCRATCH}))
            self._journal.close()
            self._seal()
            self._remove_replaced()

    def close(self) -> None:
        """Closes the journal and gives the lock back; what was written stays."""
        if self._journal is not None:
            self._journal.close()
        if self._lock >= 0:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1

    def _seal(self) -> None:
        """Renames `partial`, which holds its manifest, to `out`."""
        if self.scratch.exists():
            shutil.rmtree(self.scratch)
        sync_directory(self.partial)
        if _has_manifest(self.out):
            self._remove_replaced()
            self.out.rename(self._replaced)
        self.partial.rename(self.out)
        sync_directory(self.out.parent)

    def _remove_replaced(self) -> None:
        """Removes the output that was replaced, its manifest last: that marks it as ours."""
        folder, name = MANIFEST.split("/")
        if self._replaced.is_symlink():
            return
        if _has_manifest(self._replaced):
            _clear(self._replaced, spare=folder)
            _clear(self._replaced / folder, spare=name)
            shutil.rmtree(self._replaced)
        elif not any(files for _, _, files in os.walk(self._replaced)):
            # Directories without files are what a kill after the manifest's removal leaves.
            shutil.rmtree(self._replaced, ignore_errors=True)

    def _refuse_foreign(self) -> None:
        """Raises OutputError if `out` or `partial` exists and quantkit did not make it."""
        if os.path.lexists(self.out) and not (_is_empty(self.out) or _has_manifest(self.out)):
            raise OutputError(
                f"{self.out}: exists and holds something else than a finished quantkit output; "
                "choose another --out or remove it"
            )
        if (home := next(filter(_has_manifest, self.out.parents), None)) is not None:
            raise OutputError(
                f"{self.out}: lies in the finished output {home}, which would no longer be whole; "
                "choose another --out"
            )
        refuse_links(self.partial)
        ours = (
            not os.path.lexists(self.partial)
            or _is_empty(self.partial, but=_SCRATCH)
            or (self.scratch / _JOURNAL).is_file()
            or _has_manifest(self.partial)
        )
        if not ours:
            raise OutputError(
                f"{self.partial}: exists and is no unfinished quantkit output; "
                "choose another --out or remove it"
            )


def _acquire(path: Path, out: Path) -> int:
    """A descriptor that holds the lock file; OutputError if another process has it."""
    while True:
        descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that just ended may have removed the file between the two calls.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                return descriptor
        except BlockingIOError as error:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise OutputError(
                f"{out}: another run (process {holder or 'unknown'}) is writing it; wait until it "
                "ends, or choose another --out"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _clear(folder: Path, *, spare: str) -> None:
    """Removes everything in a directory but the entry `spare`."""
    for entry in folder.iterdir():
        if entry.name == spare:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _has_manifest(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _is_empty(folder: Path, but: str | None = None) -> bool:
    """True for a directory that holds nothing, or only an empty directory called `but`."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    entries = list(folder.iterdir())
    return not entries or (
        but is not None and [entry.name for entry in entries] == [but] and _is_empty(entries[0])
    )


def earlier_fingerprint(out: Path) -> dict[str, str]:
    """The fingerprint of the run that completed `out`, or else began it; empty if there is none.

    What is damaged counts as none: opening the output says so.
    """
    out = given_path(out)
    journal = out.with_name(f"{out.name}.partial") / _SCRATCH / _JOURNAL
    try:
        if _has_manifest(out):
            return read_json(out / FINGERPRINT, largest=RECORD_BYTES, error=OutputError)
        if journal.is_file():
            with journal.open("rb") as lines:
                found = json.loads(lines.readline(RECORD_BYTES))
            return found if isinstance(found, dict) else {}
    except (OutputError, OSError, ValueError):
        pass
    return {}


def refuse_unfinished(path: str | os.PathLike[str]) -> None:
    """Raises CheckpointError if the directory is an output that was never finished.

    A path that is none, such as a name on the Hub, is left to others.  What a directory holds says
    so, not what it is called: the manifest comes last, and with it one is finished even if someone
    renamed it.
    """
    path = given_path(path)
    named = Path(os.path.abspath(path))
    partial = Path(f"{named}.partial")
    if not path.exists() and partial.is_dir():
        raise CheckpointError(
            f"{path}: not there yet: {partial.name} is unfinished; run the quantize command again "
            "to finish it"
        )
    begun = named.name.endswith(".partial") or (path / "quantkit").is_dir()
    if (path / ".scratch").exists() or (begun and not (path / MANIFEST).is_file()):
        raise CheckpointError(
            f"{path}: an unfinished output; run the quantize command again to finish it"
        )
