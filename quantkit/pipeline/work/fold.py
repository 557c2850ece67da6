"""A block's transforms: a vector for each scale group, chosen by statistics and folded in.

Letters: C producer channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from quantkit.calibration.gather import StatsBook
from quantkit.calibration.processes.ranks import World
from quantkit.calibration.processes.work import apart
from quantkit.calibration.shared import MethodStats
from quantkit.methods.parts import Transform
from quantkit.model.causal import CausalModel
from quantkit.model.fold_vectors import FoldVectors
from quantkit.model.refs import ScaleGroup
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.solve import choose_scale
from quantkit.pipeline.work.needs import stored_scheme


def fold_block_(
    model: CausalModel,
    plan: Plan,
    transforms: Sequence[Transform],
    block: nn.Module,
    index: int,
    book: StatsBook | MethodStats,
    owners: Mapping[str, int],
    world: World,
) -> tuple[FoldVectors, tuple[str, ...]]:
    """Applies the transforms to a block and its statistics; the vectors and producers changed.

    owners: the rank that has an input's statistics, and chooses by them.
    """
    vectors = FoldVectors(plan.folds[index])
    changed: list[str] = []
    for groups in apart(plan.groups[index]):
        for transform in transforms:
            # All inputs carry the same channels; the one with most tokens knows them best.
            keys = [max(group.inputs, key=book.count) for group in groups]
            tasks = [
                _choosing(model, plan, transform, block, group, book, key)
                for group, key in zip(groups, keys, strict=True)
            ]
            chosen = world.spread([owners.get(key, 0) for key in keys], tasks)
            for group, scale_C in zip(groups, chosen, strict=True):
                if scale_C is None:
                    continue
                folded = model.fold_(block, group, scale_C)
                vectors.multiply_(group, folded.scale_I, plan.refs[index])
                for other in group.inputs:
                    if book.holds(other):
                        book.put(other, book.get(other).rescaled(folded.scale_I))
                changed.append(group.producer_names[0])
    return vectors, tuple(dict.fromkeys(changed))


def _choosing(
    model: CausalModel,
    plan: Plan,
    transform: Transform,
    block: nn.Module,
    group: ScaleGroup,
    book: StatsBook | MethodStats,
    key: str,
) -> Callable[[], Tensor | None]:
    """What chooses the vector [C] of a scale group by the statistics under a key."""

    def choose() -> Tensor | None:
        weights = {ref.name: model.weight(block, ref) for ref in group.readers}
        schemes = {
            ref.name: None if scheme is None else stored_scheme(model, plan, ref, scheme)
            for ref in group.readers
            for scheme in (plan.scheme(ref),)
        }
        return choose_scale(transform, group, weights, schemes, book.get(key))

    return choose
