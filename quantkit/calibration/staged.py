"""Statistics of a block input by input, each once everything before it is quantized.

The original of the block runs beside it on hidden states of its own, so that what an input has
drifted by is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from quantkit.calibration.gather import StatsBook
from quantkit.calibration.stream import CalibrationStream
from quantkit.methods.stats import Needs, Stats
from quantkit.model.refs import WeightRef
from quantkit.numbers.activations import InputRounding

# Each takes a run of both blocks up to its inputs.
_MOST_STAGES = 12


def stages_of(keys: Sequence[tuple[str, bool]]) -> list[list[str]]:
    """Input keys in the order of use, in at most 12 stages; with each, whether experts read it.

    An input that all tokens reach is a stage of its own; those of consecutive experts are one.
    """
    stages: list[list[str]] = []
    shared = False
    for key, routed in keys:
        if routed and shared:
            stages[-1].append(key)
        else:
            stages.append([key])
        shared = routed
    step = -(-len(stages) // _MOST_STAGES)
    runs = (stages[at : at + step] for at in range(0, len(stages), max(step, 1)))
    return [[key for stage in run for key in stage] for run in runs]


class Staged:
    """Statistics of a block's inputs, gathered when their stage is reached."""

    def __init__(
        self,
        stream: CalibrationStream,
        index: int,
        *,
        original: nn.Module,
        block: nn.Module,
        needs: Mapping[str, Needs],
        features: Mapping[str, int],
        stages: Sequence[Sequence[str]],
        rounded: Mapping[str, InputRounding],
        write: bool,
        last: WeightRef | None,
        owners: Mapping[str, int] | None = None,
    ) -> None:
        """original, block: the same weights; those of `block` are replaced between two stages.

        Parameters whose inputs are rounded from then on come into `rounded`.  With `write` what the
        original hands on is stored, in the end or with the last stage.  `last` is the block's last
        matrix if nothing else reads its input: it makes up for all that the block's output lacks,
        where its own outputs are a part of that.  `owners`: the rank that gets each input's.
        """
        self._stream, self._index, self._original, self._block = stream, index, original, block
        self._needs, self._features, self._stages = needs, features, stages
        self._rounded, self._write, self._last = rounded, write, last
        self._owners = owners
        self._book: StatsBook | None = None

    def __contains__(self, key: str) -> bool:
        return key in self._needs

    def stage_of(self, key: str) -> int:
        """The number of an input's stage."""
        return next(n for n, keys in enumerate(self._stages) if key in keys)

    def holds(self, key: str) -> bool:
        """Whether this rank has the statistics under a key of the stage that was reached."""
        assert self._book is not None
        return self._book.holds(key)

    def get(self, key: str) -> Stats:
        """The statistics under a key of the stage that was reached."""
        assert self._book is not None
        return self._book.get(key)

    def reach(self, stage: int) -> None:
        """Gathers the statistics of a stage: all ranks at once, stage by stage."""
        if any(key in self._needs for key in self._stages[stage]):
            # The old stage's statistics go before the new one's come.
            self._book = None
            last = stage == len(self._stages) - 1
            keys = [key for key in self._stages[stage] if key in self._needs]
            summand, ref = None, self._last
            if ref is not None and ref.input in keys:
                alone = self._stream.adds_up(self._index, self._block, ref)
                summand = ref.input if alone else None
            self._book = self._stream.gather_paired(
                self._index,
                self._original,
                self._block,
                {key: self._needs[key] for key in keys},
                self._features,
                rounded=self._rounded,
                write=self._write and last,
                summand=summand,
                owners=self._owners,
            )
            self._write = self._write and not last

    def close(self) -> None:
        """Stores what the original hands on, if no stage did."""
        self._book = None
        if self._write:
            self._stream.forward_original(self._index, self._original)
            self._write = False
