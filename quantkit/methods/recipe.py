"""Recipes: a YAML file that names the parts of a method, and the rules that pick weights.

A method is a recipe: transforms, then a range, then a rounding, on the grid of a scheme.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from quantkit.checkpoint.door import RECIPE_BYTES, given_path, read_plain
from quantkit.errors import CalibrationError, RecipeError
from quantkit.methods.parts import (
    Heal,
    PartKind,
    Range,
    Refine,
    Rotation,
    Rounding,
    Target,
    Transform,
    code_of,
    make_part,
)
from quantkit.methods.plain_yaml import parse_yaml
from quantkit.methods.rules import PartSpec, Rule, rules_of
from quantkit.methods.stats import Needs
from quantkit.numbers.cache import CacheScheme
from quantkit.numbers.scheme import Scheme

_KEYS = (
    "method",
    "summary",
    "scheme",
    "fit",
    "rotation",
    "target",
    "range",
    "rounding",
    "refine",
    "heal",
    "transforms",
    "propagate",
    "rules",
    "head",
    "mtp",
    "recurrent",
    "experts",
    "towers",
    "kv",
    "calibration",
)
# What `recurrent` and `towers` say in place of a scheme.
KEEP: Literal["keep"] = "keep"
_CALIBRATION_KEYS = ("samples", "seq_len")
# A thousand times the default; their ids alone take 2 GiB.
MOST_TOKENS = 2**28


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method, ready to plan: every option has its value and every name has been looked up.

    `fit` lets the groups of `scheme` shrink where they do not divide a weight's columns.
    `recurrent` is the scheme of weights that feed a state carried along the sequence, or KEEP; None
    means that they are like all others.  `experts` says whether statistics of experts are of the
    tokens routed to them or of all.
    """

    method: str
    summary: str
    scheme: Scheme
    fit: bool = False
    rotation: PartSpec | None = None
    target: PartSpec | None = None
    range: PartSpec
    rounding: PartSpec
    refine: PartSpec | None = None
    heal: PartSpec | None = None
    transforms: tuple[PartSpec, ...] = ()
    propagate: bool = True
    rules: tuple[Rule, ...] = ()
    head: Scheme | None = None
    mtp: Scheme | None = None
    recurrent: Scheme | Literal["keep"] | None = None
    experts: Literal["routed", "all"] = "routed"
    towers: Scheme | None = None
    kv: CacheScheme | None = None
    samples: int = 128
    seq_len: int = 2048

    def __post_init__(self) -> None:
        check_size(self.samples, self.seq_len)
        if self.target is not None and not self.propagate:
            raise RecipeError(
                f"target {self.target.name} needs `propagate: true`: it makes up for the errors of "
                "the blocks before"
            )
        if self.transforms and not self._reads_statistics:
            raise RecipeError(
                f"transform {self.transforms[0].name} finds nothing to work on with "
                f"{self.scheme.name}: it looks at activations that are rounded; choose a scheme "
                "such as w8a8_row, or another method"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, object], where: str) -> Recipe:
        """A recipe from its YAML mapping.  `where` names the file in errors."""
        for key in data:
            if key not in _KEYS:
                raise RecipeError(f"{where}: unknown key {key!r}; known: {', '.join(_KEYS)}")
        for key in ("method", "scheme", "range", "rounding"):
            if key not in data:
                raise RecipeError(f"{where}: {key!r} is missing")
        transforms = data.get("transforms") or []
        if not isinstance(transforms, Sequence) or isinstance(transforms, str):
            raise RecipeError(f"{where}: transforms must be a list")
        calibration = data.get("calibration") or {}
        if not isinstance(calibration, Mapping) or set(calibration) - set(_CALIBRATION_KEYS):
            raise RecipeError(f"{where}: calibration takes {', '.join(_CALIBRATION_KEYS)} only")
        head, mtp, target = data.get("head"), data.get("mtp"), data.get("target")
        kv, recurrent = data.get("kv"), data.get("recurrent")
        refine, heal, towers = data.get("refine"), data.get("heal"), data.get("towers")
        rotation = data.get("rotation")
        propagate = data.get("propagate", True)
        if not isinstance(propagate, bool):
            raise RecipeError(f"{where}: propagate is true or false, not {propagate!r}")
        fit = data.get("fit", False)
        if not isinstance(fit, bool):
            raise RecipeError(f"{where}: fit is true or false, not {fit!r}")
        experts = data.get("experts", "routed")
        if experts not in ("routed", "all"):
            raise RecipeError(f"{where}: experts is routed or all, not {experts!r}")
        return cls(
            method=str(data["method"]),
            summary=str(data.get("summary", "")),
            scheme=Scheme.parse(str(data["scheme"])),
            fit=fit,
            rotation=None if rotation is None else PartSpec.from_value("rotation", rotation),
            target=None if target is None else PartSpec.from_value("target", target),
            range=PartSpec.from_value("range", data["range"]),
            rounding=PartSpec.from_value("rounding", data["rounding"]),
            refine=None if refine is None else PartSpec.from_value("refine", refine),
            heal=None if heal is None else PartSpec.from_value("heal", heal),
            transforms=tuple(PartSpec.from_value("transform", t) for t in transforms),
            propagate=propagate,
            rules=rules_of(data.get("rules"), where),
            head=None if head is None else Scheme.parse(str(head)),
            mtp=None if mtp is None else Scheme.parse(str(mtp)),
            recurrent=None if recurrent is None else _scheme_or_keep(str(recurrent)),
            experts="all" if experts == "all" else "routed",
            towers=None if towers in (None, KEEP) else Scheme.parse(str(towers)),
            kv=None if kv is None else CacheScheme.parse(str(kv)),
            samples=_count(calibration, "samples", 128, where),
            seq_len=_count(calibration, "seq_len", 2048, where),
        )

    def to_dict(self) -> dict[str, object]:
        """The YAML mapping that gives this recipe again."""
        data: dict[str, object] = {
            "method": self.method,
            "summary": self.summary,
            "scheme": self.scheme.name,
            "calibration": {"samples": self.samples, "seq_len": self.seq_len},
            "propagate": self.propagate,
            "transforms": [t.to_value() for t in self.transforms],
            "range": self.range.to_value(),
            "rounding": self.rounding.to_value(),
            "rules": [r.to_value() for r in self.rules],
        }
        if self.fit:
            data["fit"] = True
        if self.rotation is not None:
            data["rotation"] = self.rotation.to_value()
        if self.target is not None:
            data["target"] = self.target.to_value()
        if self.refine is not None:
            data["refine"] = self.refine.to_value()
        if self.heal is not None:
            data["heal"] = self.heal.to_value()
        if self.head is not None:
            data["head"] = self.head.name
        if self.mtp is not None:
            data["mtp"] = self.mtp.name
        if self.recurrent is not None:
            data["recurrent"] = self.recurrent_name
        if self.experts != "routed":
            data["experts"] = self.experts
        if self.towers is not None:
            data["towers"] = self.towers.name
        if self.kv is not None:
            data["kv"] = self.kv.name
        return data

    @property
    def recurrent_name(self) -> str:
        """`recurrent` as it is written; not None."""
        assert self.recurrent is not None
        return self.recurrent if self.recurrent == KEEP else self.recurrent.name

    def rule_for(self, name: str) -> Rule | None:
        """The first rule that matches the checkpoint name; None if none does."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def make_rotation(self) -> Rotation | None:
        """The rotation part; None where the model's activations stay as they are."""
        if self.rotation is None:
            return None
        part: Rotation = make_part("rotation", self.rotation.name, dict(self.rotation.options))
        return part

    def make_target(self) -> Target | None:
        """The target part; None where a weight's own outputs are the target."""
        if self.target is None:
            return None
        part: Target = make_part("target", self.target.name, dict(self.target.options))
        return part

    def make_range(self) -> Range:
        """The range part."""
        part: Range = make_part("range", self.range.name, dict(self.range.options))
        return part

    def make_rounding(self) -> Rounding:
        """The rounding part."""
        part: Rounding = make_part("rounding", self.rounding.name, dict(self.rounding.options))
        return part

    def make_refine(self) -> Refine | None:
        """The part that refines a block's weights together; None where that is not done."""
        if self.refine is None:
            return None
        part: Refine = make_part("refine", self.refine.name, dict(self.refine.options))
        return part

    def make_heal(self) -> Heal | None:
        """The part that trains a quantized model's scales; None where that is not done."""
        if self.heal is None:
            return None
        part: Heal = make_part("heal", self.heal.name, dict(self.heal.options))
        return part

    def make_transforms(self) -> tuple[Transform, ...]:
        """The transform parts, in order."""
        return tuple(make_part("transform", t.name, dict(t.options)) for t in self.transforms)

    def code(self) -> str:
        """Hashes of the parts that come from elsewhere, so that their changes are noticed."""
        kinds: list[tuple[PartKind, PartSpec]] = [
            ("range", self.range),
            ("rounding", self.rounding),
        ]
        kinds += [("transform", part) for part in self.transforms]
        if self.rotation is not None:
            kinds.append(("rotation", self.rotation))
        if self.target is not None:
            kinds.append(("target", self.target))
        if self.refine is not None:
            kinds.append(("refine", self.refine))
        if self.heal is not None:
            kinds.append(("heal", self.heal))
        return " ".join(filter(None, (code_of(kind, part.name) for kind, part in kinds)))

    def needs(self, scheme: Scheme) -> Needs:
        """The statistics this method reads for a weight of that scheme."""
        parts = self.make_target(), self.make_range(), self.make_rounding()
        needs = input_needs(parts, scheme)
        for transform in self.make_transforms():
            needs |= transform.needs(scheme)
        return needs

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme the recipe can give to a weight."""
        head = () if self.head is None else (self.head,)
        return tuple(dict.fromkeys((*self.block_schemes, *head)))

    @property
    def block_schemes(self) -> tuple[Scheme, ...]:
        """Those that it can give to a weight of a block."""
        found = [self.scheme, *(r.scheme for r in self.rules if r.scheme is not None)]
        if isinstance(self.recurrent, Scheme):
            found.append(self.recurrent)
        return tuple(dict.fromkeys(found))

    @property
    def calibrated(self) -> bool:
        """True if any weight needs statistics, is refined or healed, or the cache scales:
        calibration text is needed."""
        learned = self.refines or self.heals
        return self.kv is not None or self._reads_statistics or learned

    @property
    def refines(self) -> bool:
        """True if weights of any of its schemes are refined."""
        part = self.make_refine()
        return part is not None and any(part.takes(scheme) for scheme in self.block_schemes)

    @property
    def heals(self) -> bool:
        """True if scales of any of its schemes are trained: not where inputs are rounded."""
        part = self.make_heal()
        if part is None or any(scheme.activation_bits != 16 for scheme in self.block_schemes):
            return False
        return any(part.takes(scheme) for scheme in self.block_schemes)

    @property
    def _reads_statistics(self) -> bool:
        return any(self.needs(scheme) for scheme in self.schemes)


def check_size(samples: int, seq_len: int) -> None:
    """CalibrationError unless so many sequences of so many tokens can be asked for."""
    if samples < 1 or seq_len < 1:
        raise CalibrationError(
            f"--samples {samples} x --seq-len {seq_len}: both must be at least 1"
        )
    if samples * seq_len > MOST_TOKENS:
        asked = " x ".join(
            f"{name} {value if value < 10**12 else f'10**{len(str(value)) - 1} and more'}"
            for name, value in (("--samples", samples), ("--seq-len", seq_len))
        )
        raise CalibrationError(
            f"{asked}: more than {MOST_TOKENS} tokens in all; the defaults, 128 x 2048, serve most "
            "models"
        )


def input_needs(parts: tuple[Target | None, Range, Rounding], scheme: Scheme) -> Needs:
    """The statistics that a method's parts and the scheme itself read at an input."""
    needs = Needs()
    for part in parts:
        needs |= Needs() if part is None else part.needs(scheme)
    return needs | Needs(moments=True) if scheme.static_input else needs


