"""One calibration for several methods: statistics of the original's activations, gathered once.

Every method gets exactly the statistics it would have gathered by itself, so its result has the
same bytes as a run of its own recipe, which says `propagate: false`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.calibration.gather import StatsBook
from quantkit.calibration.stream import CalibrationStream
from quantkit.checkpoint.disk import write_file
from quantkit.methods.stats import Needs, Stats


@dataclass(frozen=True, kw_only=True)
class BlockNeeds:
    """The statistics one method reads at the inputs of one block, and the inputs' features."""

    needs: Mapping[str, Needs]
    features: Mapping[str, int]


class SharedStats:
    """Statistics of the block that is being worked on, for all methods; kept until the next one."""

    def __init__(
        self,
        stream: CalibrationStream,
        needs: Sequence[Sequence[BlockNeeds]],
        *,
        states: Mapping[str, str],
    ) -> None:
        """`needs[method][block]`; `states`: what hidden states depend on."""
        self.stream = stream
        self._told = stream.scratch / "states.json"
        self._states = dict(states)
        self._needs = needs
        self._index: int | None = None
        self._book: StatsBook | None = None
        self._embedded = False

    def embed(self) -> None:
        """Writes what enters the first block, once."""
        if not self._embedded:
            self.stream.embed()
            self._embedded = True

    def book(self, method: int, index: int) -> MethodStats:
        """The statistics of a block for one method.

        The first call for a block runs the original over the calibration text and stores what
        enters the next block.
        """
        if self._index != index:
            # The old block's statistics go before the new one's come.
            self._book = None
            self._reach(index)
            self._book = self._gather(index)
            self._index = index
        assert self._book is not None
        names = {
            key: _variant(key, self._variants(index)[key].index(need))
            for key, need in self._needs[method][index].needs.items()
        }
        return MethodStats(self._book, names)

    def _reach(self, index: int) -> None:
        """Has the stream hold what enters a block, which another run may not have left here."""
        if self._index is not None or self._embedded or self._kept() in (index, index + 1):
            return
        self.embed()
        for earlier in range(index):
            block = self.stream.model.load_block(earlier)
            # With a tap, as where its statistics are taken.
            self.stream.forward(earlier, block, lambda key, x_TI: None, write=True)

    def _kept(self) -> int | None:
        """The last generation of hidden states that an interrupted run left; None for others'."""
        if not self._told.is_file():
            return None
        told: dict[str, Any] = json.loads(self._told.read_bytes())
        generation: int = told.pop("generation")
        return generation if told == self._states else None

    def _variants(self, index: int) -> dict[str, list[Needs]]:
        """Input key -> the different statistics that methods want of it."""
        found: dict[str, list[Needs]] = {}
        for method in self._needs:
            for key, need in method[index].needs.items():
                wanted = found.setdefault(key, [])
                if need not in wanted:
                    wanted.append(need)
        return found

    def _gather(self, index: int) -> StatsBook:
        variants = self._variants(index)
        features = {k: v for method in self._needs for k, v in method[index].features.items()}
        taps = {
            key: tuple(_variant(key, place) for place in range(len(wanted)))
            for key, wanted in variants.items()
        }
        needs = {
            _variant(key, place): need
            for key, wanted in variants.items()
            for place, need in enumerate(wanted)
        }
        block = self.stream.model.load_block(index)
        book = self.stream.gather(
            index,
            block,
            needs,
            {name: features[key] for key, names in taps.items() for name in names},
            stream="original",
            write=True,
            taps=taps,
        )
        self.stream.hidden.sync(index + 1)
        told = {**self._states, "generation": index + 1}
        write_file(self._told, json.dumps(told).encode())
        return book


@dataclass(frozen=True, kw_only=True)
class SharedMethod:
    """A method's part in statistics that several methods share."""

    stats: SharedStats
    number: int


class MethodStats:
    """A method's own view of shared statistics: what it replaces, others do not see."""

    def __init__(self, book: StatsBook, names: Mapping[str, str]) -> None:
        self._book, self._names = book, names
        self._own: dict[str, Stats] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._names

    def holds(self, key: str) -> bool:
        """Whether this rank has the statistics under a key."""
        return self._book.holds(self._names[key])

    def put(self, key: str, stats: Stats) -> None:
        """Keeps a method's own statistics under a key."""
        self._own[key] = stats

    def get(self, key: str) -> Stats:
        """The statistics under a key; what a method caches in them is its own."""
        if key in self._own:
            return self._own[key]
        return dataclasses.replace(self._book.get(self._names[key]), factor=None)

    def count(self, key: str) -> int:
        """Tokens that reached an input."""
        return self._book.count(self._names[key])


def _variant(key: str, place: int) -> str:
    """Errors name the input by this."""
    return key if place == 0 else f"{key} ({place + 1})"
