"""The work of one step: statistics, folds, quantized weights, packed tensors, hidden states.

Letters: N sequences, T tokens, H hidden size, O out features, I in features, C producer channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.calibration import Calibration
from quantkit.disk import disk_errors
from quantkit.folds import FOLDS_FILE, FoldVectors
from quantkit.format import PlannedWeight
from quantkit.gather import StatsBook, gather
from quantkit.hidden import HiddenStore
from quantkit.models import CausalModel, TapCallback
from quantkit.plan import Plan
from quantkit.refs import BlockCall, WeightRef
from quantkit.solve import Solved, choose_scale, quantize_weights
from quantkit.stats import Needs, Stats
from quantkit.steps import Record, WeightRecord
from quantkit.store import ShardWriter
from quantkit.stream import QuantizedActivations

# Tokens in one forward batch: a function of the device kind only, never of the memory budget, so
# that the order of accumulation, and with it every bit of the result, stays the same.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Sequences start..stop of the calibration; mask None if all their tokens count."""

    start: int
    stop: int
    mask: Tensor | None


class BlockWork:
    """Runs steps: "outside", "embed", "block 0"... and "head".  Holds one block at a time.

    `tell` hears of every weight that is done, with its error.
    """

    def __init__(
        self,
        *,
        model: CausalModel,
        plan: Plan,
        calibration: Calibration | None,
        gram_budget: int | None,
        device: str,
        partial: Path,
        scratch: Path,
        done: set[str],
        stack: contextlib.ExitStack,
        tell: Callable[[str], object],
    ) -> None:
        self.tell = tell
        self.model, self.plan, self.calibration = model, plan, calibration
        self.gram_budget, self.device, self.scratch = gram_budget, device, scratch
        recipe = plan.recipe
        self.transforms = recipe.make_transforms()
        self.range, self.rounding = recipe.make_range(), recipe.make_rounding()
        self.steps = ["outside"]
        if calibration is not None:
            self.steps.append("embed")
        self.steps += [f"block {index}" for index in range(model.num_blocks)]
        if plan.head is not None:
            self.steps.append("head")
        committed = [name for step in done for name in self._outputs(step)]
        self.writer = stack.enter_context(ShardWriter(partial, plan.layout, committed=committed))
        self.folds: ShardWriter | None = None
        if plan.folds_layout is not None:
            folds_directory = partial / Path(FOLDS_FILE).parent
            with disk_errors(folds_directory):
                folds_directory.mkdir(exist_ok=True)
            kept = [
                name
                for step in done
                if step.startswith("block ")
                for name in plan.folds[int(step.removeprefix("block "))]
            ]
            self.folds = stack.enter_context(
                ShardWriter(folds_directory, plan.folds_layout, committed=kept)
            )
        self.hidden: HiddenStore | None = None
        self.batches: list[_Batch] = []
        self._calls: dict[int, tuple[BlockCall, ...]] = {}
        if calibration is not None:
            with torch.no_grad():
                first, _ = model.calls(calibration.ids[:1])
            samples, tokens = calibration.ids.shape
            shape = (samples, tokens, first.shape[-1])
            self.hidden = stack.enter_context(HiddenStore(scratch, shape, first.dtype))
            self.batches = list(_batches(calibration, device))

    def run(self, step: str) -> Record:
        """Does a step; on return its tensors and hidden states are on the disk."""
        with torch.no_grad():
            if step == "outside":
                record = self._outside()
            elif step == "embed":
                record = self._embed()
            elif step == "head":
                record = self._head()
            else:
                record = self._block(int(step.removeprefix("block ")))
        self.writer.sync()
        if self.folds is not None:
            self.folds.sync()
        return record

    def close(self) -> None:
        """Completes the shards; raises if a planned tensor was never written."""
        self.writer.close()
        if self.folds is not None:
            self.folds.close()

    def _outside(self) -> Record:
        for name in self._outputs("outside"):
            self.writer.copy(name, self.model.source)
        return Record(step="outside")

    def _embed(self) -> Record:
        assert self.calibration is not None and self.hidden is not None
        for batch in self.batches:
            ids = self.calibration.ids[batch.start : batch.stop]
            hidden, _ = self.model.calls(ids, batch.mask)
            self.hidden.write(0, batch.start, hidden)
        self.hidden.sync(0)
        return Record(step="embed")

    def _block(self, index: int) -> Record:
        block = self.model.load_block(index)
        propagate = self.plan.recipe.propagate
        book = self._gather(index, block, write=not propagate)
        folded = self._fold(index, block, book)
        weights = list(self._quantize(index, block, book))
        for fate in self.plan.fates_of_block.get(index, ()):
            if fate.fate == "rescaled":
                now = self.model.tensor(block, index, fate.name)
                self.writer.put(fate.name, now.to(fate.dtype))
            elif fate.fate != "quantized":
                self.writer.copy(fate.name, self.model.source)
        last = index == self.model.num_blocks - 1 and self.plan.head is None
        if self.hidden is not None and not last:
            if propagate:
                self._forward(index, block, None, write=True)
            self.hidden.sync(index + 1)
        return Record(step=f"block {index}", weights=tuple(weights), folded=folded)

    def _gather(self, index: int, block: nn.Module, *, write: bool) -> StatsBook | None:
        """Statistics of the block's inputs; with `write`, the same pass stores its output."""
        if self.hidden is None:
            return None
        needs: dict[str, Needs] = {}
        features: dict[str, int] = {}
        for key, refs in self.plan.input_groups(index):
            scheme = self.plan.scheme_of(refs[0])
            needs[key] = self.range.needs(scheme) | self.rounding.needs(scheme)
            features[key] = refs[0].shape[1]
        for group in self.plan.groups[index]:
            for transform in self.transforms:
                for key in group.inputs:
                    more = transform.needs(self.plan.recipe.scheme)
                    needs[key] = needs.get(key, Needs()) | more
                    features[key] = len(group.channel_map)
        needs = {key: _fitting(need, features[key]) for key, need in needs.items() if need}

        def forward(first: bool, callback: TapCallback) -> None:
            self._forward(index, block, callback, write=write and first)

        return gather(
            needs,
            features,
            forward,
            directory=self.scratch,
            budget=self.gram_budget,
            stream="quantized" if self.plan.recipe.propagate else "original",
            device=self.device,
            label=self.model.block_path(index),
        )

    def _fold(self, index: int, block: nn.Module, book: StatsBook | None) -> tuple[str, ...]:
        """Applies the transforms; returns the producers that were changed."""
        schemes = {ref.name: self.plan.scheme(ref) for ref in self.plan.refs[index]}
        vectors = FoldVectors(self.plan.folds[index])
        changed: list[str] = []
        for group in self.plan.groups[index]:
            assert book is not None, "transforms are calibrated"
            for transform in self.transforms:
                # All inputs carry the same channels; the one with most tokens knows them best.
                key = max(group.inputs, key=book.count)
                weights = {ref.name: self.model.weight(block, ref) for ref in group.readers}
                scale_C = choose_scale(transform, group, weights, schemes, book.get(key))
                if scale_C is None:
                    continue
                folded = self.model.fold_(block, group, scale_C)
                vectors.multiply_(group, folded.scale_I, self.plan.refs[index])
                for other in group.inputs:
                    book.put(other, book.get(other).rescaled(folded.scale_I))
                changed.append(group.producer_names[0])
        if self.folds is not None:
            for name, vector in vectors.tensors.items():
                self.folds.put(name, vector)
        return tuple(dict.fromkeys(changed))

    def _quantize(
        self, index: int, block: nn.Module, book: StatsBook | None
    ) -> Iterator[WeightRecord]:
        for key, refs in self.plan.input_groups(index):
            stats = book.get(key) if book is not None and key in book else None
            weights = [self.model.weight(block, ref) for ref in refs]
            for solved in self._solve(refs, weights, stats):
                self._put(self.plan.weight_of[solved.ref.name], solved)
                self.model.set_weight_(block, solved.ref, solved.tensor.dequantize())
                self.tell(f"{solved.ref.parameter.removesuffix('.weight')} {solved.error:.1e}")
                yield WeightRecord.of(
                    solved, solved.ref.name, None if stats is None else stats.count
                )

    def _solve(
        self, refs: Sequence[WeightRef], weights: Sequence[Tensor], stats: Stats | None
    ) -> list[Solved]:
        return quantize_weights(
            refs,
            weights,
            self.plan.scheme_of(refs[0]),
            stats,
            range_part=self.range,
            rounding=self.rounding,
            dtype=self.model.source.info(refs[0].name).dtype,
        )

    def _put(self, weight: PlannedWeight, solved: Solved) -> None:
        for name, tensor in self.plan.format.pack(weight, solved.tensor).items():
            self.writer.put(name, tensor)

    def _head(self) -> Record:
        """Quantizes the output head on the hidden states that reach it."""
        head = self.plan.head
        assert head is not None
        scheme = self.plan.scheme_of(head)
        needs = self.range.needs(scheme) | self.rounding.needs(scheme)
        needs = _fitting(needs, head.shape[1])
        stats: Stats | None = None
        if self.hidden is not None and needs:
            stats = Stats.empty(head.shape[1], needs, device=self.device)
            for batch in self.batches:
                hidden = self.hidden.read(self.model.num_blocks, batch.start, batch.stop)
                x = self.model.head_hidden(hidden.to(self.device))
                stats.update_(
                    x[batch.mask] if batch.mask is not None else x.flatten(0, 1), name="head"
                )
            stats.finish_()
        weight = self.model.source.read(head.name).to(self.model.dtype)
        (solved,) = self._solve([head], [weight], stats)
        planned = self.plan.planned_head
        self._put(planned, solved)
        tokens = None if stats is None else stats.count
        return Record(step="head", weights=(WeightRecord.of(solved, planned.name, tokens),))

    def _forward(
        self, index: int, block: nn.Module, callback: TapCallback | None, *, write: bool
    ) -> None:
        """Runs the block over all batches; with `write`, stores what enters the next one."""
        assert self.hidden is not None
        eight_bit = {
            ref.parameter: self.plan.scheme_of(ref).kind
            for _, refs in (() if callback else self.plan.input_groups(index))
            for ref in refs
            if self.plan.scheme_of(ref).activation_bits == 8
        }
        for batch in self.batches:
            hidden = self.hidden.read(index, batch.start, batch.stop).to(self.device)
            with contextlib.ExitStack() as modes:
                if callback is not None:
                    modes.enter_context(self.model.tap(index, block, batch.mask, callback))
                if eight_bit:
                    modes.enter_context(QuantizedActivations(block, eight_bit))
                out = self.model.run(block, hidden, self._call(index, batch))
            if write:
                self.hidden.write(index + 1, batch.start, out)

    def _call(self, index: int, batch: _Batch) -> BlockCall:
        """The block's other arguments; without padding they depend on the batch's shape only."""
        assert self.calibration is not None
        ids = self.calibration.ids[batch.start : batch.stop]
        if batch.mask is not None:
            return self.model.calls(ids, batch.mask)[1][index]
        if ids.shape[0] not in self._calls:
            self._calls[ids.shape[0]] = self.model.calls(ids, None)[1]
        return self._calls[ids.shape[0]][index]

    def _outputs(self, step: str) -> list[str]:
        """Names of the output tensors that a step writes."""
        if step == "embed":
            return []
        if step == "head":
            return [info.name for info in self.plan.head_layout]
        block = None if step == "outside" else int(step.removeprefix("block "))
        fates = self.plan.fates_of_block.get(block, ())
        if step == "outside":
            fates = tuple(fate for fate in fates if fate.fate != "quantized")
        return [info.name for fate in fates for info in fate.output]


def _fitting(needs: Needs, features: int) -> Needs:
    """The needs without a block diagonal that does not divide the features.

    Only flat blocks (nf4, fp4) get there: they straddle rows, and parts use moments instead.
    """
    if needs.gram > 0 and features % needs.gram:
        return dataclasses.replace(needs, gram=0, moments=True)
    return needs


def _batches(calibration: Calibration, device: str) -> Iterator[_Batch]:
    size = max(1, BATCH_TOKENS[device.split(":")[0]] // calibration.ids.shape[1])
    for start in range(0, len(calibration.ids), size):
        mask = calibration.mask[start : start + size]
        yield _Batch(start=start, stop=start + len(mask), mask=None if bool(mask.all()) else mask)
