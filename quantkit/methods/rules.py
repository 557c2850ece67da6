"""What a recipe says: parts with their options, and rules that pick weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from quantkit.errors import RecipeError
from quantkit.methods.parts import PartKind, make_part
from quantkit.numbers.scheme import Scheme

_RULE_KEYS = ("match", "role", "scheme", "keep")
# What a weight is for, as `quantkit.model.probes.roles` tells.
Purpose = Literal[
    "experts", "shared-experts", "attention", "linear-attention", "mlp", "head", "embeddings"
]
ROLES: tuple[str, ...] = get_args(Purpose)


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
    """For weights that a glob of checkpoint names or a role picks: a scheme, or keep (None).

    Of a role (one of ROLES, `match` is "" then) `names` are its weights, once a model tells them.
    """

    match: str
    scheme: Scheme | None
    role: str | None = None
    names: frozenset[str] | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """From `ROLE=SCHEME`, `GLOB=SCHEME` or `...=keep`.  RecipeError, SchemeError."""
        what, equals, scheme = text.rpartition("=")
        if not equals or not what or not scheme:
            raise RecipeError(
                f"--rule {text!r}: write WHAT=SCHEME or WHAT=keep, where WHAT is a role "
                f"({', '.join(ROLES)}) or a glob of weight names"
            )
        key = "role" if what in ROLES else "match"
        chosen = {"keep": True} if scheme == "keep" else {"scheme": scheme}
        return _rule({key: what, **chosen}, "--rule")

    @property
    def told(self) -> str:
        """For people: what picks the weights."""
        return f"rule {self.match!r}" if self.role is None else f"rule for {self.role}"

    def to_value(self) -> dict[str, object]:
        """What the YAML file would say."""
        picks = {"match": self.match} if self.role is None else {"role": self.role}
        return picks | ({"keep": True} if self.scheme is None else {"scheme": self.scheme.name})

    def matches(self, name: str) -> bool:
        """True if the weight has the role, or the glob matches its checkpoint name, with or
        without its `.weight`."""
        if self.role is not None:
            assert self.names is not None, "roles are of a model: see `decide.with_roles`"
            return name in self.names
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
    if (
        not isinstance(value, Mapping)
        or set(value) - set(_RULE_KEYS)
        or ("match" in value) == ("role" in value)
    ):
        raise RecipeError(
            f"{where}: rule {value!r}; "
            "write {match: GLOB, scheme: NAME} or {match: GLOB, keep: true}, "
            "or {role: NAME, ...} to pick weights by what they are for"
        )
    picks = value.get("match", value.get("role"))
    if ("scheme" in value) == ("keep" in value) or value.get("keep", True) is not True:
        raise RecipeError(f"{where}: rule {picks!r} needs either `scheme: NAME` or `keep: true`")
    scheme = Scheme.parse(str(value["scheme"])) if "scheme" in value else None
    if "match" in value:
        return Rule(match=str(picks), scheme=scheme)
    if picks not in ROLES:
        raise RecipeError(f"{where}: role {picks!r} is unknown; known: {', '.join(ROLES)}")
    return Rule(match="", role=str(picks), scheme=scheme)


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _thawed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
