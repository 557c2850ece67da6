"""Group sizes that divide: what a method's own scheme becomes where its groups do not fit.

A scheme that a user names is never changed; that of a built-in recipe (`fit: true`) says how many
bits and leaves the groups to the shapes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set

from quantkit.formats.format import PlannedWeight
from quantkit.methods.recipe import Recipe
from quantkit.model.refs import WeightRef
from quantkit.numbers.scheme import Scheme

# Sizes that the kernels of all runtimes have; None is one scale per row.
GROUP_SIZES = (128, 64, 32, None)

Decisions = Mapping[str, tuple[Scheme | None, str]]
# The runtimes that read the weights under these schemes; None if the format cannot hold them.
Served = Callable[[Mapping[str, Scheme | None]], Set[str] | None]


def fitting_scheme(scheme: Scheme, columns: Sequence[int]) -> Scheme:
    """The scheme with the largest of its own and smaller groups that divide all of `columns`."""
    if scheme.kind != "int" or scheme.group_size is None:
        return scheme
    for size in (scheme.group_size, *GROUP_SIZES):
        if size is None or (size <= scheme.group_size and all(c % size == 0 for c in columns)):
            return dataclasses.replace(scheme, group_size=size)
    raise AssertionError("rows always fit")


def fit_groups(
    own: Scheme,
    blocks: Sequence[Sequence[WeightRef]],
    decisions: Decisions,
    served: Served,
) -> dict[str, tuple[Scheme | None, str]]:
    """The decisions with groups that divide, for `blocks`: the weights that have the `own` scheme.

    Weights that share an input, and the experts of a layer, get one size, the largest that divides
    the columns of all.  Where the format holds only one size, or mixed ones cost it a reader, it is
    one size for the whole checkpoint.
    """
    apart = {
        ref.name: scheme
        for block in blocks
        for refs in shared_inputs(block)
        for scheme in [fitting_scheme(own, [ref.shape[1] for ref in refs])]
        for ref in refs
    }
    one = fitting_scheme(own, [ref.shape[1] for block in blocks for ref in block])
    chosen = apart
    if len(set(apart.values())) > 1:
        kept = {name: scheme for name, (scheme, _) in decisions.items()}
        alike = dict.fromkeys(apart, one)
        mixed, even = served({**kept, **apart}), served({**kept, **alike})
        if mixed is None or (even is not None and not even <= mixed):
            chosen = alike
    return {
        name: (chosen[name], _reason(reason, chosen[name], own))
        if name in chosen
        else (scheme, reason)
        for name, (scheme, reason) in decisions.items()
    }


def shared_inputs(refs: Sequence[WeightRef]) -> list[list[WeightRef]]:
    """The weights of a block by what serving runtimes fuse: readers of one input, and experts."""
    found: dict[str, list[WeightRef]] = {}
    for ref in refs:
        if ref.role != "router" and ref.kept is None:
            found.setdefault("experts" if ref.role == "expert" else ref.input, []).append(ref)
    return list(found.values())


def fitted_line(recipe: Recipe, weights: Sequence[PlannedWeight]) -> str | None:
    """What `fit_groups` changed, in a line; None if nothing."""
    if not recipe.fit:
        return None
    changed = Counter(
        weight.scheme.group_size
        for weight in weights
        if weight.scheme is not None
        and weight.scheme.group_size != recipe.scheme.group_size
        and _is_fitted(weight.scheme, recipe.scheme)
    )
    if not changed:
        return None
    parts = [
        f"{_spelled(size)} in {count} weights"
        for size, count in sorted(changed.items(), key=lambda item: -(item[0] or 0))
    ]
    return (
        f"{', '.join(parts)}, where groups of {recipe.scheme.group_size} do not fit; "
        f"--scheme {recipe.scheme.name} would insist"
    )


def _is_fitted(scheme: Scheme, own: Scheme) -> bool:
    alike = scheme.kind == own.kind
    return alike and dataclasses.replace(scheme, group_size=own.group_size) == own


def _reason(reason: str, scheme: Scheme, own: Scheme) -> str:
    return reason if scheme == own else f"{reason}, {_spelled(scheme.group_size)}"


def _spelled(size: int | None) -> str:
    return "one group per row" if size is None else f"groups of {size}"
