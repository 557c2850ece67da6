"""Statistics of one block: gathered over all batches, in as many passes as the memory allows.

Every pass runs the block on the same hidden states in the same batches, so the number of passes
changes nothing in the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantkit.calibration.spans import phase
from quantkit.checkpoint.disk import disk_errors
from quantkit.methods.stats import Needs, Stats, Stream
from quantkit.model.causal import TapCallback

_GRAM_BYTES = 4


def gram_bytes(features: int, needs: Needs) -> int:
    """Resident bytes of the Gram matrix that `needs` asks for at an input of that many features."""
    if needs.gram == -1:
        return _GRAM_BYTES * features * features
    return _GRAM_BYTES * features * needs.gram


def split_passes(sizes: Mapping[str, int], budget: int | None) -> list[list[str]]:
    """Input keys in passes whose Gram matrices fit the budget together; None is one pass."""
    if budget is None:
        return [list(sizes)]
    passes: list[list[str]] = []
    filled = 0
    for key, size in sizes.items():
        if not passes or filled + size > budget:
            passes.append([])
            filled = 0
        passes[-1].append(key)
        filled += size
    return passes


class StatsBook:
    """The statistics of a block by input key; with `spill`, Gram matrices wait on disk."""

    def __init__(self, directory: Path, *, spill: bool) -> None:
        self._directory, self._spill = directory, spill
        self._stats: dict[str, Stats] = {}
        self._files: dict[str, tuple[Path, torch.Size]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._stats

    def put(self, key: str, stats: Stats) -> None:
        """Keeps finished statistics under a key, replacing earlier ones."""
        if self._spill and stats.gram is not None:
            number = list(self._files).index(key) if key in self._files else len(self._files)
            path = self._directory / f"gram-{number}.bin"
            with disk_errors(path, stats.gram.nbytes):
                stats.gram.cpu().numpy().tofile(path)
            self._files[key] = path, stats.gram.shape
            stats = dataclasses.replace(stats, gram=None)
        self._stats[key] = stats

    def get(self, key: str) -> Stats:
        """The statistics under a key; a spilled Gram matrix is read into fresh memory."""
        stats = self._stats[key]
        if key not in self._files:
            return stats
        path, shape = self._files[key]
        with disk_errors(path):
            gram = torch.from_numpy(np.fromfile(path, dtype=np.float32)).view(shape)
        return dataclasses.replace(stats, gram=gram)

    def count(self, key: str) -> int:
        """Tokens that reached an input."""
        return self._stats[key].count


Forward = Callable[[bool, TapCallback], None]


def gather(
    needs: Mapping[str, Needs],
    features: Mapping[str, int],
    forward: Forward,
    *,
    directory: Path,
    budget: int | None,
    stream: Stream,
    device: str,
    label: str,
) -> StatsBook:
    """The statistics of every input in `needs`.

    `forward(first, callback)` runs the block over all batches with the callback tapped in; `first`
    is true once, for what has to happen only once.  `label` names the block in errors.
    """
    sizes = {key: gram_bytes(features[key], need) for key, need in needs.items()}
    passes = split_passes(sizes, budget)
    book = StatsBook(directory, spill=len(passes) > 1)
    for number, keys in enumerate(passes):
        found = {
            key: Stats.empty(features[key], needs[key], stream=stream, device=device)
            for key in keys
        }

        def update(key: str, x_TI: Tensor, found: Mapping[str, Stats] = found) -> None:
            if key in found:
                with phase("statistics"):
                    found[key].update_(x_TI, name=f"{label}.{key}")

        forward(number == 0, update)
        with phase("statistics"):
            for key, stats in found.items():
                stats.finish_()
                book.put(key, stats)
    return book
