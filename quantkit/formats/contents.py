"""What lies in a checkpoint, whatever holds it: tensors by name and their sizes on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Item:
    """A tensor: the checkpoint's if its names are known, else the file's own.

    scheme      name of a quantized weight's scheme, else None
    dtype       as stored, without "torch."; of quantized weights that of the original, if it is
                known
    parameters  numbers of the original model in it; 0 for tables and constants
    num_bytes   what it takes in the files, scales and zeros included
    """

    name: str
    scheme: str | None
    dtype: str
    parameters: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All tensors; `home` is the directory with what quantkit wrote about them.

    `format` is words for people, `notes` say what could not be told, and why.
    """

    model_type: str
    format: str
    items: tuple[Item, ...]
    home: Path
    notes: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter: scales, zeros and unquantized tensors included."""
        total = sum(item.num_bytes for item in self.items)
        return 8 * total / max(sum(item.parameters for item in self.items), 1)
