"""What transforms did to the weights, kept so that `verify --against` can divide it out again.

`NAME:columns` float32 [I] is what the columns of weight NAME were multiplied by, `NAME:rows` what
the rows (or entries, of a norm or bias) of producer NAME were divided by; ones where nothing was
done.  Letters: I in features, C producer channels.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quantkit.disk import disk_errors
from quantkit.refs import ScaleGroup, WeightRef

FOLDS_FILE = "quantkit/folds.safetensors"


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


def copy_folds(source_dir: Path, partial: Path) -> None:
    """Keeps a checkpoint's vectors beside what is exported from it; nothing if it has none."""
    if (source_dir / FOLDS_FILE).is_file():
        with disk_errors(partial):
            (partial / FOLDS_FILE).parent.mkdir(exist_ok=True)
            shutil.copyfile(source_dir / FOLDS_FILE, partial / FOLDS_FILE)


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
