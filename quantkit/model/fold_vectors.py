"""What transforms did to the weights, kept so that `verify --against` can divide it out again.

`NAME:columns` float32 [I] is what the columns of weight NAME were multiplied by, `NAME:rows` what
the rows (or entries, of a norm or bias) of producer NAME were divided by; ones where nothing was
done.  What was done to the source before, if it was quantized from another, is kept in a file
beside them, so that all folds since the first source are known.

Letters: I in features, C producer channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from quantkit.checkpoint.disk import disk_errors, write_file
from quantkit.checkpoint.door import FOLDS_BYTES, open_plain, read_plain
from quantkit.checkpoint.safetensors import read_header, read_into
from quantkit.errors import CheckpointError
from quantkit.model.refs import ScaleGroup, WeightRef

FOLDS_FILE = "quantkit/folds.safetensors"
SOURCE_FOLDS_FILE = "quantkit/source_folds.safetensors"


def fold_shapes(
    groups: Sequence[ScaleGroup], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, int]]:
    """(vector name, length) for the groups of a block; `shapes` are the tensors' in the source."""
    for group in groups:
        for ref in group.readers:
            yield f"{ref.name}:columns", ref.shape[1]
        for name in group.producer_names:
            shape = shapes[name]
            # An expert's tensor is [O, I] whichever way the parameter lies.
            flipped = group.transposed and group.expert is None
            yield f"{name}:rows", shape[-1] if flipped else shape[0]


def copy_folds(home: Path | None, partial: Path) -> None:
    """Keeps a checkpoint's vectors beside what is exported from it; nothing if it has none."""
    for name in (FOLDS_FILE, SOURCE_FOLDS_FILE):
        if home is not None and os.path.lexists(home / name):
            _write(partial / name, read_plain(home / name, largest=FOLDS_BYTES))


def keep_source_folds(home: Path | None, partial: Path) -> None:
    """Keeps what had been done to a quantized source beside what is quantized from it anew."""
    if vectors := _all_folds(home):
        # As bytes they depend on the order of names.
        content = {name: vectors[name].float() for name in sorted(vectors)}
        _write(partial / SOURCE_FOLDS_FILE, save(content))


def folds_since(home: Path | None, reference: Path | None) -> dict[str, Tensor]:
    """The vectors, float32, that lead from the weights at `reference` to those at `home`.

    None for a source in memory.  A checkpoint without vectors counts as the first source.  A name
    whose vectors are the same in both is left out.  Raises CheckpointError for damaged files, and
    for vectors of different lengths.
    """
    ours, theirs = _all_folds(home), _all_folds(reference)
    found = {}
    for name in sorted({*ours, *theirs}):
        one = torch.ones(1, dtype=torch.float64)
        own, its = ours.get(name, one), theirs.get(name, one)
        if name in ours and name in theirs and len(own) != len(its):
            raise CheckpointError(
                f"{name}: {len(own)} folds in {home}, {len(its)} in {reference}; they are not of "
                "one model"
            )
        if name not in ours or name not in theirs or not torch.equal(own, its):
            found[name] = (own / its).float()
    return found


def _all_folds(home: Path | None) -> dict[str, Tensor]:
    """The vectors since the first source, float64, so that dividing gives back the factors."""
    found: dict[str, Tensor] = {}
    if home is None:
        return found
    for file in (SOURCE_FOLDS_FILE, FOLDS_FILE):
        for name, vector in _read(home / file).items():
            found[name] = vector.double() * found.get(name, 1.0)
    return found


def _read(path: Path) -> dict[str, Tensor]:
    """All vectors of a file; none if there is no file."""
    if not os.path.lexists(path):
        return {}
    found = {}
    descriptor = open_plain(path, largest=FOLDS_BYTES)
    try:
        for stored in read_header(path):
            buffer = torch.empty(stored.info.shape, dtype=stored.info.dtype)
            if read_into(descriptor, buffer, stored.offset) < buffer.nbytes:
                raise CheckpointError(f"{path}: the file was cut short")
            found[stored.info.name] = buffer
    finally:
        os.close(descriptor)
    return found


def _write(path: Path, content: bytes) -> None:
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        write_file(path, content)


class FoldVectors:
    """The vectors of one block, multiplied up over all its folds."""

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self.tensors: dict[str, Tensor] = {
            name: torch.ones(length, dtype=torch.float32) for name, length in lengths.items()
        }

    def multiply_(self, group: ScaleGroup, scale_I: Tensor, refs: Sequence[WeightRef]) -> None:
        """Records that the group's inputs are x / scale_I now."""
        scale = scale_I.to("cpu", torch.float32)
        for ref in group.readers:
            self.tensors[f"{ref.name}:columns"] *= scale
        scale_C = torch.ones(group.num_channels).index_copy_(0, group.channel_map.cpu(), scale)
        for name in group.producer_names:
            first = next((ref.rows[0] for ref in refs if ref.name == name and ref.rows), 0)
            self.tensors[f"{name}:rows"][group.rows.cpu() - first] *= scale_C
