"""What a recipe says: parts with their options, and rules that pick weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.errors import RecipeError
from quantkit.methods.parts import PartKind, make_part
from quantkit.numbers.scheme import Scheme

_RULE_KEYS = ("match", "scheme", "keep")


@dataclass(frozen=True, kw_only=True)
class PartSpec:
    """A part's name and options as the recipe writes them."""

    name: str
    options: tuple[tuple[str, object], ...] = ()

    @classmethod
    def from_value(cls, kind: PartKind, value: object) -> PartSpec:
        """From `gptq` or `{name: gptq, damp: 0.01}`; unknown options raise RecipeError."""
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise RecipeError(
                f"{kind}: {value!r} given; write a name, or {{name: ..., option: ...}}"
            )
        options = tuple((str(k), _frozen(v)) for k, v in value.items() if k != "name")
        make_part(kind, value["name"], dict(options))
        return cls(name=value["name"], options=options)

    def to_value(self) -> dict[str, object]:
        """What the YAML file would say."""
        return {"name": self.name, **{k: _thawed(v) for k, v in self.options}}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """For weights whose checkpoint name matches the glob: a scheme, or keep (scheme None)."""

    match: str
    scheme: Scheme | None

    def to_value(self) -> dict[str, object]:
        """What the YAML file would say."""
        if self.scheme is None:
            return {"match": self.match, "keep": True}
        return {"match": self.match, "scheme": self.scheme.name}

    def matches(self, name: str) -> bool:
        """True if the glob matches the checkpoint name, with or without its `.weight`."""
        stem = name.removesuffix(".weight")
        return any(fnmatch.fnmatchcase(n, self.match) for n in (name, stem))


def rules_of(value: object, where: str) -> tuple[Rule, ...]:
    """The rules of a recipe called `where`.  RecipeError names the one that is none."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RecipeError(f"{where}: rules must be a list")
    return tuple(_rule(rule, where) for rule in value)


def _rule(value: object, where: str) -> Rule:
    if not isinstance(value, Mapping) or set(value) - set(_RULE_KEYS) or "match" not in value:
        raise RecipeError(
            f"{where}: rule {value!r}; "
            "write {match: GLOB, scheme: NAME} or {match: GLOB, keep: true}"
        )
    if ("scheme" in value) == ("keep" in value) or value.get("keep", True) is not True:
        raise RecipeError(
            f"{where}: rule {value['match']!r} needs either `scheme: NAME` or `keep: true`"
        )
    scheme = Scheme.parse(str(value["scheme"])) if "scheme" in value else None
    return Rule(match=str(value["match"]), scheme=scheme)


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _thawed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
