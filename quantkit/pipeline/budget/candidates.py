"""What a budget chooses among: groups of weights that runtimes fuse, and schemes that they mix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from quantkit.errors import FormatError, SchemeError
from quantkit.formats.format import Container, Format, PlannedWeight, WholeFormat
from quantkit.methods.recipe import Recipe
from quantkit.model.causal import CausalModel
from quantkit.model.fitting import GROUP_SIZES, shared_inputs
from quantkit.model.refs import WeightRef
from quantkit.numbers.scheme import BLOCKS, Scheme
from quantkit.pipeline.decide import decide, planned, planned_head, table_ref


@dataclass(frozen=True, kw_only=True)
class Group:
    """Weights that get one scheme: of one block those that runtimes fuse (q/k/v, experts).

    block   None: the table of embeddings, the head, or both in one tensor
    """

    block: int | None
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


def budget_groups(
    model: CausalModel, recipe: Recipe, container: Container | None = None
) -> list[Group]:
    """The groups of all blocks in order; what a rule of the recipe decides belongs to none.

    In a container each tensor has a type of its own, and the embedding and the head have one too:
    the first comes first, the other last.
    """
    groups = [
        Group(block=index, refs=tuple(refs))
        for index in range(model.num_blocks)
        for shared in shared_inputs(model.weights(index))
        for refs in ([shared] if container is None else _tensors(shared))
        if all(recipe.rule_for(ref.name) is None for ref in refs)
    ]
    outside = {} if container is None else container.matrices()
    for name, shape in outside.items():
        if recipe.rule_for(name) is not None:
            continue
        if name != model.projection.name:
            groups.insert(0, Group(block=None, refs=(table_ref(name, shape),)))
        elif recipe.head is None:
            groups.append(Group(block=None, refs=(model.projection,)))
    return groups


def _tensors(refs: Sequence[WeightRef]) -> list[list[WeightRef]]:
    """Weights that a container keeps in one tensor: all experts of a layer by their parameter."""
    found: dict[str, list[WeightRef]] = {}
    for ref in refs:
        found.setdefault(ref.parameter if ref.role == "expert" else ref.name, []).append(ref)
    return list(found.values())


def offered(fmt: Format) -> Iterator[Scheme]:
    """What a format may mix: block types of a container, else integers of 2 to 8 bits with and
    without zeros, in the groups that all runtimes have."""
    if isinstance(fmt, WholeFormat):
        schemes: Iterator[Scheme] = map(Scheme.parse, BLOCKS)
    else:
        schemes = (
            Scheme(kind="int", bits=bits, group_size=size, symmetric=symmetric)
            for bits in range(2, 9)
            for size in GROUP_SIZES
            for symmetric in (True, False)
        )
    return (scheme for scheme in schemes if fmt.supports(scheme) is None)


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
    held = list(offered(fmt))
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
            f"no mix of schemes in {fmt.name} is read: {listed}; give --scheme instead"
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
    yield from planned_head(model, recipe.head)


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
        raise SchemeError(f"{group.name}: none of the schemes that may be mixed fits its shape")
    return found
