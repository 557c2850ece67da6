"""What of a block's work can be done at the same time, and by which process.

Letters: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantkit.calibration.processes.ranks import owners_of
from quantkit.model.refs import ScaleGroup, WeightRef

# Passes over a weight that a search for a scale group's vector takes, at least.
_SEARCHED = 20


def work_owners(
    inputs: Iterable[tuple[str, Sequence[WeightRef]]], groups: Iterable[ScaleGroup], size: int
) -> dict[str, int]:
    """Input key -> the rank that holds its statistics and does all that takes them.

    inputs: key and weights that are quantized; groups: what transforms look at.
    """
    costs: dict[str, float] = {}
    for key, refs in inputs:
        columns = refs[0].shape[1]
        rows = sum(ref.shape[0] for ref in refs)
        # A factorisation, and columns that are rounded one after the other.
        costs[key] = costs.get(key, 0.0) + float(columns) ** 3 + 2.0 * rows * float(columns) ** 2
    for group in groups:
        columns = len(group.channel_map)
        rows = sum(ref.shape[0] for ref in group.readers)
        for key in group.inputs:
            searched = _SEARCHED * 2.0 * rows * columns**2 / len(group.inputs)
            costs[key] = costs.get(key, 0.0) + searched
    return owners_of(costs, size)


def apart(groups: Sequence[ScaleGroup]) -> list[list[ScaleGroup]]:
    """The groups in their order, in runs whose vectors do not depend on one another.

    A group's search reads its readers and their inputs, which folding an earlier one may change.
    """
    runs: list[list[ScaleGroup]] = []
    touched: set[str] = set()
    for group in groups:
        readers = {ref.name for ref in group.readers}
        mine = {*readers, *(f"input {key}" for key in group.inputs)}
        if not runs or mine & touched:
            runs.append([])
            touched = set()
        runs[-1].append(group)
        touched |= mine | set(group.producer_names)
    return runs
