"""The parts a recipe is made of, and how a name finds one: the file name is the registry.

`rounding: gptq` means class `Gptq` in rounding/gptq.py; `package.module:Class` names a
part from elsewhere.  A part is a frozen dataclass whose fields are its options.

Shapes: O out features, I in features, G groups per row, N groups in all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import pkgutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from quantkit.errors import QuantkitError, RecipeError
from quantkit.methods.stats import Needs, Stats
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import QuantizedTensor, Scale

if TYPE_CHECKING:
    from torch import Tensor

PartKind = Literal["rotation", "target", "range", "rounding", "refine", "heal", "transform"]
_PACKAGES: Mapping[str, str] = {
    "rotation": "quantkit.methods.rotations",
    "target": "quantkit.methods.targets",
    "range": "quantkit.methods.ranges",
    "rounding": "quantkit.methods.rounding",
    "refine": "quantkit.methods.refine",
    "heal": "quantkit.methods.heal",
    "transform": "quantkit.methods.transforms",
}


@dataclass(frozen=True, kw_only=True)
class GroupRange:
    """A range's answer for one weight.

    scale    as stored
    zero     float32 [O, G] integers, or None for symmetric schemes
    coding   float32 scales that codes are computed with: `scale.values()`, except where a format's
             owner computes codes before it rounds the scales (bitsandbytes' nested absmax)
    degraded a note for the report if statistics were missing and it had to fall back (else None)
    """

    scale: Scale
    zero: Tensor | None
    coding: Tensor
    degraded: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A rounding's answer: codes uint8 [O, I], and a note if it had to fall back (else None).

    `scale` (as stored) and `zero`, float32 [O, G], replace the range's if it chose its own.
    """

    codes: Tensor
    degraded: str | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Retargeted:
    """A target's answer: float32 [O, I], and a note if it had to fall back (else None)."""

    weight: Tensor
    degraded: str | None = None


@runtime_checkable
class Rotation(Protocol):
    """Says by what the model's activations are rotated, which its weights make up for.

    `stream`: those between the blocks are; `heads`: each head of values is; `untie`: a tied output
    head becomes a tensor of its own.
    """

    stream: bool
    heads: bool
    untie: bool

    def __call__(self, x_nI: Tensor, key: str) -> Tensor:
        """x R for float64 rows [n, I] and the orthogonal matrix R [I, I] that belongs to a key.

        A row's result does not depend on the rows that come with it.
        """
        ...


@runtime_checkable
class Target(Protocol):
    """Chooses the weight that range and rounding are to come near to.  Rows are independent."""

    def needs(self, scheme: Scheme) -> Needs:
        """The statistics this target reads."""
        ...

    def __call__(self, weight_OI: Tensor, stats: Stats | None) -> Retargeted:
        """What stands for a float32 weight."""
        ...


@runtime_checkable
class Range(Protocol):
    """Chooses scale and zero per group."""

    def needs(self, scheme: Scheme) -> Needs:
        """The statistics this range reads."""
        ...

    def __call__(
        self, name: str, weight_OI: Tensor, scheme: Scheme, stats: Stats | None
    ) -> GroupRange:
        """Scale and zero of each group of a float32 weight; options may match its `name`."""
        ...


@runtime_checkable
class Rounding(Protocol):
    """Chooses codes for given scales.  Rows are independent: weights that share an input arrive
    stacked, so that one factorisation serves them all."""

    def needs(self, scheme: Scheme) -> Needs:
        """The statistics this rounding reads."""
        ...

    def __call__(
        self,
        weight_OI: Tensor,
        scheme: Scheme,
        scale: Tensor,
        zero: Tensor | None,
        stats: Stats | None,
    ) -> Rounded:
        """Codes of a float32 weight; scale and zero: float32 [O, G] ([N] for flat blocks)."""
        ...


class Outputs(Protocol):
    """A block's outputs beside those that are wanted, as the weights that are refined change.

    A loss is what one batch of the calibration's outputs lacks: ‖got - wanted‖² / ‖wanted‖².
    """

    batches: int

    def put_(self, weights: Iterable[Tensor]) -> None:
        """Has the block compute with other values, float32 [O, I] each, from now on."""
        ...

    def losses(self, batches: Sequence[int]) -> list[float]:
        """The loss of each of these batches, which several processes work out side by side."""
        ...

    def slopes(self, batch: int) -> tuple[float, list[Tensor]]:
        """The loss of a batch and its gradient by each weight, [O, I] in the block's dtype."""
        ...


@dataclass(frozen=True, kw_only=True)
class Refined:
    """A refinement's answer: the weights anew, and the loss on batches that none was fitted to.

    `after` is never more than `before`; where nothing helped the weights are those given.
    """

    tensors: list[QuantizedTensor]
    before: float
    after: float


@runtime_checkable
class Refine(Protocol):
    """Moves codes and scales of a block's weights, all at once, for the sake of its outputs."""

    def takes(self, scheme: Scheme) -> bool:
        """Whether weights of that scheme are refined; those of others stay as they are."""
        ...

    def held_bytes(self) -> int:
        """What it holds for each weight number meanwhile, beside the codes and the gradient."""
        ...

    def __call__(self, tensors: Sequence[QuantizedTensor], outputs: Outputs) -> Refined:
        """The weights refined; `half_scales` of their schemes says what their files store."""
        ...


@runtime_checkable
class Heal(Protocol):
    """Says how the scales of a quantized model are trained on the original's logits."""

    rate: float
    iterations: int

    def takes(self, scheme: Scheme) -> bool:
        """Whether scales of that scheme are trained; others stay as they are."""
        ...

    def judges(self, batches: int) -> int:
        """How many of the batches, the last ones, only judge."""
        ...

    def looks_after(self, step: int) -> bool:
        """Whether these judge after a step, the first being 0."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A weight that reads the scaled input: float32 [O, I]; scheme None = it stays as it is."""

    name: str
    weight: Tensor
    scheme: Scheme | None


@runtime_checkable
class Transform(Protocol):
    """Chooses the vector that a scale group is folded by: producer / s, readers · s."""

    def needs(self, scheme: Scheme) -> Needs:
        """The statistics this transform reads."""
        ...

    def __call__(
        self, readers: Sequence[Reader], stats: Stats, channel_map: Tensor | None
    ) -> Tensor | None:
        """s float32 [I] > 0, or None to leave the group as it is.

        channel_map int64 [I]: input channels with equal entries come from one producer channel and
        must get equal s (GQA); None if each channel has its own.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is done: operations of float32 matrix products, numbers that elementwise passes read."""

    products: float = 0.0
    passes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(products=self.products + other.products, passes=self.passes + other.passes)


@runtime_checkable
class Estimated(Protocol):
    """A part that says how much it does, so that a run's time can be predicted; optional."""

    def work(self, rows: int, columns: int, scheme: Scheme) -> Work:
        """The work on weights [rows, columns] that share an input."""
        ...


@runtime_checkable
class Learning(Estimated, Protocol):
    """A part that learns by gradients and says how often it runs a block."""

    def takes(self, scheme: Scheme) -> bool:
        """Whether weights of that scheme learn."""
        ...

    def steps(self, batches: int) -> tuple[int, int]:
        """Gradients it takes, and runs beside them, each on one of so many batches."""
        ...


def available(kind: PartKind) -> list[str]:
    """Names of the built-in parts of a kind, sorted."""
    package = importlib.import_module(_PACKAGES[kind])
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_")


def part_class(kind: PartKind, name: str) -> type[Any]:
    """The class that `name` stands for.  Raises RecipeError listing the known names."""
    if ":" in name:
        found: type[Any] = imported(name, kind, RecipeError)
        return found
    if name in available(kind):
        module_name = f"{_PACKAGES[kind]}.{name}"
        class_name = "".join(word.capitalize() for word in name.split("_"))
    else:
        known = ", ".join(available(kind))
        raise RecipeError(f"{kind} {name!r} is unknown; known: {known}, or package.module:Class")
    built_in: type[Any] = getattr(importlib.import_module(module_name), class_name)
    return built_in


def imported(name: str, kind: str, error: type[QuantkitError]) -> Any:
    """What `package.module:Name` stands for.  Raises `error` if it is no such name or not there."""
    module, _, attribute = name.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise error(f"{kind} {name[:100]!r}: write package.module:Class")
    try:
        return getattr(importlib.import_module(module), attribute)
    # A module of others runs as it is imported, and fails in any way it likes.
    except Exception as cause:
        raise error(f"{kind} {name!r} cannot be imported: {cause}") from cause


def code_of(kind: PartKind, name: str) -> str:
    """sha256 of the file a third party's part comes from; empty for a built-in one."""
    if ":" not in name:
        return ""
    file = sys.modules[part_class(kind, name).__module__].__file__
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def make_part(kind: PartKind, name: str, options: Mapping[str, object]) -> Any:
    """A part with these options.  Raises RecipeError for an unknown option, listing the known."""
    cls = part_class(kind, name)
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        raise RecipeError(f"{kind} {name!r} must be a dataclass whose fields are its options")
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = get_type_hints(cls)
    values: dict[str, object] = {}
    for key, value in options.items():
        if key not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise RecipeError(f"{kind} {name!r} has no option {key!r}; its options: {listed}")
        values[key] = tuple(value) if isinstance(value, list) else value
        if not _fits(values[key], hints[key]):
            given = known[key].type
            raise RecipeError(f"{kind} {name!r}: option {key} is {value!r}; it takes {given}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{kind} {name!r}: {error}") from error


def _fits(value: object, hint: Any) -> bool:
    """False if a value from YAML is surely not of the type that an option is declared with."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and (
            len(inner) != 2
            or inner[1] is not Ellipsis
            or all(_fits(each, inner[0]) for each in value)
        )
    if hint in (int, float):
        allowed = int if hint is int else (int, float)
        return isinstance(value, allowed) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)
