"""What is in a GGUF file, of whatever architecture: its tensors under their own names."""

from __future__ import annotations

from pathlib import Path

from quantkit.formats.contents import Contents, Item
from quantkit.formats.gguf.file import read_gguf
from quantkit.formats.gguf.floats import FLOAT_TYPES
from quantkit.numbers.superblock import BLOCK_TYPES

_DENSE = ("F32", "F16", "BF16")


def describe_gguf(path: Path) -> Contents:
    """What the file at `path` holds; reads the header.  CheckpointError for a damaged one."""
    header = read_gguf(path)
    notes = []
    if (made_by := header.metadata.get("quantkit.version")) is not None:
        notes.append(f"written by quantkit {made_by}")
    undecoded = {t.type for t in header.tensors.values()} - {*_DENSE, *BLOCK_TYPES, *FLOAT_TYPES}
    if undecoded:
        notes.append(f"not decoded by quantkit: {', '.join(sorted(undecoded))}")
    items = (
        Item(
            name=tensor.name,
            scheme=None if tensor.type in _DENSE else tensor.type,
            dtype=tensor.type,
            parameters=tensor.numel,
            num_bytes=tensor.num_bytes,
        )
        for tensor in header.tensors.values()
    )
    return Contents(
        model_type=str(header.metadata.get("general.architecture", "unknown")),
        format=f"gguf version {header.version}",
        items=tuple(items),
        home=path.parent,
        notes=tuple(notes),
    )