def builtin_recipes() -> dict[str, Path]:
    """Path of each shipped recipe by method name, sorted."""
    folder = Path(str(files("quantkit"))) / "recipes"
    if not folder.is_dir():
        folder = Path(str(files("quantkit"))).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(
    method: str | None = None,
    *,
    path: Path | None = None,
    overrides: Sequence[str] = (),
    scheme: str | None = None,
    skip: Sequence[str] = (),
    rules: Sequence[str] = (),
    head: str | None = None,
    mtp: str | None = None,
    recurrent: str | None = None,
    experts: str | None = None,
    towers: str | None = None,
    kv: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    default_scheme: str | None = None,
) -> Recipe:
    """The recipe of a built-in method or a file, with the command line's changes applied.

    `default_scheme` stands for a built-in method's own where `scheme` is None.

    `overrides` are `part.field=value` with YAML values; `skip` globs keep weights and come first,
    then `rules` (`WHAT=SCHEME`, see `Rule.parse`), then the recipe's own; a `scheme` given here
    is taken as it is, never fitted.  Raises RecipeError or SchemeError.
    """
    if path is None:
        known = builtin_recipes()
        if method not in known:
            raise RecipeError(
                f"method {method!r} is unknown; known: {', '.join(known)}, or --recipe FILE"
            )
        path = known[method]
    data = _read_yaml(given_path(path, error=RecipeError))
    if method is not None and data.get("method") != method:
        raise RecipeError(f"{path}: its method is {data.get('method')!r}, not {method!r} as asked")
    named = scheme
    for override in overrides:
        _override_(data, override)
        if override.partition("=")[0] == "scheme":
            named = named or str(data["scheme"])
    if named is None and method is not None:
        named = default_scheme
    if named is not None:
        data.update(scheme=named, fit=False)
    if head is not None:
        data["head"] = head
    if mtp is not None:
        data["mtp"] = mtp
    if recurrent is not None:
        data["recurrent"] = recurrent
    if experts is not None:
        data["experts"] = experts
    if towers is not None:
        data["towers"] = towers
    if kv is not None:
        data["kv"] = kv
    recipe = Recipe.from_dict(data, str(path.name))
    asked = tuple(Rule(match=glob, scheme=None) for glob in skip) + tuple(map(Rule.parse, rules))
    return dataclasses.replace(
        recipe,
        rules=asked + recipe.rules,
        samples=recipe.samples if samples is None else samples,
        seq_len=recipe.seq_len if seq_len is None else seq_len,
    )


