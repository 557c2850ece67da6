"""Durable writing: files and directories that are on the disk when a call returns."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@contextmanager
def disk_errors(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """A context in which an OSError becomes an OutputError that names `path`.

    A full disk says how much is free, how much the output takes, and that the work can be resumed.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
        folder = path if path.is_dir() else path.parent
        free = f"{shutil.disk_usage(folder).free} bytes are free"
        if needed_bytes is not None:
            free += f", the output's weights take {needed_bytes}"
        raise OutputError(
            f"{path}: disk full: {free}; what was written stays: make room and run the same "
            "command again to resume"
        ) from error


def reserve(descriptor: int, num_bytes: int) -> None:
    """Makes a file `num_bytes` long and takes that room on the disk now, where the system can."""
    if num_bytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.ftruncate(descriptor, num_bytes)


def open_own(path: Path, flags: int, mode: int = 0o666) -> int:
    """A descriptor of a file of ours, opened or made; OutputError if the name is a link.

    `flags` as of os.open.  What lies where we write may be somebody's link to a file of theirs.
    """
    safe = (flags & ~os.O_TRUNC) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, safe, mode)
    except OSError as error:
        # Linux and macOS say ELOOP for the link itself, FreeBSD EMLINK.
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise _foreign(path, "a link") from error
        if error.errno in (errno.ENXIO, errno.EISDIR):
            raise _foreign(path, "no plain file") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _foreign(path, "no plain file")
        if status.st_nlink > 1:
            raise _foreign(path, "a link")
        if flags & os.O_TRUNC:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def refuse_links(folder: Path) -> None:
    """OutputError if a directory of ours, or anything below it, is a link; fine if it is absent."""
    if folder.is_symlink():
        raise _foreign(folder, "a link")
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(parent, name)):
                raise _foreign(Path(parent, name), "a link")


def _foreign(path: Path, what: str) -> OutputError:
    return OutputError(
        f"{path}: quantkit writes a file of its own here, and finds {what} that it did not make; "
        "remove it or choose another --out"
    )


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; it and its name are on the disk on return.

    Goes through `path` + ".tmp" beside it, made anew if an interrupted run left one.
    """
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        with os.fdopen(open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Puts a directory's entries (creations, renames, removals) on the disk."""
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(path: Path, *, skip: str) -> None:
    """Puts all below `path`, and `path` itself, on the disk, except its entry `skip`."""
    for folder, folders, files in os.walk(path):
        if Path(folder) == path:
            folders[:] = [name for name in folders if name != skip]
        for name in files:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))
