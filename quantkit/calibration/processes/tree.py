"""The order in which partial sums are added up, fixed by the number of batches alone.

Sums of floats depend on their order.  Batches are cut into at most 16 leaves; each leaf is summed
batch by batch, and leaves are added up along a tree whose nodes have four children, the first one
with the second, that with the third, and so on.  Whoever holds which leaves, in one process or
many, every number is added to the same others in the same order.

A range of leaves (start, stop) stands for their sum.  It exists where it is a node of the tree, or
the first children of one; two neighbours merge where the second is the child that the first lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

# Leaves bound the memory for partial sums (three at a time in one process) and the processes that
# calibration is shared out over.
LEAVES = 16
_CHILDREN = 4
# What a run's bytes depend on, for its fingerprint.
ORDER = f"{LEAVES} leaves, {_CHILDREN} to a node"


def num_leaves(batches: int) -> int:
    """Leaves of that many batches."""
    return min(batches, LEAVES)


def leaves_of(batches: Sequence[T]) -> list[list[T]]:
    """The batches in their order, cut into leaves whose sizes differ by one at most."""
    return [list(batches[span]) for span in _cut(len(batches), num_leaves(len(batches)))]


def share_of(leaves: int, rank: int, size: int) -> range:
    """The leaves of one of `size` processes: neighbours, as many as others have, or one less.

    The first process has the first leaf, however few there are.
    """
    return range(-(-leaves * rank // size), -(-leaves * (rank + 1) // size))


class Sums(Generic[T]):
    """Partial sums of neighbouring leaves, merged as soon as the tree allows."""

    def __init__(self, leaves: int, merge: Callable[[T, T], T]) -> None:
        """merge: the sum of two neighbours, the first one's memory being free to take it."""
        self._leaves, self._merge = leaves, merge
        self.parts: list[tuple[range, T]] = []

    def add(self, leaves: range, value: T) -> None:
        """Takes the sum of the leaves that come next."""
        self.parts.append((leaves, value))
        while len(self.parts) > 1:
            (first, left), (second, right) = self.parts[-2:]
            if not mergeable(first, second, self._leaves):
                break
            self.parts[-2:] = [(range(first.start, second.stop), self._merge(left, right))]


def mergeable(first: range, second: range, leaves: int) -> bool:
    """Whether the tree adds two neighbouring sums: the second is the child that the first lacks."""
    width = 1
    while width < leaves:
        start = second.start
        whole = start % width == 0 and second.stop == min(start + width, leaves)
        parent = start - start % (width * _CHILDREN)
        if whole and parent == first.start and parent < start:
            return True
        width *= _CHILDREN
    return False


def held_by(leaves: int, rank: int, size: int) -> list[range]:
    """The sums that a process has once all of its leaves are summed up."""
    sums: Sums[None] = Sums(leaves, lambda left, right: None)
    for leaf in share_of(leaves, rank, size):
        sums.add(range(leaf, leaf + 1), None)
    return [part for part, _ in sums.parts]


def sums_at_once(leaves: int, size: int = 1) -> int:
    """The most sums of one input that a process gathers at any time, the leaf at work being one."""
    most = 1
    for rank in range(size):
        sums: Sums[None] = Sums(leaves, lambda left, right: None)
        for leaf in share_of(leaves, rank, size):
            most = max(most, len(sums.parts) + 1)
            sums.add(range(leaf, leaf + 1), None)
    return most


def _cut(count: int, parts: int) -> list[slice]:
    return [slice(count * k // parts, count * (k + 1) // parts) for k in range(parts)]
