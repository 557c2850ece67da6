"""From a path to the source of its tensors: a directory, a GGUF, an ONNX graph, a live model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from quantkit.checkpoint.door import given_path
from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.hub import REMOTE, HubSource, download
from quantkit.checkpoint.live import LiveSource
from quantkit.checkpoint.source import Reader
from quantkit.errors import CheckpointError
from quantkit.formats.gguf.file import is_gguf
from quantkit.formats.gguf.source import GgufSource
from quantkit.formats.onnx.source import OnnxSource

# Where a directory's graph lies; the second is a version of a Triton Inference Server model.
_GRAPHS = ("model.onnx", "1/model.onnx")


def open_source(model_or_path: Any, *, revision: str | None = None) -> Reader:
    """The source of a directory, a Hub repository (downloaded to its cache) or a model in memory.

    "hub://NAME" reads a repository's weights over the network, and stores none of them.

    Raises CheckpointError if it is none of these or cannot be fetched.
    """
    if not isinstance(model_or_path, (str, os.PathLike)):
        return LiveSource(model_or_path)
    # A Path has one slash in the place of two.
    if (remote := re.match(r"hub:/{1,2}(?!/)", address := os.fspath(model_or_path))) is not None:
        return HubSource(REMOTE + address[remote.end() :], revision)
    path = given_path(model_or_path)
    if (file := container_of(path)) is not None:
        return OnnxSource(file) if is_onnx(file) else GgufSource(file)
    if path.is_dir():
        return FileSource(path)
    if os.path.lexists(path):
        raise CheckpointError(
            f"{path}: this is a file, and no GGUF or ONNX, or a link to nothing; give the model's "
            "directory"
        )
    name = os.fspath(model_or_path)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII):
        raise CheckpointError(
            f"{name}: there is no such directory, and it cannot be a repository on the Hub; "
            "give a model's directory or a name such as organisation/model or hub://organisation/model"
        )
    return FileSource(download(name, revision))


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


def container_here(path: Path) -> Path | None:
    """The same; CheckpointError too if there is neither such a file nor a directory."""
    file = container_of(path)
    if file is None and not path.is_dir():
        raise CheckpointError(
            f"{path}: no such directory; give the output of quantkit quantize, or a GGUF or ONNX "
            "file"
        )
    return file


def is_onnx(file: Path) -> bool:
    """True if a container's file is an ONNX graph."""
    return file.suffix == ".onnx"
