"""Models that are one file of their own format, and how a path names them: GGUF and ONNX."""

from __future__ import annotations

from pathlib import Path

from quantkit.errors import CheckpointError
from quantkit.formats.gguf.file import is_gguf

# Where a directory's graph lies; the second is a version of a Triton Inference Server model.
_GRAPHS = ("model.onnx", "1/model.onnx")


def container_of(path: Path) -> Path | None:
    """The GGUF or ONNX file that `path` is or, as a directory without config.json, holds.

    None for anything else.  Raises CheckpointError if a directory holds several.
    """
    if path.is_file():
        return path if is_gguf(path) or path.suffix == ".onnx" else None
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    for name in _GRAPHS:
        if (path / name).is_file():
            return path / name
    found = sorted((*path.glob("*.gguf"), *path.glob("*.onnx")))
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: {len(found)} GGUF or ONNX files ({found[0].name}, {found[1].name}...); give "
            "one of them"
        )
    return found[0] if found else None


def is_onnx(file: Path) -> bool:
    """True if a container's file is an ONNX graph."""
    return file.suffix == ".onnx"
