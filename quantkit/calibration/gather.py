"""Statistics of one block: gathered over all batches, in as many passes as the memory allows.

Every pass runs the block on the same hidden states in the same batches, and sums are added up along
a tree (`processes/tree.py`), so neither the number of passes nor that of processes changes anything
in the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quantkit.calibration.batches import Batch
from quantkit.calibration.processes.ranks import World
from quantkit.calibration.processes.tree import Sums, held_by, share_of
from quantkit.calibration.spans import phase
from quantkit.checkpoint.disk import disk_errors
from quantkit.methods.stats import Needs, Stats, Stream

_GRAM_BYTES = 4
# Tokens of an input in one leaf, at most: where the hash of the next leaf's tokens begins.
_LEAF_TOKENS = 1 << 40


def gram_bytes(features: int, needs: Needs) -> int:
    """Resident bytes of the matrices that `needs` asks for at an input of that many features."""
    columns = features if needs.gram == -1 else needs.gram
    return _GRAM_BYTES * features * (columns + features * needs.drift)


def split_passes(sizes: Mapping[str, int], budget: int | None) -> list[list[str]]:
    """Input keys in passes whose Gram matrices fit the budget together; None is one pass."""
    if budget is None:
        return [list(sizes)]
    # The first is there without any input too: it may have to hand hidden states on.
    passes: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if passes[-1] and filled + size > budget:
            passes.append([])
            filled = 0
        passes[-1].append(key)
        filled += size
    return passes


# The matrices of `Stats`, which may wait on disk.
_MATRICES = ("gram", "drift", "lack")


class StatsBook:
    """The statistics of a block by input key; with `spill`, their matrices wait on disk.

    Each is held by the rank that works with it; the others know how many tokens there were.
    """

    def __init__(self, directory: Path, *, spill: bool, device: str = "cpu") -> None:
        self._directory, self._spill, self._device = directory, spill, device
        self._stats: dict[str, Stats] = {}
        self._files: dict[tuple[str, str], tuple[Path, torch.Size]] = {}
        self._counts: dict[str, int] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._counts

    def holds(self, key: str) -> bool:
        """Whether this rank has the statistics under a key."""
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
                self._directory.mkdir(exist_ok=True)
                matrix.cpu().numpy().tofile(path)
            self._files[place] = path, matrix.shape
            stats = _with(stats, kind, None)
        self._stats[key] = stats

    def tell_counts(self, counts: Mapping[str, int]) -> None:
        """Tokens that reached each input, whoever has its statistics."""
        self._counts.update(counts)

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
        return self._counts[key]


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


# Runs the block over some batches and tells of its inputs, at least of those in a set; the first
# argument is true in one run over each batch, for what has to happen only once.
Forward = Callable[[bool, Set[str], Seen, Sequence[Batch]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """The calibration's batches as leaves of the tree, and this rank's part of them."""

    world: World
    leaves: Sequence[Sequence[Batch]]

    @property
    def mine(self) -> range:
        """Numbers of this rank's leaves."""
        return share_of(len(self.leaves), self.world.rank, self.world.size)

    @property
    def batches(self) -> list[Batch]:
        """This rank's batches."""
        return [batch for number in self.mine for batch in self.leaves[number]]

    @property
    def every(self) -> list[Batch]:
        """The batches of all ranks."""
        return [batch for leaf in self.leaves for batch in leaf]

    @property
    def owners(self) -> list[int]:
        """The rank that has each of `every`."""
        size = self.world.size
        return [
            rank
            for rank in range(size)
            for number in share_of(len(self.leaves), rank, size)
            for _ in self.leaves[number]
        ]


def gather(
    needs: Mapping[str, Needs],
    features: Mapping[str, int],
    forward: Forward,
    *,
    shares: Shares,
    owners: Mapping[str, int],
    directory: Path,
    budget: int | None,
    stream: Stream,
    device: str,
    label: str,
) -> StatsBook:
    """The statistics of every input in `needs`, each at the rank that `owners` names (rank 0).

    budget   bytes of matrices that may be held at once, each counted once
    label    the block in errors
    """
    world = shares.world
    sizes = {key: gram_bytes(features[key], need) for key, need in needs.items()}
    passes = split_passes(sizes, budget)
    book = StatsBook(directory, spill=len(passes) > 1, device=device)
    for number, keys in enumerate(passes):
        sums = {key: Sums(len(shares.leaves), merged) for key in keys}
        for leaf in shares.mine:
            found = {
                key: Stats.empty(
                    features[key],
                    needs[key],
                    stream=stream,
                    device=device,
                    base=leaf * _LEAF_TOKENS,
                )
                for key in keys
            }
            forward(number == 0, set(keys), _updating(found, label), shares.leaves[leaf])
            with phase("statistics"):
                for key in keys:
                    sums[key].add(range(leaf, leaf + 1), found.pop(key))
        counts: dict[str, int] = {}
        with phase("statistics"):
            for key in keys:
                parts = [part for _, part in sums.pop(key).parts]
                whole = together(world, parts, len(shares.leaves), owners.get(key, 0))
                if whole is not None:
                    whole.finish_()
                    counts[key] = whole.count
                    book.put(key, whole)
                del whole
        for told in world.gathered(counts):
            book.tell_counts(told)
    return book


def together(world: World, parts: list[Stats], leaves: int, owner: int) -> Stats | None:
    """The sum of all ranks' parts at its owner, None elsewhere; `parts` is emptied."""
    whole: Sums[Stats] = Sums(leaves, merged)
    for rank in range(world.size):
        for part in held_by(leaves, rank, world.size):
            if owner == world.rank:
                whole.add(part, parts.pop(0) if rank == owner else world.receive(rank))
            elif rank == world.rank:
                world.send(parts.pop(0), owner)
    if owner != world.rank:
        return None
    ((_, stats),) = whole.parts
    return stats


def merged(first: Stats, second: Stats) -> Stats:
    """Both parts' sums, in the first one's memory."""
    first.merge_(second)
    return first


def _updating(found: Mapping[str, Stats], label: str) -> Seen:
    def update(
        key: str,
        x_TI: Tensor,
        original: Tensor | None = None,
        lack_TO: Tensor | None = None,
    ) -> None:
        if key in found:
            with phase("statistics"):
                name = f"{label}.{key}"
                found[key].update_(x_TI, name=name, original=original, lack_TO=lack_TO)

    return update