def _scheme_or_keep(text: str) -> Scheme | Literal["keep"]:
    return KEEP if text == KEEP else Scheme.parse(text)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = read_plain(path, largest=RECIPE_BYTES, error=RecipeError).decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is no text in UTF-8: {error}") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping, with the keys method, scheme, range ...")
    return data


def _override_(data: dict[str, Any], text: str) -> None:
    """Applies `part.field=value`: range.steps=20, rounding.name=gptq, transforms.awq.grid=10."""
    shown = text if len(text) <= 100 else f"{text[:100]}..."
    target, equals, raw = text.partition("=")
    keys = target.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {shown!r}: write part.field=value, as in rounding.damp=0.05")
    value = parse_yaml(raw, f"--set {shown!r}")
    where: Any = data
    for depth, key in enumerate(keys[:-1]):
        if isinstance(where, list):
            where[:] = [{"name": part} if isinstance(part, str) else part for part in where]
            found = [p for p in where if isinstance(p, dict) and p.get("name") == key]
            if not found:
                names = ", ".join(str(p.get("name")) for p in where) or "none"
                raise RecipeError(
                    f"--set {shown!r}: no part {key!r} there; the recipe has: {names}"
                )
            where = found[0]
            continue
        if isinstance(where.get(key), str):
            where[key] = {"name": where[key]}
        if not isinstance(where.get(key), dict | list):
            listed = ", ".join(k for k, v in data.items() if isinstance(v, dict | list))
            raise RecipeError(
                f"--set {shown!r}: {'.'.join(keys[: depth + 1])!r} is no part; parts: {listed}"
            )
        where = where[key]
    if isinstance(where, list):
        raise RecipeError(f"--set {shown!r}: name the part too, as in transforms.awq.grid=10")
    if keys[-1] == "name" and where.get("name") != value:
        where.clear()
    where[keys[-1]] = value


def _count(calibration: Mapping[object, object], key: str, default: int, where: str) -> int:
    value = calibration.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(f"{where}: calibration.{key} is {value!r}; give a number of at least 1")
    return value
