"""What each weight of a model is for, as far as running its blocks tells, names aside.

Attention is the module in which keys and values are looked up, recurrence the one whose weights
feed a state that later tokens read; experts run behind a router, and what stands beside them for
all tokens is a shared expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantkit.errors import ModelError
from quantkit.methods.rules import Purpose
from quantkit.model.refs import WeightRef

if TYPE_CHECKING:
    from quantkit.model.causal import CausalModel


def purposes_of(model: CausalModel) -> dict[str, Purpose]:
    """Checkpoint name -> purpose, of all weights of blocks but routers, the head and the tables.

    Probes each kind of block for states (`CausalModel.fed`).  ModelError where those cannot be
    told, as in models that are worked on as one block.
    """
    if model.whole:
        raise ModelError(
            "the model is worked on as one block, in which attention, recurrences and the rest are "
            "not told apart; name weights in rules by a glob instead"
        )
    found: dict[str, Purpose] = {}
    for index in range(model.num_blocks):
        found |= _purposes_in(model, index)
    found |= dict.fromkeys(sorted(model.tables), "embeddings")
    # The table that a head shares is the head's.
    if model.head is not None:
        found[model.head.name] = "head"
    return found


def _purposes_in(model: CausalModel, index: int) -> dict[str, Purpose]:
    refs = model.weights(index)
    looking = _looking(model.looking(index), refs)
    fed = model.fed(index)
    carrying = {_owner(ref) for ref in refs if ref.name in fed} - {""}
    routed = any(ref.role == "expert" for ref in refs)
    found: dict[str, Purpose] = {}
    for ref in refs:
        if ref.role == "router":
            continue
        if ref.role == "expert":
            found[ref.name] = "experts"
        elif _within(ref, looking):
            found[ref.name] = "attention"
        elif ref.name in fed or _within(ref, carrying):
            found[ref.name] = "linear-attention"
        else:
            found[ref.name] = "shared-experts" if routed else "mlp"
    return found


def _looking(paths: Sequence[str], refs: Sequence[WeightRef]) -> set[str]:
    """The modules of attention: those in which keys are looked up, with what leads out of them.

    Without weights of its own, or with no more than one other weight beside it, as that way out,
    a module is part of the one that holds it.
    """
    found = set()
    for path in paths:
        inside = sum(_within(ref, {path}) for ref in refs)
        while path and (parent := path.rpartition(".")[0]):
            around = sum(_within(ref, {parent}) for ref in refs)
            if inside and around > inside + 1:
                break
            path, inside = parent, around
        if path and inside:
            found.add(path)
    return found


def _owner(ref: WeightRef) -> str:
    """The module that holds the weight's layer; "" for the block itself."""
    return ref.parameter.rpartition(".")[0].rpartition(".")[0]


def _within(ref: WeightRef, modules: set[str]) -> bool:
    return any(ref.parameter.startswith(f"{module}.") for module in modules)
