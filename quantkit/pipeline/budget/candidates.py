"""What a budget chooses among: groups of weights that runtimes fuse, and schemes that they mix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from quantkit.errors import FormatError, SchemeError
from quantkit.formats.format import Format, PlannedWeight, WholeFormat
from quantkit.methods.recipe import Recipe
from quantkit.model.causal import CausalModel
from quantkit.model.fitting import GROUP_SIZES, shared_inputs
from quantkit.model.refs import WeightRef
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.decide import decide, head_name, planned


@dataclass(frozen=True, kw_only=True)
class Group:
    """Weights of one block that runtimes fuse, so that they get one scheme: q/k/v, experts."""

    block: int
    refs: tuple[WeightRef, ...]

    @property
    def name(self) -> str:
        """The name of its first weight, which no other group has."""
        return self.refs[0].name

    @cached_property
    def parameters(self) -> int:
        """Weights in it."""
        return sum(ref.shape[0] * ref.shape[1] for ref in self.refs)

    @property
    def inputs(self) -> Mapping[str, list[WeightRef]]:
        """Input key -> its weights that read it."""
        found: dict[str, list[WeightRef]] = {}
        for ref in self.refs:
            found.setdefault(ref.input, []).append(ref)
        return found

    def takes(self, scheme: Scheme) -> bool:
        """True if the scheme's groups divide the columns of all."""
        size = scheme.group_size
        return size is None or all(
            ref.shape[1] % size == 0 and ref.shape[1] > size for ref in self.refs
        )


def budget_groups(model: CausalModel, recipe: Recipe) -> list[Group]:
    """The groups of all blocks in order; what a rule of the recipe decides belongs to none."""
    return [
        Group(block=index, refs=tuple(refs))
        for index in range(model.num_blocks)
        for refs in shared_inputs(model.weights(index))
        if all(recipe.rule_for(ref.name) is None for ref in refs)
    ]


def integers() -> Iterator[Scheme]:
    """Integers of 2 to 8 bits with and without zeros, in the groups that all runtimes have."""
    for bits in range(2, 9):
        for size in GROUP_SIZES:
            for symmetric in (True, False):
                yield Scheme(kind="int", bits=bits, group_size=size, symmetric=symmetric)


def mixes(
    model: CausalModel,
    recipe: Recipe,
    fmt: Format,
    groups: Sequence[Group],
    *,
    reader: str | None,
    unreadable: bool,
) -> dict[str | None, tuple[Scheme, ...]]:
    """Runtime -> the schemes that it reads side by side in one checkpoint of the format.

    `reader` names the only runtime that matters; `unreadable`: without one, what the format holds
    is enough, under the key None.  Raises FormatError if there is no mix.
    """
    if isinstance(fmt, WholeFormat):
        raise FormatError(
            f"--bits: schemes are chosen for compressed-tensors, not for {fmt.name}; leave "
            "--format out"
        )
    held = [scheme for scheme in integers() if fmt.supports(scheme) is None]
    told = _reasons(model, recipe, fmt, groups, held[:1])
    if reader is not None and reader not in told:
        raise FormatError(
            f"--for {reader}: {fmt.name} is read by {' and '.join(told)}; name one of them"
        )
    if reader is None and unreadable:
        return {None: tuple(held)}
    found: dict[str | None, tuple[Scheme, ...]] = {}
    why = {}
    for runtime in told if reader is None else (reader,):
        mixed = _mix(model, recipe, fmt, groups, held, runtime)
        if isinstance(mixed, str):
            why[runtime] = mixed
        else:
            found[runtime] = mixed
    if not found:
        listed = "; ".join(f"{runtime}: {reason}" for runtime, reason in why.items())
        raise FormatError(
            f"--bits: no mix of schemes in {fmt.name} is read: {listed}; give --scheme instead"
        )
    return found


def _mix(
    model: CausalModel,
    recipe: Recipe,
    fmt: Format,
    groups: Sequence[Group],
    held: Sequence[Scheme],
    runtime: str,
) -> tuple[Scheme, ...] | str:
    """The most schemes that a runtime reads side by side, or why it reads no two."""
    alone = [
        scheme for scheme in held if _reasons(model, recipe, fmt, groups, [scheme])[runtime] is None
    ]
    last = _reasons(model, recipe, fmt, groups, held[:1])[runtime] if len(alone) < 2 else None
    for family in (
        alone,
        [scheme for scheme in alone if scheme.symmetric],
        [scheme for scheme in alone if not scheme.symmetric],
    ):
        if len(family) > 1:
            last = _reasons(model, recipe, fmt, groups, family)[runtime]
            if last is None:
                return tuple(family)
    return last or "it reads one scheme only"


def _reasons(
    model: CausalModel,
    recipe: Recipe,
    fmt: Format,
    groups: Sequence[Group],
    schemes: Sequence[Scheme],
) -> Mapping[str, str | None]:
    """Runtime -> None if it reads every kind of weight under all of the schemes at once."""
    kinds = {ref.parameter: ref for group in groups for ref in group.refs}
    weights = [planned(model, ref, scheme) for ref in kinds.values() for scheme in schemes]
    if (reason := fmt.supports_together(weights)) is not None:
        return dict.fromkeys(fmt.readers(weights[:1], _type(model)), reason)
    return fmt.readers([*weights, *_others(model, recipe, groups)], _type(model))


def _others(model: CausalModel, recipe: Recipe, groups: Sequence[Group]) -> Iterator[PlannedWeight]:
    """The weights that the budget leaves alone, the head last."""
    chosen = {ref.name for group in groups for ref in group.refs}
    for index in range(model.num_blocks):
        for ref in model.weights(index):
            if ref.name not in chosen:
                yield planned(model, ref, decide(recipe, ref)[0])
    head = planned(model, model.head, recipe.head)
    yield dataclasses.replace(head, name=head_name(model))


def _type(model: CausalModel) -> str:
    return str(model.source.config.get("model_type", ""))


def sizes_of(
    model: CausalModel, fmt: Format, group: Group, schemes: Sequence[Scheme]
) -> dict[Scheme, int]:
    """Scheme -> bytes of all tensors of the group in the output, for those that fit its shapes.

    Raises SchemeError if none does.
    """
    found = {}
    for scheme in schemes:
        if not group.takes(scheme):
            continue
        weights = [planned(model, ref, scheme) for ref in group.refs]
        if all(fmt.supports_shape(weight) is None for weight in weights):
            found[scheme] = sum(
                info.nbytes
                for weight in weights
                for info in fmt.layout(weight, model.source.info(weight.name).dtype)
            )
    if not found:
        raise SchemeError(f"{group.name}: none of the schemes that --bits may mix fits its shape")
    return found
