"""What one kind of block multiplies by: its weights in order, and which read the same input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from quantkit.model.attention import Attention


@dataclass(frozen=True, kw_only=True)
class Use:
    """One multiplication by a weight: `path` in the block, slice `expert` of a fused parameter."""

    path: str
    expert: int | None
    shape: tuple[int, int]
    transposed: bool

    @property
    def key(self) -> tuple[str, int | None]:
        """What identifies the weight within the block."""
        return self.path, self.expert


@dataclass(frozen=True, kw_only=True)
class BlockTrace:
    """What one kind of block does: its products in order, grouped by what they read.

    `inputs[k]` is the number of the input that `uses[k]` reads.  `outputs` is the length of the
    tuple that forward returns, None if it returns the hidden states themselves.  `read` are
    weights that the block's own code reads, besides the layers that multiply by them.  `kept` are
    matrices that stay as they are, each with the reason, UNREACHED or another.  `attentions` are
    the modules, by path, whose keys and values a cache holds.  `routed` says that experts run
    through transformers' ExpertsInterface, behind a product that gives a router's logits.
    `looking` are the modules, by path, in whose forward tokens are weighed by each other: those of
    `attentions`, or where there are none those with attention in code of their own.
    """

    uses: tuple[Use, ...]
    inputs: tuple[int, ...]
    outputs: int | None
    read: Mapping[str, str]
    kept: Mapping[str, str]
    attentions: Mapping[str, Attention]
    routed: bool = False
    looking: tuple[str, ...] = ()

    def keys(self) -> dict[tuple[str, int | None], str]:
        """The name of the input that each weight reads, by `Use.key`.

        Named after its first reader's module; of expert e "MODULE.e:in" and "MODULE.e:mid".
        """
        names: dict[int, str] = {}
        seen: set[str] = set()
        for use, number in zip(self.uses, self.inputs, strict=True):
            module = use.path.rpartition(".")[0] or use.path
            if use.expert is not None:
                name = f"{module}.{use.expert}"
                module = f"{name}:mid" if f"{name}:in" in seen else f"{name}:in"
            if number not in names:
                names[number] = module
                seen.add(module)
        return {use.key: names[number] for use, number in zip(self.uses, self.inputs, strict=True)}


def with_all_slices(
    uses: Sequence[Use], inputs: Sequence[int], counts: Mapping[str, int]
) -> tuple[tuple[Use, ...], tuple[int, ...]]:
    """The uses and the numbers of their inputs, with the slices that a trial run left out.

    `counts` says how many slices a fused parameter has.  Code that picks experts by itself reaches
    some of them only; the others are used as the one that was reached by the most products.
    """
    found = {use.key for use in uses}
    reached = [use.expert for use in uses if use.expert is not None]
    if all((path, e) in found for path, count in counts.items() for e in range(count)):
        return tuple(uses), tuple(inputs)
    pattern = max(reached, key=lambda expert: (reached.count(expert), -expert))
    made, numbers, fresh = list(uses), list(inputs), max(inputs) + 1
    renumbered: dict[tuple[int, int], int] = {}
    for use, number in zip(uses, inputs, strict=True):
        if use.expert != pattern:
            continue
        for expert in range(counts[use.path]):
            if (use.path, expert) in found:
                continue
            if (number, expert) not in renumbered:
                renumbered[number, expert] = fresh
                fresh += 1
            made.append(replace(use, expert=expert))
            numbers.append(renumbered[number, expert])
    return tuple(made), tuple(numbers)
