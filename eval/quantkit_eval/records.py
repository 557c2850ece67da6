"""An evaluation as one value: everything the report pages show and report.json holds."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from quantkit_eval.figures.divergence import Divergence
from quantkit_eval.figures.layers import BlockCost, WeightCost
from quantkit_eval.figures.perplexity import Perplexity
from quantkit_eval.figures.sensitivity import BlockSensitivity
from quantkit_eval.gate import Judgement, Outcome
from quantkit_eval.subjects import Identity
from quantkit_eval.tasks.accuracy import TaskComparison
from quantkit_eval.windows import Protocol

SCHEMA = "quantkit.evaluation/3"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A name and its value, as lists of provenance show them."""

    name: str
    value: str


@dataclass(frozen=True, kw_only=True)
class TextUsed:
    """The evaluation text and how it was cut; `facts` are its config, split, revision, hashes."""

    source: str
    sha256: str
    facts: tuple[Fact, ...]
    protocol: Protocol

    @property
    def split(self) -> str | None:
        """The split of a dataset, None for a file."""
        return next((fact.value for fact in self.facts if fact.name == "split"), None)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt of the text and what both models make of it, greedily."""

    prompt: str
    original: str
    quantized: str


@dataclass(frozen=True, kw_only=True)
class TokenShown:
    """A token with a large KL divergence: what stood before it, and what both models expected."""

    before: str
    token: str
    best_original: str
    best_quantized: str
    kl: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question of a task and who answered it, so that others can recompute the statistics."""

    task: str
    label: str
    original: bool
    quantized: bool


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One quantized model.

    sensitivity       KL divergence of each block quantized alone; empty if not asked for
    weights_note      why its weights were not held against the original's, or None
    completions_note  why there are no completions, or None
    outcome           the worst of its judgements: the verdict
    notes             what a reader should know before trusting the numbers
    """

    identity: Identity
    divergence: Divergence
    tasks: tuple[TaskComparison, ...]
    answers: tuple[Answer, ...]
    blocks: tuple[BlockCost, ...]
    sensitivity: tuple[BlockSensitivity, ...]
    weights: tuple[WeightCost, ...]
    weights_note: str | None
    judgements: tuple[Judgement, ...]
    outcome: Outcome
    completions: tuple[Completion, ...]
    completions_note: str | None
    worst_tokens: tuple[TokenShown, ...]
    notes: tuple[str, ...]

    @property
    def defects(self) -> tuple[WeightCost, ...]:
        """Weights with something that rounding cannot cause."""
        return tuple(weight for weight in self.weights if weight.defect is not None)


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """The original in `dtype` against itself in float32: what no quantization can be blamed for."""

    dtype: str
    divergence: Divergence


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was measured, and what it depends on.

    tasks     where each task's questions come from and how they are scored
    computed  in what numbers, and by which code
    """

    schema: str
    title: str
    created: str
    original: Identity
    perplexity: Perplexity
    text: TextUsed
    noise: NoiseFloor | None
    candidates: tuple[Candidate, ...]
    tasks: tuple[Fact, ...]
    computed: tuple[Fact, ...]
    seed: int
    limits_given: bool
    machine: tuple[Fact, ...]
    versions: tuple[Fact, ...]
    seconds: float
    peak_rss_bytes: int
    max_ram_bytes: int | None


def to_json(value: Any) -> Any:
    """Dataclasses and tuples as JSON values; what is not finite becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_schema(report: type = Report, title: str = SCHEMA) -> dict[str, Any]:
    """The JSON Schema (2020-12) of report.json, from the types above or those of another report."""
    defined: dict[str, Any] = {}
    top = _schema_of(report, defined)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **top,
        "$defs": dict(sorted(defined.items())),
    }


def _schema_of(hint: Any, defined: dict[str, Any]) -> dict[str, Any]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in defined:
            defined[hint.__name__] = {}
            hints = typing.get_type_hints(hint)
            names = [field.name for field in dataclasses.fields(hint)]
            defined[hint.__name__] = {
                "type": "object",
                "properties": {name: _schema_of(hints[name], defined) for name in names},
                "required": names,
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema_of(part, defined) for part in inner]}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (tuple, list):
        return {"type": "array", "items": _schema_of(inner[0], defined)}
    if origin is dict:
        return {"type": "object"}
    plain = {str: "string", bool: "boolean", int: "integer", type(None): "null"}
    if hint is float:
        # Null stands for infinity: the interval of one window, a perplexity beyond all floats.
        return {"type": ["number", "null"]}
    return {"type": plain[hint]}
