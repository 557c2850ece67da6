"""From a mean of bits to a recipe whose rules give each group of weights its scheme."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.calibration.data.tokens import Calibration
from quantkit.calibration.processes.ranks import ALONE, World, same_everywhere
from quantkit.checkpoint.memory import format_size
from quantkit.checkpoint.version import __version__
from quantkit.errors import BudgetError, FormatError, RecipeError
from quantkit.formats.format import BuiltFormat
from quantkit.formats.gguf.mixes import mix_named_after
from quantkit.formats.registry import make_format
from quantkit.methods.recipe import Recipe
from quantkit.methods.rules import Rule
from quantkit.model.causal import CausalModel
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.budget.allocate import Option, allocate
from quantkit.pipeline.budget.candidates import Group, budget_groups, mixes, sizes_of
from quantkit.pipeline.budget.sensitivity import measure, split_calibration
from quantkit.pipeline.budget.wish import Counted, Room, Wish, wish_of
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import Plan, make_plan, open_container
from quantkit.pipeline.predict import predict

Sizes = Mapping[Scheme, int]
# What the header of a file may take more for a weight whose scheme has other tensors.
_HEADER_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class ChosenGroup:
    """Weights that runtimes fuse, their scheme, and the KL in nats that it alone should cost."""

    weights: tuple[str, ...]
    scheme: str
    kl: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a budget became.

    key      of everything it depends on: a run that goes on takes the choice of the first
    turned   what was asked for, and what it was turned into, in words
    bits     the mean that it allows of what is counted
    bits_of  what that is: the quantized linears, the model, or its files
    room     where the limit is the memory of a GPU
    reader   the runtime whose mix it is, None if none was asked to read it
    """

    key: str
    turned: str
    bits: float
    bits_of: Counted
    room: Room | None
    reader: str | None
    groups: tuple[ChosenGroup, ...]

    @property
    def kl(self) -> float:
        """The predicted KL divergence in nats per token: the sum of the groups'."""
        return math.fsum(group.kl for group in self.groups)

    @property
    def asked(self) -> str:
        """What was asked for, in words."""
        read = "" if self.reader is None else f", as {self.reader} reads them"
        return f"{self.turned}{read}"

    def line(self, plan: Plan) -> str:
        """For people: what was asked, what it became, what it should cost."""
        counts = Counter(group.scheme for group in self.groups)
        listed = ", ".join(f"{count} x {scheme}" for scheme, count in sorted(counts.items()))
        return (
            f"{self.asked}: {_bits(plan, self.bits_of):.3f} chosen, KL {self.kl:.5f} predicted on "
            f"calibration text; groups: {listed}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Choice:
        """The inverse of `to_dict`."""
        groups = tuple(
            ChosenGroup(weights=tuple(g["weights"]), scheme=g["scheme"], kl=g["kl"])
            for g in data["groups"]
        )
        room = None if data["room"] is None else Room(**data["room"])
        return cls(**{**data, "groups": groups, "room": room})

    def reported(self, plan: Plan) -> dict[str, Any]:
        """What the report says: asked, predicted and become."""
        told = self.to_dict()
        del told["key"]
        return {**told, "bits_chosen": round(_bits(plan, self.bits_of), 4), "predicted_kl": self.kl}

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe with a rule for every weight, behind its own rules."""
        return applied(recipe, self.groups)


def applied(recipe: Recipe, groups: Sequence[ChosenGroup]) -> Recipe:
    """The recipe with a rule for every weight of the groups, behind its own rules."""
    counts = Counter(group.scheme for group in groups)
    rules = tuple(
        Rule(match=name, scheme=Scheme.parse(group.scheme))
        for group in groups
        for name in group.weights
    )
    most = max(sorted(counts), key=lambda name: counts[name])
    scheme = Scheme.parse(most)
    return dataclasses.replace(
        recipe,
        # A file of ggml's blocks is called after a mix, which says what rules do not.
        scheme=Scheme.parse(mix_named_after(most)) if scheme.kind == "ggml" else scheme,
        fit=False,
        rules=(*recipe.rules, *rules),
    )


def choose(
    model: CausalModel,
    request: QuantizeOptions,
    calibration: Calibration,
    *,
    device: str,
    earlier: str | None,
    world: World = ALONE,
) -> Choice:
    """The choice for a request with a budget; `earlier` is that of a run to go on with, as JSON.

    Ranks of a `world` share the measuring.

    Raises BudgetError with what can be reached, FormatError if no runtime can mix.
    """
    recipe = request.loaded
    key = _key(model, request, calibration, device)
    same_everywhere(world, {"what the budget is chosen by": key})
    if earlier is not None and (found := _earlier(earlier)) is not None and found.key == key:
        return found
    wish = wish_of(request, model)
    fmt = make_format(request.format or "compressed-tensors")
    if wish.counted == "files" and isinstance(fmt, BuiltFormat):
        raise FormatError(
            f"{wish.flag}: {fmt.name} files are made by {fmt.built_by} and their size shows then "
            "only; give --bits"
        )
    groups = budget_groups(model, recipe, open_container(model, fmt))
    if not groups:
        raise RecipeError("rules decide every weight already, so nothing is left to choose")
    families = mixes(
        model,
        recipe,
        fmt,
        groups,
        reader=request.reader,
        unreadable=request.allow_unreadable,
    )
    every = tuple(dict.fromkeys(scheme for mixed in families.values() for scheme in mixed))
    sizes = [sizes_of(model, fmt, group, every) for group in groups]
    # What is measured is neither refined nor healed, and what is chosen may not be.
    plain = dataclasses.replace(request.loaded, refine=None, heal=None)
    fixed = _Fixed.of(
        model, dataclasses.replace(request, recipe=plain), groups, sizes, wish.counted
    )
    within = {
        reader: [{s: size for s, size in each.items() if s in mixed} for each in sizes]
        for reader, mixed in families.items()
    }
    capacity = wish.capacity(fixed.parameters) - fixed.num_bytes
    reached = _reachable(wish, within, fixed, capacity)
    counted = split_calibration(calibration)[1]
    prediction = predict(model, fixed.plan, counted, device=device)
    prediction.check(request.max_ram_bytes)
    with tempfile.TemporaryDirectory(prefix="quantkit-budget-") as folder:
        losses = measure(
            model,
            recipe,
            groups,
            sizes,
            calibration,
            scratch=Path(folder),
            gram_budget=prediction.gram_budget(request.max_ram_bytes, request.max_vram_bytes),
            device=device,
            progress=request.progress,
            world=world,
        )
    choices = [
        Choice(
            key=key,
            turned=wish.told(fixed.parameters),
            bits=8 * wish.capacity(fixed.parameters) / max(fixed.parameters, 1)
            if wish.bits is None
            else wish.bits,
            bits_of=wish.counted,
            room=wish.room,
            reader=reader,
            groups=_allocated(groups, reached[reader], losses, capacity),
        )
        for reader in reached
    ]
    return min(choices, key=lambda choice: choice.kl)


def _earlier(text: str) -> Choice | None:
    """The choice of an earlier run; None if what is left of it is damaged."""
    try:
        return Choice.from_dict(json.loads(text))
    except (ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, kw_only=True)
class _Fixed:
    """What the budget counts beside the groups: bytes of the rest, parameters of all."""

    num_bytes: int
    parameters: int
    source_bytes: int
    plan: Plan

    @classmethod
    def of(
        cls,
        model: CausalModel,
        request: QuantizeOptions,
        groups: Sequence[Group],
        sizes: Sequence[Sizes],
        counted: Counted,
    ) -> _Fixed:
        """From the plan in which every group has its smallest scheme."""
        smallest = [min(each, key=lambda s: each[s]) for each in sizes]
        chosen = tuple(
            ChosenGroup(weights=tuple(r.name for r in g.refs), scheme=s.name, kl=0.0)
            for g, s in zip(groups, smallest, strict=True)
        )
        plan = make_plan(
            model,
            applied(request.loaded, chosen),
            format_name=request.format,
            max_shard_bytes=request.max_shard_bytes,
            allow_unreadable=True,
        )
        num_bytes, parameters = _counted(plan, counted)
        if counted == "files":
            num_bytes += sum(_HEADER_BYTES * len(group.refs) for group in groups)
        taken = sum(each[s] for each, s in zip(sizes, smallest, strict=True))
        return cls(
            num_bytes=num_bytes - taken,
            parameters=parameters,
            source_bytes=sum(fate.source_bytes for fate in plan.fates),
            plan=plan,
        )


def _reachable(
    wish: Wish,
    within: Mapping[str | None, Sequence[Sizes]],
    fixed: _Fixed,
    capacity: int,
) -> dict[str | None, Sequence[Sizes]]:
    """The mixes that can keep the budget.

    Raises BudgetError if none does, or if all could have more: but for memory, of which more than
    enough is no mistake as long as the model as it is does not fit.
    """
    whole = {reader: sizes for reader, sizes in within.items() if all(sizes)}
    least = {reader: sum(min(each.values()) for each in s) for reader, s in whole.items()}
    most = max((sum(max(each.values()) for each in s) for s in whole.values()), default=0)
    found = {reader: sizes for reader, sizes in whole.items() if least[reader] <= capacity}
    room = wish.room
    if found and (capacity <= most or (room is not None and room.weights < fixed.source_bytes)):
        return found
    if found and room is not None:
        raise BudgetError(
            f"{wish.flag}: the model fits as it is, with {format_size(fixed.source_bytes)} of "
            f"weights {room.told()}; give --size or a --scheme if it is to be smaller"
        )
    low, high = (size + fixed.num_bytes for size in (min(least.values(), default=0), most))
    readers = " or ".join(reader for reader in within if reader is not None)
    read = f" as {readers} reads them" if readers else ""
    raise BudgetError(
        f"{wish.flag}: mixed schemes{read} reach {wish.range(low, high, fixed.parameters)}"
    )


def _allocated(
    groups: Sequence[Group],
    sizes: Sequence[Sizes],
    losses: Sequence[Mapping[Scheme, float]],
    capacity: int,
) -> tuple[ChosenGroup, ...]:
    """The least predicted KL of one mix."""
    schemes = [list(each) for each in sizes]
    options = [
        [Option(num_bytes=each[s], loss=loss[s]) for s in each]
        for each, loss in zip(sizes, losses, strict=True)
    ]
    picked = [schemes[k][i] for k, i in enumerate(allocate(options, capacity))]
    return tuple(
        ChosenGroup(weights=tuple(r.name for r in g.refs), scheme=s.name, kl=loss[s])
        for g, s, loss in zip(groups, picked, losses, strict=True)
    )


def _counted(plan: Plan, counted: Counted) -> tuple[int, int]:
    """Bytes and source parameters of what the budget counts."""
    fates = [f for f in plan.fates if counted != "linears" or f.fate == "quantized"]
    num_bytes = sum(f.num_bytes for f in fates)
    if counted == "files":
        num_bytes = plan.layout.file_bytes
    return num_bytes, sum(f.parameters for f in fates)


def _bits(plan: Plan, counted: Counted) -> float:
    num_bytes, parameters = _counted(plan, counted)
    return 8 * num_bytes / max(parameters, 1)


def _key(
    model: CausalModel, request: QuantizeOptions, calibration: Calibration, device: str
) -> str:
    """sha256 of everything that a choice depends on."""
    told = (
        __version__,
        model.source.fingerprint(),
        request.loaded.to_dict(),
        request.loaded.code(),
        calibration.fingerprint,
        (request.format, request.bits, request.bits_of, request.reader),
        (str(request.size), str(request.fit_vram), str(request.context)),
        request.allow_unreadable,
        device.split(":")[0],
    )
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
