"""What travels with a model: every file of its folder that is not its weights, and why others stay.

Loaders need more than a tokenizer: pooling and dense modules of embedding models, processors, code
beside `auto_map`, templates, prompts.  So all files travel, except for reasons that are told.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from quantkit.checkpoint.disk import disk_errors, write_file
from quantkit.checkpoint.memory import format_size
from quantkit.checkpoint.safetensors import refuse_git_lfs
from quantkit.checkpoint.shards import Layout
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError

MODULES = "modules.json"
# Larger than the dense module of any embedding model or the largest tokenizer.
LIMIT = 256 * 2**20
_MOST_FILES, _DEEPEST = 10_000, 16
_MODULES_BYTES = 2**20
_SHOWN = 5

_OTHER_FORM = "weights in another form"
# Folders, by the whole of their names.
_FOLDERS = {
    ".*": "hidden",
    "__pycache__": "a cache",
    "original": _OTHER_FORM,
    "onnx": _OTHER_FORM,
    "openvino": _OTHER_FORM,
    "coreml": _OTHER_FORM,
    "checkpoint-[0-9]*": "a checkpoint of its training",
    "runs": "a log of its training",
    "wandb": "a log of its training",
}
_FILES = {
    ".*": "hidden",
    "*.log": "a log",
    **dict.fromkeys(
        (
            "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.distcp",
            "*.gguf", "*.ggml", "*.llamafile", "*.onnx", "*.onnx_data", "*.onnx.data", "*.h5",
            "*.msgpack", "*.ot", "*.npz", "*.tflite", "*.mlmodel", "*.nemo", "*.pte", "*.engine",
            "*.index.json", "consolidated*.safetensors",
        ),
        _OTHER_FORM,
    ),
}  # fmt: skip
# In the model's own folder only: in others the same names are a side module's.
_TOP_FILES = {
    "README.md": "the output has a model card of its own",
    "adapter_config.json": "an adapter that is not merged",
    "adapter_model.*": "an adapter that is not merged",
    "quant*_config.json": "describes another quantization",
    "hf_quant_config.json": "describes another quantization",
    "*.safetensors": "weights that config.json's model does not read",
}
_PICKLES = ("*.bin", "*.pt", "*.pth")
# What a loader reads: its pointer in place of the file is an error, another's is left.
_READ_BY_LOADERS = frozenset(
    {".json", ".jinja", ".model", ".py", ".safetensors", ".tiktoken", ".txt", ".yaml"}
)


@dataclass(frozen=True, kw_only=True)
class SideFiles:
    """What a folder holds beside a model's weights, by relative names.

    carried  name -> path of what belongs to the model
    left     name (of a folder with "/" at its end) -> why it does not travel
    """

    carried: Mapping[str, Path]
    left: Mapping[str, str]


def find_side_files(root: Path, weights: Collection[str]) -> SideFiles:
    """All files below `root` but config.json and `weights`, which are read themselves.

    Outputs of quantkit in the folder are passed over.  Opens what travels, for its first bytes.
    Raises CheckpointError for a Git-LFS pointer where a loader wants the file, and for more files
    than a model has.
    """
    carried: dict[str, Path] = {}
    left: dict[str, str] = {}
    modules = {f"{path}/" for path in module_paths(root)}
    for count, (name, folder) in enumerate(_walk(root, left)):
        if count == _MOST_FILES:
            raise CheckpointError(
                f"{root}: more than {_MOST_FILES} files; give a folder that holds a model only"
            )
        if name == "config.json" or name in weights or name.endswith(".partial.lock"):
            continue
        siblings = set(os.listdir(folder)) if f"{PurePosixPath(name).parent}/" in modules else None
        reason = _why_left(root, name, siblings)
        if reason is None:
            carried[name] = root / name
        else:
            left[name if name.isprintable() else ascii(name)] = reason
    return SideFiles(carried=dict(sorted(carried.items())), left=dict(sorted(left.items())))


def module_paths(root: Path) -> list[str]:
    """Folders of the modules that modules.json (sentence-transformers) names; [] without one."""
    path = root / MODULES
    try:
        if not path.is_file() or path.stat().st_size > _MODULES_BYTES:
            return []
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    entries = found if isinstance(found, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return [path for path in paths if isinstance(path, str) and re.fullmatch(r"[\w-]+", path)]


def leads_out(root: Path, path: Path) -> bool:
    """Whether a link leads neither inside the model's folder nor to the Hub cache's blobs."""
    real, home = path.resolve(), root.resolve()
    in_cache = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    return not (real.is_relative_to(home) or in_cache)


def copy_side_files(source: Source, directory: Path, *, spare: Collection[str] = ()) -> None:
    """Copies a source's side files, but those named in `spare`, into a directory."""
    with disk_errors(directory):
        for name, content in source.side_files().items():
            if name in spare:
                continue
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, target)
            else:
                write_file(target, content)


