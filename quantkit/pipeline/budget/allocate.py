"""The exact choice of one option per group under a limit: a multiple-choice knapsack.

Dynamic programming over (bytes, loss) states, in which a state goes on only if no other is at least
as small and as good, and only if its Lagrangian bound can still beat a feasible choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# States whose bound is this little above the best known choice stay: sums round differently.
_SLACK = 1e-9


@dataclass(frozen=True, kw_only=True)
class Option:
    """What one choice for a group takes in bytes, and the loss that it is charged with."""

    num_bytes: int
    loss: float


def allocate(groups: Sequence[Sequence[Option]], capacity: int) -> list[int]:
    """The index of one option of each group, with the least sum of losses in `capacity` bytes.

    Raises ValueError if even the smallest options take more.
    """
    fronts = [pareto(options) for options in groups]
    sizes = [np.array([groups[k][i].num_bytes for i in f], np.int64) for k, f in enumerate(fronts)]
    losses = [np.array([groups[k][i].loss for i in f]) for k, f in enumerate(fronts)]
    if sum(int(size[0]) for size in sizes) > capacity:
        raise ValueError("the smallest options take more than the capacity")
    price, known = _relaxed(sizes, losses, capacity)
    # What the groups from k on take at least: in bytes, and in loss plus bytes at the price.
    smallest = _suffix_sums([float(size[0]) for size in sizes])
    cheapest = _suffix_sums(
        [float((loss + price * size).min()) for size, loss in zip(sizes, losses, strict=True)]
    )
    limit = known + _SLACK * (abs(known) + abs(cheapest[0]) + price * capacity)
    taken, lost = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for k, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
        now = (taken[:, None] + size[None]).ravel()
        cost = (lost[:, None] + loss[None]).ravel()
        bound = cost + cheapest[k + 1] - price * (capacity - now)
        kept = np.flatnonzero((now + smallest[k + 1] <= capacity) & (bound <= limit))
        kept = kept[np.lexsort((cost[kept], now[kept]))]
        best = np.minimum.accumulate(cost[kept])
        kept = kept[np.concatenate([[True], cost[kept][1:] < best[:-1]])]
        steps.append((kept // len(size), kept % len(size)))
        taken, lost = now[kept], cost[kept]
    state = int(np.argmin(lost))
    chosen = []
    for k in range(len(groups) - 1, -1, -1):
        parent, option = steps[k]
        chosen.append(fronts[k][int(option[state])])
        state = int(parent[state])
    return chosen[::-1]


def pareto(options: Sequence[Option]) -> list[int]:
    """Indices of the options that no other is as small and as good as, from small to large."""
    order = sorted(range(len(options)), key=lambda i: (options[i].num_bytes, options[i].loss, i))
    front: list[int] = []
    for i in order:
        if not front or options[i].loss < options[front[-1]].loss:
            front.append(i)
    return front


def _relaxed(
    sizes: Sequence[NDArray[np.int64]], losses: Sequence[NDArray[np.float64]], capacity: int
) -> tuple[float, float]:
    """The price of a byte at which the relaxed problem fills the capacity, and a feasible loss.

    Steps along the convex hulls are taken by loss saved per byte until one does not fit.
    """
    steps = []
    for k, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
        at = 0
        while at + 1 < len(size):
            rates = (loss[at] - loss[at + 1 :]) / (size[at + 1 :] - size[at])
            to = at + 1 + int(np.argmax(rates))
            steps.append((float(rates.max()), k, at, to))
            at = to
    left = capacity - sum(int(size[0]) for size in sizes)
    total = float(sum(loss[0] for loss in losses))
    # Stable: a group's own steps have falling rates and stay in their order.
    for rate, k, at, to in sorted(steps, key=lambda step: -step[0]):
        extra = int(sizes[k][to] - sizes[k][at])
        if extra > left:
            return rate, total
        left -= extra
        total += float(losses[k][to] - losses[k][at])
    return 0.0, total


def _suffix_sums(values: Sequence[float]) -> list[float]:
    sums = [0.0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]
