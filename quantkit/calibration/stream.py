"""The calibration's hidden states on their way through the blocks, and statistics taken of them.

Letters: N sequences, T tokens, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.calibration.gather import StatsBook, gather
from quantkit.calibration.hidden import HiddenStore
from quantkit.calibration.rounded_inputs import QuantizedActivations
from quantkit.calibration.spans import phase
from quantkit.calibration.tokens import Calibration
from quantkit.methods.stats import Needs, Stats, Stream
from quantkit.model.causal import CausalModel, TapCallback
from quantkit.model.refs import BlockCall
from quantkit.numbers.activations import InputRounding

# Tokens in one forward batch: a function of the device kind only, never of the memory budget, so
# that the order of accumulation, and with it every bit of the result, stays the same.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences start..stop of the calibration; mask None if all their tokens count."""

    start: int
    stop: int
    mask: Tensor | None


class CalibrationStream:
    """Hidden states of all sequences in two generations of files; generation i enters block i."""

    def __init__(
        self,
        model: CausalModel,
        calibration: Calibration,
        *,
        device: str,
        scratch: Path,
        gram_budget: int | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self.model, self.calibration, self.device = model, calibration, device
        self.scratch, self.gram_budget = scratch, gram_budget
        with torch.no_grad():
            first, _ = model.calls(calibration.ids[:1])
        shape = (len(calibration.ids), *first.shape[1:])
        self.hidden = stack.enter_context(HiddenStore(scratch, shape, first.dtype))
        self.batches = list(_batches(calibration, device))
        self._calls: dict[int, tuple[BlockCall, ...]] = {}

    def embed(self) -> None:
        """Writes what enters the first block."""
        for batch in self.batches:
            ids = self.calibration.ids[batch.start : batch.stop]
            hidden, _ = self.model.calls(ids, batch.mask)
            self.hidden.write(0, batch.start, hidden)
        self.hidden.sync(0)

    def gather(
        self,
        index: int,
        block: nn.Module,
        needs: Mapping[str, Needs],
        features: Mapping[str, int],
        *,
        stream: Stream,
        write: bool,
        taps: Mapping[str, tuple[str, ...]] | None = None,
    ) -> StatsBook:
        """Statistics of the block's inputs; with `write`, the same pass stores its output.

        `taps`: input key -> the keys in `needs` that take its tokens (default: itself).
        """

        def forward(first: bool, callback: TapCallback) -> None:
            tapped = callback if taps is None else _fan_out(callback, taps)
            self.forward(index, block, tapped, write=write and first)

        return gather(
            needs,
            features,
            forward,
            directory=self.scratch,
            budget=self.gram_budget,
            stream=stream,
            device=self.device,
            label=self.model.block_path(index),
        )

    def forward(
        self,
        index: int,
        block: nn.Module,
        callback: TapCallback | None,
        *,
        write: bool,
        rounded: Mapping[str, InputRounding] | None = None,
    ) -> None:
        """Runs the block over all batches; with `write`, stores what enters the next one.

        Inputs of the parameters named in `rounded` are rounded so.
        """
        for batch in self.batches:
            with phase("reading"):
                hidden = self.hidden.read(index, batch.start, batch.stop).to(self.device)
            with phase("forward"), contextlib.ExitStack() as modes:
                if callback is not None:
                    modes.enter_context(self.model.tap(index, block, batch.mask, callback))
                if rounded:
                    modes.enter_context(QuantizedActivations(block, rounded))
                out = self.model.run(block, hidden, self._call(index, batch))
            if write:
                with phase("writing"):
                    self.hidden.write(index + 1, batch.start, out)

    def head_stats(self, features: int, needs: Needs, *, stream: Stream) -> Stats:
        """Statistics of what the output head reads: after the final norm."""
        stats = Stats.empty(features, needs, stream=stream, device=self.device)
        for batch in self.batches:
            hidden = self.hidden.read(self.model.num_blocks, batch.start, batch.stop)
            x = self.model.head_hidden(hidden.to(self.device))
            stats.update_(x[batch.mask] if batch.mask is not None else x.flatten(0, 1), name="head")
        stats.finish_()
        return stats

    def _call(self, index: int, batch: Batch) -> BlockCall:
        """The block's other arguments; without padding they depend on the batch's shape only."""
        ids = self.calibration.ids[batch.start : batch.stop]
        if batch.mask is not None:
            return self.model.calls(ids, batch.mask)[1][index]
        if ids.shape[0] not in self._calls:
            self._calls[ids.shape[0]] = self.model.calls(ids, None)[1]
        return self._calls[ids.shape[0]][index]


def _fan_out(callback: TapCallback, taps: Mapping[str, tuple[str, ...]]) -> TapCallback:
    def tell(key: str, x_TI: Tensor) -> None:
        for name in taps.get(key, ()):
            callback(name, x_TI)

    return tell


def _batches(calibration: Calibration, device: str) -> Iterator[Batch]:
    size = max(1, BATCH_TOKENS[device.split(":")[0]] // calibration.ids.shape[1])
    for start in range(0, len(calibration.ids), size):
        mask = calibration.mask[start : start + size]
        yield Batch(start=start, stop=start + len(mask), mask=None if bool(mask.all()) else mask)
