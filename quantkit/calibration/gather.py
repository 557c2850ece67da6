"""Statistics of one block: gathered over all batches, in as many passes as the memory allows.

Every pass runs the block on the same hidden states in the same batches, so the number of passes
changes nothing in the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quantkit.calibration.spans import phase
from quantkit.checkpoint.disk import disk_errors
from quantkit.methods.stats import Needs, Stats, Stream

_GRAM_BYTES = 4


def gram_bytes(features: int, needs: Needs) -> int:
    """Resident bytes of the matrices that `needs` asks for at an input of that many features."""
    columns = features if needs.gram == -1 else needs.gram
    return _GRAM_BYTES * features * (columns + features * needs.drift)


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


# The matrices of `Stats`, which may wait on disk.
_MATRICES = ("gram", "drift", "lack")


class StatsBook:
    """The statistics of a block by input key; with `spill`, their matrices wait on disk."""

    def __init__(self, directory: Path, *, spill: bool, device: str = "cpu") -> None:
        self._directory, self._spill, self._device = directory, spill, device
        self._stats: dict[str, Stats] = {}
        self._files: dict[tuple[str, str], tuple[Path, torch.Size]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._stats

    def put(self, key: str, stats: Stats) -> None:
        """Keeps finished statistics under a key, replacing earlier ones."""
        for kind in _MATRICES if self._spill else ():
            matrix: Tensor | None = getattr(stats, kind)
            if matrix is None:
                continue
            place = (key, kind)
            number = list(self._files).index(place) if place in self._files else len(self._files)
            path = self._directory / f"{kind}-{number}.bin"
            with disk_errors(path, matrix.nbytes):
                matrix.cpu().numpy().tofile(path)
            self._files[place] = path, matrix.shape
            stats = _with(stats, kind, None)
        self._stats[key] = stats

    def get(self, key: str) -> Stats:
        """The statistics under a key; spilled matrices are read into fresh memory."""
        stats = self._stats[key]
        for kind in _MATRICES:
            if (key, kind) in self._files:
                path, shape = self._files[key, kind]
                with disk_errors(path):
                    matrix = torch.from_numpy(np.fromfile(path, dtype=np.float32)).view(shape)
                stats = _with(stats, kind, matrix.to(self._device))
        return stats

    def count(self, key: str) -> int:
        """Tokens that reached an input."""
        return self._stats[key].count


def _with(stats: Stats, kind: str, matrix: Tensor | None) -> Stats:
    """The statistics with another matrix of this kind, for the time being."""
    if kind == "gram":
        return dataclasses.replace(stats, gram=matrix)
    if kind == "drift":
        return dataclasses.replace(stats, drift=matrix)
    return dataclasses.replace(stats, lack=matrix)


class Seen(Protocol):
    """Told of an input's tokens, and of what the original model has for them if that is known."""

    def __call__(
        self,
        key: str,
        x_TI: Tensor,
        original: Tensor | None = None,
        lack_TO: Tensor | None = None,
    ) -> None:
        """The tokens x [T, I] that reach the input `key`; see `Stats.update_`."""
        ...


Forward = Callable[[bool, Set[str], Seen], None]


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

    `forward(first, keys, seen)` runs the block over all batches and tells `seen`, at least of the
    inputs in `keys`; `first` is true once, for what has to happen only once.
    `label` names the block in errors.
    """
    sizes = {key: gram_bytes(features[key], need) for key, need in needs.items()}
    passes = split_passes(sizes, budget)
    book = StatsBook(directory, spill=len(passes) > 1, device=device)
    for number, keys in enumerate(passes):
        found = {
            key: Stats.empty(features[key], needs[key], stream=stream, device=device)
            for key in keys
        }

        def update(
            key: str,
            x_TI: Tensor,
            original: Tensor | None = None,
            lack_TO: Tensor | None = None,
            found: Mapping[str, Stats] = found,
        ) -> None:
            if key in found:
                with phase("statistics"):
                    name = f"{label}.{key}"
                    found[key].update_(x_TI, name=name, original=original, lack_TO=lack_TO)

        forward(number == 0, set(keys), update)
        with phase("statistics"):
            for key, stats in found.items():
                stats.finish_()
                book.put(key, stats)
    return book
