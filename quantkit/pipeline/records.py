"""What a finished step leaves in the journal: enough for the report, never weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.pipeline.solve import Solved


@dataclass(frozen=True, kw_only=True)
class WeightRecord:
    """How one weight was quantized; see `Solved` and `Cost`.  `tokens` reached its input."""

    name: str
    scheme: str
    error: float
    expected: float
    clipped: float
    beyond_half: int
    degraded: str | None
    tokens: int | None

    @classmethod
    def of(cls, solved: Solved, name: str, tokens: int | None) -> WeightRecord:
        """The record of a solved weight."""
        return cls(
            name=name,
            scheme=solved.tensor.scheme.name,
            error=float(f"{solved.cost.error:.6g}"),
            expected=float(f"{solved.cost.expected:.6g}"),
            clipped=float(f"{solved.cost.clipped:.6g}"),
            beyond_half=solved.beyond_half,
            degraded=solved.degraded,
            tokens=tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """One journal line: a step, the weights it quantized, the scale groups it folded, and the loss
    of its block's outputs before and after they were refined."""

    step: str
    weights: tuple[WeightRecord, ...] = ()
    folded: tuple[str, ...] = ()
    refined: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """The inverse of `to_dict`."""
        return cls(
            step=data["step"],
            weights=tuple(WeightRecord(**weight) for weight in data["weights"]),
            folded=tuple(data["folded"]),
            refined=None if data["refined"] is None else tuple(data["refined"]),
        )
