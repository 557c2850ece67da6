"""Finding weights by their numbers: which rows of which weights a matrix of a graph is made of.

A graph's nodes have names of their own, and builders fuse and split projections; values cannot be
mistaken.  Shapes: O rows of a weight, N rows of a matrix, I columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


# Rows hashed at a time, so that int64 temporaries stay small.
_CHUNK_ELEMENTS = 1 << 22
# Equal rows (all zero, say) are tried no more often than this.
_TRIED = 64


@dataclass(frozen=True, kw_only=True)
class Run:
    """Neighbouring rows `start` to `stop` of one weight."""

    weight: str
    start: int
    stop: int


class RowIndex:
    """Rows of many weights, to be found again by a 64-bit hash; who finds them compares them."""

    def __init__(self) -> None:
        self._hashes: dict[str, Tensor] = {}
        self._places: dict[tuple[int, int], list[tuple[str, int]]] = {}

    def add(self, weight: str, values_OI: Tensor) -> None:
        """Takes up a weight, float32."""
        columns = values_OI.shape[1]
        hashes = _hashes(values_OI)
        self._hashes[weight] = hashes
        for row, value in enumerate(hashes.tolist()):
            places = self._places.setdefault((columns, value), [])
            if len(places) < _TRIED:
                places.append((weight, row))

    def find(self, values_NI: Tensor) -> tuple[Run, ...]:
        """The matrix as runs of rows, in order; empty if any of its rows is in no weight."""
        hashes = _hashes(values_NI)
        columns = values_NI.shape[1]
        runs: list[Run] = []
        row = 0
        while row < len(hashes):
            places = self._places.get((columns, int(hashes[row])), [])
            found = [self._extend(hashes[row:], place) for place in places]
            if not found:
                return ()
            runs.append(max(found, key=lambda run: run.stop - run.start))
            row += runs[-1].stop - runs[-1].start
        return tuple(runs)

    def _extend(self, hashes: Tensor, place: tuple[str, int]) -> Run:
        weight, row = place
        own = self._hashes[weight][row : row + len(hashes)]
        differing = torch.nonzero(own != hashes[: len(own)])
        length = int(differing[0]) if len(differing) else len(own)
        return Run(weight=weight, start=row, stop=row + length)

    def unused(self, runs: Iterator[Run]) -> str | None:
        """The first weight that has a row in none of the runs; None if all rows are used."""
        used = {
            weight: torch.zeros(len(hashes), dtype=torch.bool)
            for weight, hashes in self._hashes.items()
        }
        for run in runs:
            used[run.weight][run.start : run.stop] = True
        return next((weight for weight, rows in used.items() if not bool(rows.all())), None)


def _hashes(values: Tensor) -> Tensor:
    """int64 [rows]: the bits of each row times fixed odd numbers, summed modulo 2**64."""
    columns = values.shape[1]
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (columns,), generator=generator) * 2 + 1
    step = max(1, _CHUNK_ELEMENTS // columns)
    parts = [
        (part.contiguous().view(torch.int32).to(torch.int64) * odd).sum(1)
        for part in values.to(torch.float32).split(step)
    ]
    return torch.cat(parts)