def side_bytes(source: Source) -> int:
    """Bytes of all side files."""
    return sum(
        len(content) if isinstance(content, bytes) else content.stat().st_size
        for content in source.side_files().values()
    )


@dataclass(frozen=True, kw_only=True)
class SideRecord:
    """What of a model's folder travels, by name, and why the rest does not."""

    carried: tuple[str, ...]
    left: Mapping[str, str]

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        return {"carried": list(self.carried), "left": dict(self.left)}


def side_record(source: Source, format_name: str, layout: Layout) -> SideRecord:
    """What travels into an output of this layout."""
    names = list(source.side_files())
    carried = tuple(name for name in names if layout.holds_file(name))
    unplaced = {name: f"{format_name} has no place for it" for name in names if name not in carried}
    return SideRecord(
        carried=carried, left=dict(sorted({**source.left_files(), **unplaced}.items()))
    )


def left_lines(left: Mapping[str, str]) -> list[str]:
    """The files that stay behind, and why, for people."""
    lines = [f"left out   {name}: {reason}" for name, reason in list(left.items())[:_SHOWN]]
    if len(left) > _SHOWN:
        lines.append(f"           and {len(left) - _SHOWN} more files, see the report")
    return lines


def _walk(root: Path, left: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(relative name, folder) of every file, in order; folders that stay go into `left`."""

    def refuse(error: OSError) -> None:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=refuse):
        below = Path(folder).relative_to(root).as_posix()
        prefix = "" if below == "." else f"{below}/"
        descend = []
        for name in sorted(folders):
            reason = _why_folder_left(Path(folder, name), depth=prefix.count("/"))
            if reason is None:
                descend.append(name)
            elif reason:
                full = f"{prefix}{name}/"
                left[full if full.isprintable() else ascii(full)] = reason
        folders[:] = descend
        for name in sorted(files):
            yield f"{prefix}{name}", folder


def _why_folder_left(path: Path, *, depth: int) -> str | None:
    """Why nothing of a folder travels; None if it is looked into, "" for an output of quantkit."""
    if depth == _DEEPEST:
        return "too deep"
    if path.name.endswith((".partial", ".replaced")) or (path / "quantkit").is_dir():
        return ""
    if path.is_symlink():
        return "a link to a folder"
    if depth == 0 and path.name == "quantkit":
        return "tells how this model was made"
    return _match(path.name, _FOLDERS)


def _why_left(root: Path, name: str, siblings: set[str] | None) -> str | None:
    """Why a file stays, None if it travels; `siblings` are the names beside a module's file."""
    path, leaf = root / name, PurePosixPath(name).name
    if not name.isprintable():
        return "a name with characters that cannot be printed"
    reason = None if "/" in name else _match(leaf, _TOP_FILES)
    reason = _match(leaf, _FILES) or reason
    # The only form that a side module's weights have; it is not opened here.
    only = siblings is not None and not any(n.endswith(".safetensors") for n in siblings)
    if reason is not None and not (only and any(fnmatch.fnmatchcase(leaf, p) for p in _PICKLES)):
        return reason
    if not path.is_file():
        return "not a plain file"
    if leads_out(root, path):
        return "a link that leads out of the model's folder"
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(100)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if size > LIMIT:
        return f"too large: {format_size(size)}; files up to {format_size(LIMIT)} travel"
    try:
        refuse_git_lfs(path, head)
    except CheckpointError:
        if path.suffix in _READ_BY_LOADERS:
            raise
        return "a Git-LFS pointer, not the file"
    return None


def _match(name: str, reasons: Mapping[str, str]) -> str | None:
    """The reason of the first pattern that the whole name matches."""
    found = (why for pattern, why in reasons.items() if fnmatch.fnmatchcase(name, pattern))
    return next(found, None)
