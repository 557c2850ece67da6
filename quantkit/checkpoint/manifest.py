"""The manifest of a finished checkpoint: sha256 and size of every file, in one file written last.

`quantkit/manifest.json` itself, `quantkit/run.json` (times and peaks, which differ between runs)
and `quantkit/evaluation/` (written later) are not in it; nothing else may be in the directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from quantkit.checkpoint.disk import disk_errors, write_file
from quantkit.checkpoint.door import RECORD_BYTES, file_sha256, read_json
from quantkit.errors import CheckpointError, OutputError

MANIFEST = "quantkit/manifest.json"
RUN = "quantkit/run.json"
EVALUATION = "quantkit/evaluation"
_EXCLUDED = frozenset({MANIFEST, RUN})


def write_manifest(directory: Path, *, ignore: frozenset[str] = frozenset()) -> Path:
    """The manifest's path, written for all files below `directory` as they are now.

    `ignore`: top-level names to leave out.  Equal content gives equal bytes.  Raises OutputError
    for anything that is no plain file.
    """
    files = {}
    with disk_errors(directory):
        # An interrupted run may have left it; it would be taken for a file of the checkpoint.
        (directory / f"{MANIFEST}.tmp").unlink(missing_ok=True)
        for name, path in _files(directory, ignore).items():
            if path.is_symlink() or not path.is_file():
                raise OutputError(f"{path}: not a plain file; a checkpoint holds nothing else")
            files[name] = _entry(path)
        (directory / MANIFEST).parent.mkdir(exist_ok=True)
    return _write(directory, files)


def amend_manifest(directory: Path, names: Sequence[str]) -> Path:
    """The manifest's path, with what these files are now; all others keep their entries.

    For files that a later command adds or changes: weights are not read again.
    """
    found = _entries(read_json(directory / MANIFEST, largest=RECORD_BYTES))
    files = {name: _as_entry(digest, size) for name, (digest, size) in found.items()}
    with disk_errors(directory):
        return _write(directory, files | {name: _entry(directory / name) for name in names})


def _entry(path: Path) -> dict[str, str | int]:
    return _as_entry(file_sha256(path), path.stat().st_size)


def _as_entry(digest: str, size: int) -> dict[str, str | int]:
    return {"sha256": digest, "size": size}


def _write(directory: Path, files: Mapping[str, Mapping[str, str | int]]) -> Path:
    text = json.dumps({"version": 1, "files": files}, indent=2, sort_keys=True) + "\n"
    write_file(directory / MANIFEST, text.encode())
    return directory / MANIFEST


def verify_manifest(directory: Path) -> list[str]:
    """What differs from the manifest, one sentence each; an empty list if nothing does."""
    if not os.path.lexists(directory / MANIFEST):
        return [f"{MANIFEST}: missing; the checkpoint is unfinished or was not made by quantkit"]
    try:
        files = _entries(read_json(directory / MANIFEST, largest=RECORD_BYTES))
    except (CheckpointError, ValueError) as error:
        return [f"{MANIFEST}: cannot be read ({error})"]
    present = _files(directory, frozenset())
    problems = [f"{name}: not in the manifest" for name in sorted(set(present) - set(files))]
    for name, (digest, size) in sorted(files.items()):
        path = present.get(name)
        if path is None or not path.is_file():
            problems.append(f"{name}: missing")
            continue
        try:
            found = path.stat().st_size
            if found != size:
                problems.append(f"{name}: {found} bytes, the manifest says {size}")
            elif file_sha256(path) != digest:
                problems.append(f"{name}: the content differs from the manifest's sha256")
        except (CheckpointError, OSError) as error:
            problems.append(f"{name}: cannot be read ({error})")
    return problems


def _files(directory: Path, ignore: frozenset[str]) -> dict[str, Path]:
    """Relative name -> path of everything below that is no directory, sorted, less the excluded."""
    found = {}
    for folder, folders, names in os.walk(directory):
        if Path(folder) == directory:
            folders[:] = [name for name in folders if name not in ignore]
            names = [name for name in names if name not in ignore]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in [*names, *links]:
            path = Path(folder, name)
            found[path.relative_to(directory).as_posix()] = path
    return {
        name: path
        for name, path in sorted(found.items())
        # An unfinished report lies in evaluation.partial.
        if name not in _EXCLUDED and not name.startswith((f"{EVALUATION}/", f"{EVALUATION}."))
    }


def _entries(manifest: Any) -> dict[str, tuple[str, int]]:
    """File name -> (sha256, size); ValueError if the manifest has another form."""
    if not isinstance(manifest, dict) or manifest.get("version") != 1:
        raise ValueError("not a version 1 manifest")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ValueError("no files")
    entries = {}
    for name, entry in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not isinstance(entry, dict):
            raise ValueError(f"{name!a}: not an entry")
        digest, size = entry.get("sha256"), entry.get("size")
        if not isinstance(digest, str) or not isinstance(size, int):
            raise ValueError(f"{name!a}: needs sha256 and size")
        entries[name] = (digest, size)
    return entries
