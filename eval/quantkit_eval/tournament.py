"""Which of many candidates is the smallest that keeps a limit: what was tried, and what is next.

Candidates are rated on a few blocks first, the cheap methods before the dear ones.  One is dropped
if another is no larger and its interval of KL lies wholly below; the others are tried in full,
beginning where the estimate says, until one keeps the limit and the next smaller one does not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit_eval.gate import Outcome
from quantkit_eval.report.tables import markdown


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A candidate: `num_bytes` are those of its whole checkpoint's files."""

    name: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Rated:
    """Mean KL divergence in nats per token with its interval; `outcome` where limits were held
    against it."""

    kl: float
    low: float
    high: float
    outcome: Outcome | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Table:
    """All that was found out so far, by the candidates' names.

    screened   on some blocks alone, which hold this share of the weights
    full       of whole checkpoints
    """

    entrants: tuple[Entrant, ...]
    share: float
    screened: Mapping[str, Rated]
    full: Mapping[str, Rated]

    @property
    def ordered(self) -> list[Entrant]:
        """The candidates that were rated and not dropped, from small to large."""
        left = [e for e in self.entrants if e.name in self.screened and self.beaten_by(e) is None]
        return sorted(left, key=lambda e: (e.num_bytes, self.screened[e.name].kl, e.name))

    def beaten_by(self, entrant: Entrant) -> str | None:
        """Another that is no larger and surely better, the smallest of them; None if none is."""
        mine = self.screened[entrant.name]
        better = [
            other
            for other in self.entrants
            if other.name in self.screened
            and other.num_bytes <= entrant.num_bytes
            and self.screened[other.name].high < mine.low
        ]
        return min(better, key=lambda e: (e.num_bytes, e.name)).name if better else None

    def estimate(self, name: str) -> float:
        """Upper end of the whole model's KL: small losses add up over blocks."""
        return self.screened[name].high / self.share

    def next(self, max_kl: float | None) -> Entrant | None:
        """Whom to try in full now; None once the answer is known, or all have failed."""
        order = self.ordered
        tried = [k for k, entrant in enumerate(order) if entrant.name in self.full]
        if not tried:
            return order[self._first(order, max_kl)]
        kept = [k for k in tried if self.full[order[k].name].outcome == "within"]
        if not kept:
            # Whatever broke the limit, the next larger one may keep it.
            return order[max(tried) + 1] if max(tried) + 1 < len(order) else None
        smaller = min(kept) - 1
        return None if smaller < 0 or smaller in tried else order[smaller]

    @property
    def winner(self) -> Entrant | None:
        """The smallest that keeps the limits as a whole; None if none did."""
        kept = [e for e in self.ordered if e.name in self.full]
        return next((e for e in kept if self.full[e.name].outcome == "within"), None)

    def _first(self, order: Sequence[Entrant], max_kl: float | None) -> int:
        """Where to begin: the smallest that should keep a limit of KL; in the middle for others."""
        if max_kl is None:
            return len(order) // 2
        fits = [k for k, entrant in enumerate(order) if self.estimate(entrant.name) <= max_kl]
        return fits[0] if fits else len(order) - 1

    def rows(self) -> list[dict[str, Any]]:
        """One entry for every candidate, from small to large, as JSON values."""
        won = self.winner
        return [
            {
                "name": e.name,
                "bytes": e.num_bytes,
                "screened": _told(self.screened.get(e.name)),
                "full": _told(self.full.get(e.name)),
                "verdict": self._verdict(e, won),
            }
            for e in sorted(self.entrants, key=lambda e: (e.num_bytes, e.name))
        ]

    def text(self) -> str:
        """The table for people."""
        rows = [
            [row["name"], f"{row['bytes']:,}", *(_shown(row[k]) for k in ("screened", "full")),
             row["verdict"]]
            for row in self.rows()
        ]  # fmt: skip
        return markdown(["candidate", "bytes", "KL of some blocks", "KL of all", "verdict"], rows)

    def _verdict(self, entrant: Entrant, won: Entrant | None) -> str:
        if entrant == won:
            return "taken"
        if entrant.name not in self.screened:
            return "not tried: a cheaper method keeps the limit with less"
        if (full := self.full.get(entrant.name)) is not None:
            words = {"within": "keeps the limit, larger", "unsure": "not shown to keep the limit"}
            return words.get(str(full.outcome), "breaks the limit")
        if (better := self.beaten_by(entrant)) is not None:
            return f"dropped: {better} is no larger and better"
        return "not needed"


def play(table: Table, *, max_kl: float | None, try_whole: Callable[[Entrant], Rated]) -> Table:
    """The table once the answer is known: `try_whole` makes and measures a whole checkpoint."""
    while (entrant := table.next(max_kl)) is not None:
        table = dataclasses.replace(table, full={**table.full, entrant.name: try_whole(entrant)})
    return table


def _told(rated: Rated | None) -> dict[str, Any] | None:
    if rated is None:
        return None
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in rated.to_dict().items()}  # fmt: skip


def _shown(rated: Mapping[str, Any] | None) -> str:
    return "" if rated is None else f"{rated['kl']:.5f}"
