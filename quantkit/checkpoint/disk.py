"""Durable writing: files and directories that are on the disk when a call returns."""

from __future__ import annotations

import errno
import os
import shutil
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


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; it and its name are on the disk on return.

    Goes through `path` + ".tmp" beside it, made anew if an interrupted run left one.
    """
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        with temporary.open("wb") as file:
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
