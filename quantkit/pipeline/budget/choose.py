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
from quantkit.checkpoint.version import __version__
from quantkit.errors import BudgetError, RecipeError
from quantkit.formats.registry import make_format
from quantkit.methods.recipe import Recipe
from quantkit.methods.rules import Rule
from quantkit.model.causal import CausalModel
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.budget.allocate import Option, allocate
from quantkit.pipeline.budget.candidates import Group, budget_groups, mixes, sizes_of
from quantkit.pipeline.budget.sensitivity import measure, split_calibration
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import Plan, make_plan
from quantkit.pipeline.predict import predict

Sizes = Mapping[Scheme, int]


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
    reader   the runtime whose mix it is, None if none was asked to read it
    """

    key: str
    bits: float
    bits_of: str
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
        return f"{self.bits:g} bits of the {self.bits_of}{read}"

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
        return cls(**{**data, "groups": groups})

    def reported(self, plan: Plan) -> dict[str, Any]:
        """What the report says: asked, predicted and become."""
        told = self.to_dict()
        del told["key"]
        return {**told, "bits_chosen": round(_bits(plan, self.bits_of), 4), "predicted_kl": self.kl}

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe with a rule for every weight, behind its own rules."""
        counts = Counter(group.scheme for group in self.groups)
        rules = tuple(
            Rule(match=name, scheme=Scheme.parse(group.scheme))
            for group in self.groups
            for name in group.weights
        )
        return dataclasses.replace(
            recipe,
            scheme=Scheme.parse(max(sorted(counts), key=lambda name: counts[name])),
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
) -> Choice:
    """The choice for a request with `bits`; `earlier` is that of a run to go on with, as JSON.

    Raises BudgetError with the bits that can be reached, FormatError if no runtime can mix.
    """
    assert request.bits is not None
    recipe = request.loaded
    key = _key(model, request, calibration, device)
    if earlier is not None and (found := _earlier(earlier)) is not None and found.key == key:
        return found
    fmt = make_format(request.format or "compressed-tensors")
    groups = budget_groups(model, recipe)
    if not groups:
        raise RecipeError("--bits: rules decide every weight already, so nothing is left to choose")
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
    fixed = _Fixed.of(model, dataclasses.replace(request, recipe=plain), groups, sizes)
    within = {
        reader: [{s: size for s, size in each.items() if s in mixed} for each in sizes]
        for reader, mixed in families.items()
    }
    capacity = math.floor(request.bits * fixed.parameters / 8) - fixed.num_bytes
    reached = _reachable(request, within, fixed, capacity)
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
        )
    choices = [
        _allocated(groups, reached[reader], losses, capacity, key, request, reader)
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
    plan: Plan

    @classmethod
    def of(
        cls,
        model: CausalModel,
        request: QuantizeOptions,
        groups: Sequence[Group],
        sizes: Sequence[Sizes],
    ) -> _Fixed:
        """From the plan in which every group has its smallest scheme."""
        smallest = [min(each, key=lambda s: each[s]) for each in sizes]
        chosen = tuple(
            ChosenGroup(weights=tuple(r.name for r in g.refs), scheme=s.name, kl=0.0)
            for g, s in zip(groups, smallest, strict=True)
        )
        choice = Choice(key="", bits=0.0, bits_of="", reader=None, groups=chosen)
        plan = make_plan(
            model,
            choice.applied(request.loaded),
            format_name=request.format,
            max_shard_bytes=request.max_shard_bytes,
            allow_unreadable=True,
        )
        num_bytes, parameters = _counted(plan, request.bits_of)
        taken = sum(each[s] for each, s in zip(sizes, smallest, strict=True))
        return cls(num_bytes=num_bytes - taken, parameters=parameters, plan=plan)


def _reachable(
    request: QuantizeOptions,
    within: Mapping[str | None, Sequence[Sizes]],
    fixed: _Fixed,
    capacity: int,
) -> dict[str | None, Sequence[Sizes]]:
    """The mixes that can keep the budget.  Raises BudgetError if none does, or none can use it."""
    whole = {reader: sizes for reader, sizes in within.items() if all(sizes)}
    least = {reader: sum(min(each.values()) for each in s) for reader, s in whole.items()}
    most = max((sum(max(each.values()) for each in s) for s in whole.values()), default=0)
    found = {reader: sizes for reader, sizes in whole.items() if least[reader] <= capacity}
    if found and capacity <= most:
        return found
    low, high = (
        8 * (size + fixed.num_bytes) / fixed.parameters
        for size in (min(least.values(), default=0), most)
    )
    readers = " or ".join(reader for reader in within if reader is not None)
    read = f" as {readers} reads them" if readers else ""
    raise BudgetError(
        f"--bits {request.bits:g}: mixed integers{read} reach {math.ceil(1000 * low) / 1000:.3f} "
        f"to {math.floor(1000 * high) / 1000:.3f} bits of the {request.bits_of}; choose a number "
        "between them"
    )


def _allocated(
    groups: Sequence[Group],
    sizes: Sequence[Sizes],
    losses: Sequence[Mapping[Scheme, float]],
    capacity: int,
    key: str,
    request: QuantizeOptions,
    reader: str | None,
) -> Choice:
    """The least predicted KL of one mix."""
    assert request.bits is not None
    schemes = [list(each) for each in sizes]
    options = [
        [Option(num_bytes=each[s], loss=loss[s]) for s in each]
        for each, loss in zip(sizes, losses, strict=True)
    ]
    picked = [schemes[k][i] for k, i in enumerate(allocate(options, capacity))]
    return Choice(
        key=key,
        bits=request.bits,
        bits_of=request.bits_of,
        reader=reader,
        groups=tuple(
            ChosenGroup(weights=tuple(r.name for r in g.refs), scheme=s.name, kl=loss[s])
            for g, s, loss in zip(groups, picked, losses, strict=True)
        ),
    )


def _counted(plan: Plan, bits_of: str) -> tuple[int, int]:
    """Bytes and source parameters of what the budget counts."""
    fates = [f for f in plan.fates if bits_of == "model" or f.fate == "quantized"]
    return sum(f.num_bytes for f in fates), sum(math.prod(f.shape) for f in fates)


def _bits(plan: Plan, bits_of: str) -> float:
    return plan.bits_per_weight if bits_of == "model" else plan.bits_per_quantized_weight


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
        request.allow_unreadable,
        device.split(":")[0],
    )
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
