"""The work of one step: statistics, folds, quantized weights, packed tensors, hidden states.

Letters: N sequences, T tokens, H hidden size, O out features, I in features, C producer channels.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.calibration.ahead import BlocksAhead
from quantkit.calibration.gather import StatsBook
from quantkit.calibration.shared import BlockNeeds, MethodStats, SharedStats
from quantkit.calibration.spans import phase
from quantkit.calibration.staged import Staged, stages_of
from quantkit.calibration.stream import CalibrationStream
from quantkit.calibration.tokens import Calibration
from quantkit.checkpoint.disk import disk_errors
from quantkit.checkpoint.shards import ShardWriter
from quantkit.formats.format import PlannedWeight
from quantkit.methods.parts import Range, Rounding, Target
from quantkit.methods.recipe import input_needs, load_recipe
from quantkit.methods.stats import Needs, Stats, Stream
from quantkit.model.causal import CausalModel
from quantkit.model.fold import in_dtype
from quantkit.model.fold_vectors import FOLDS_FILE, FoldVectors
from quantkit.model.refs import WeightRef
from quantkit.numbers.activations import InputRounding
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.cache import CacheRanges
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.records import Record, WeightRecord
from quantkit.pipeline.solve import Solved, choose_scale, quantize_weights


@dataclass(frozen=True, kw_only=True)
class SharedMethod:
    """A method's part in statistics that several methods share."""

    stats: SharedStats
    number: int


Book = StatsBook | MethodStats


class BlockWork:
    """Runs steps: "outside", "embed", "block 0"..., "head", "embedding", "extra"; holds one block.

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
        shared: SharedMethod | None = None,
        keep_hidden: bool = False,
        ahead: bool = False,
    ) -> None:
        """keep_hidden: see CalibrationStream; ahead: read a block while the one before is at work.

        Raises ResumeError if what `done` wrote is gone.
        """
        self.tell = tell
        self._load: Callable[[int], nn.Module] = model.load_block
        if ahead:
            reader = BlocksAhead(model)
            stack.callback(reader.close)
            self._load = reader.load
        # The hidden states that the next step needs.
        self._generation: int | None = None
        self.model, self.plan, self.calibration = model, plan, calibration
        recipe = plan.recipe
        self.transforms = recipe.make_transforms()
        self.target = recipe.make_target()
        self.range, self.rounding = recipe.make_range(), recipe.make_rounding()
        self.steps = ["outside"]
        if calibration is not None:
            self.steps.append("embed")
        self.steps += [f"block {index}" for index in range(model.num_blocks)]
        if plan.head is not None:
            self.steps.append("head")
        if plan.embedding is not None:
            self.steps.append("embedding")
        if plan.extra:
            self.steps.append("extra")
        committed = [name for step in done for name in self._outputs(step)]
        self.writer = stack.enter_context(plan.layout.writer(partial, committed=committed))
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
        self.shared = shared
        self.stream: CalibrationStream | None = None
        if shared is not None:
            self.stream = shared.stats.stream
        elif calibration is not None:
            self.stream = CalibrationStream(
                model,
                calibration,
                device=device,
                scratch=scratch,
                gram_budget=gram_budget,
                stack=stack,
                drift=self.target is not None,
                keep=keep_hidden,
            )

    def run(self, step: str) -> Record:
        """Does a step; `settle` tells whether it is on the disk."""
        self._generation = None
        with torch.no_grad():
            if step == "outside":
                record = self._outside()
            elif step == "embed":
                record = self._embed()
            elif step == "head":
                record = self._head()
            elif step == "embedding":
                record = self._embedding()
            elif step == "extra":
                record = self._extra()
            else:
                record = self._block(int(step.removeprefix("block ")))
        return record

    def settle(self) -> bool:
        """Whether all steps so far are on the disk, with the hidden states that the next needs.

        If not, an interrupted run has to do again what came after the last one that was.
        """
        with phase("fsync"):
            needed = None if self.stream is None else self._generation
            if self.stream is not None and needed is not None and not self.stream.sync(needed):
                return False
            self.writer.sync()
            if self.folds is not None:
                self.folds.sync()
        return True

    def close(self) -> None:
        """Completes the shards; raises if a planned tensor was never written."""
        self.writer.close()
        if self.folds is not None:
            self.folds.close()

    def _outside(self) -> Record:
        with phase("writing"):
            for name in self._outputs("outside"):
                self.writer.copy(name, self.model.source)
        return Record(step="outside")

    def _embed(self) -> Record:
        assert self.stream is not None
        if self.shared is not None:
            self.shared.stats.embed()
        else:
            self.stream.embed()
        self._generation = 0
        return Record(step="embed")

    def _block(self, index: int) -> Record:
        with phase("reading"):
            block = self._load(index)
        propagate = self.plan.recipe.propagate
        book: Book | Staged | None = self._statistics(index, block)
        with phase("transform"):
            folded = self._fold(index, block, book)
        rounded: dict[str, InputRounding] = {}
        if self.target is not None:
            book = self._staged(index, block, rounded)
        weights = list(self._quantize(index, block, book, rounded))
        if isinstance(book, Staged):
            book.close()
        del book
        with phase("writing"):
            self._write_kept(index, block)
        last = index == self.model.num_blocks - 1 and self.plan.head is None
        self._generation = None if last or self.shared is not None else index + 1
        write = self._generation is not None and propagate
        if self.stream is not None and (write or self.plan.cache is not None):
            ranges = None if self.plan.cache is None else CacheRanges(self.plan.cache, index)
            see = None if ranges is None else ranges.see
            self.stream.forward(index, block, None, write=write, rounded=rounded, cached=see)
            for name, scale in {} if ranges is None else ranges.scales().items():
                self.writer.put(name, scale)
        return Record(step=f"block {index}", weights=tuple(weights), folded=folded)

    def _write_kept(self, index: int, block: nn.Module) -> None:
        """Writes what a block holds besides quantized weights."""
        for fate in self.plan.fates_of_block.get(index, ()):
            if fate.fate == "added":
                continue
            if fate.fate == "rescaled":
                now = self.model.tensor(block, index, fate.name)
                self.writer.put(fate.name, in_dtype(fate.name, now, fate.dtype))
            elif fate.fate != "quantized":
                for info in fate.output:
                    self.writer.copy(info.name, self.model.source, fate.name)

    def _statistics(self, index: int, block: nn.Module) -> Book | None:
        """Statistics of the block's inputs: shared with other methods, or the run's own."""
        if self.stream is None:
            return None
        if self.shared is not None:
            return self.shared.stats.book(self.shared.number, index)
        wanted = block_needs(self.plan, index, parts=self.target is None)
        propagate = self.plan.recipe.propagate
        if self.target is not None and not wanted.needs:
            return None
        return self.stream.gather(
            index,
            block,
            wanted.needs,
            wanted.features,
            stream="quantized" if propagate else "original",
            write=not propagate,
        )

    def _staged(
        self, index: int, block: nn.Module, rounded: dict[str, InputRounding]
    ) -> Staged | None:
        """Statistics beside the original's, from a copy of the block as it is now."""
        if self.stream is None:
            return None
        wanted = block_needs(self.plan, index, transforms=False)
        keys: dict[str, bool] = {}
        readers: dict[str, list[WeightRef]] = {}
        for key, refs in self.plan.input_groups(index):
            keys[key] = refs[0].role == "expert"
            readers.setdefault(key, []).extend(refs)
        alone = [refs[0] for refs in list(readers.values())[-1:] if len(refs) == 1]
        last = next((ref for ref in alone if ref.role == "linear"), None)
        return Staged(
            self.stream,
            index,
            original=copy.deepcopy(block),
            block=block,
            needs=wanted.needs,
            features=wanted.features,
            stages=stages_of(list(keys.items())),
            rounded=rounded,
            write=index < self.model.num_blocks - 1 or self.plan.head is not None,
            last=last,
        )

    def _fold(self, index: int, block: nn.Module, book: Book | Staged | None) -> tuple[str, ...]:
        """Applies the transforms; returns the producers that were changed."""
        schemes = {
            ref.name: None if scheme is None else self._stored(ref, scheme)
            for ref in self.plan.refs[index]
            for scheme in (self.plan.scheme(ref),)
        }
        vectors = FoldVectors(self.plan.folds[index])
        changed: list[str] = []
        for group in self.plan.groups[index]:
            assert isinstance(book, Book), "transforms are calibrated"
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
        self,
        index: int,
        block: nn.Module,
        book: Book | Staged | None,
        rounded: dict[str, InputRounding],
    ) -> Iterator[WeightRecord]:
        """Quantizes a block's weights; `rounded` receives parameters whose inputs are, and how."""
        for key, refs in self.plan.input_groups(index):
            stats = book.get(key) if book is not None and key in book else None
            weights = [self.model.weight(block, ref) for ref in refs]
            for solved in self._solve(refs, weights, stats):
                self._put(self.plan.weight_of[solved.ref.name], solved)
                self.model.set_weight_(block, solved.ref, solved.tensor.dequantize())
                if solved.tensor.scheme.activation_bits != 16:
                    rounded[solved.ref.parameter] = InputRounding(
                        scheme=solved.tensor.scheme, scale=solved.tensor.input_scale
                    )
                self.tell(f"{solved.ref.parameter.removesuffix('.weight')} {solved.cost.error:.1e}")
                yield WeightRecord.of(
                    solved, solved.ref.name, None if stats is None else stats.count
                )

    def _solve(
        self,
        refs: Sequence[WeightRef],
        weights: Sequence[Tensor],
        stats: Stats | None,
        parts: tuple[Target | None, Range, Rounding] | None = None,
    ) -> list[Solved]:
        target, range_part, rounding = parts or (self.target, self.range, self.rounding)
        scheme = self.plan.scheme_of(refs[0])
        # What readers decode to: the checkpoint's dtype, but for ggml's blocks.
        stored = self.model.source.info(refs[0].name).dtype
        return quantize_weights(
            refs,
            weights,
            self._stored(refs[0], scheme),
            stats,
            target=target,
            range_part=range_part,
            rounding=rounding,
            dtype=torch.float32 if scheme.kind == "ggml" else stored,
        )

    def _stored(self, ref: WeightRef, scheme: Scheme) -> Scheme:
        """The weight's scheme, with what the format stores its scales in."""
        dtype = self.plan.format.scale_dtype(self.model.source.info(ref.name).dtype)
        return dataclasses.replace(scheme, half_scales=dtype == torch.float16)

    def _put(self, weight: PlannedWeight, solved: Solved) -> None:
        with phase("writing"):
            for name, tensor in self.plan.format.pack(weight, solved.tensor).items():
                self.writer.put(name, tensor)

    def _head(self) -> Record:
        """Quantizes the output head on the hidden states that reach it."""
        head = self.plan.head
        assert head is not None
        scheme = self.plan.scheme_of(head)
        needs = input_needs((self.target, self.range, self.rounding), scheme)
        needs = _fitting(needs, head.shape[1])
        stats: Stats | None = None
        if self.stream is not None and needs:
            stream: Stream = "quantized" if self.plan.recipe.propagate else "original"
            stats = self.stream.head_stats(head.shape[1], needs, stream=stream)
        return Record(step="head", weights=(self._outside_matrix(head, stats),))

    def _embedding(self) -> Record:
        """Quantizes the table of embeddings, of whose use nothing is known."""
        table = self.plan.embedding
        assert table is not None
        return Record(step="embedding", weights=(self._outside_matrix(table, None),))

    def _extra(self) -> Record:
        """Rounds the weights of extra layers, whose inputs nobody computes, to nearest."""
        plain = load_recipe("rtn")
        records = []
        for _, refs in self.plan.extra_groups():
            weights = [self._read(ref) for ref in refs]
            weights = [w.t() if r.transposed else w for r, w in zip(refs, weights, strict=True)]
            parts = None, plain.make_range(), plain.make_rounding()
            for solved in self._solve(refs, weights, None, parts):
                self._put(self.plan.weight_of[solved.ref.name], solved)
                self.tell(f"{solved.ref.name.removesuffix('.weight')} {solved.cost.error:.1e}")
                records.append(WeightRecord.of(solved, solved.ref.name, None))
        return Record(step="extra", weights=tuple(records))

    def _outside_matrix(self, ref: WeightRef, stats: Stats | None) -> WeightRecord:
        planned = self.plan.planned_head if ref.role == "head" else self.plan.weight_of[ref.name]
        (solved,) = self._solve([ref], [self._read(ref)], stats)
        self._put(planned, solved)
        return WeightRecord.of(solved, planned.name, None if stats is None else stats.count)

    def _read(self, ref: WeightRef) -> Tensor:
        """A weight that no block holds, where the statistics are."""
        return self.model.source.read(ref.name).to(self.model.device, self.model.dtype)

    def _outputs(self, step: str) -> list[str]:
        """Names of the output tensors that a step writes."""
        if step == "embed":
            return []
        if step == "head":
            return [info.name for info in self.plan.head_layout]
        if step == "embedding":
            assert self.plan.embedding is not None
            return [self.plan.embedding.name]
        if step == "extra":
            wanted = {ref.name for ref in self.plan.extra}
            outside = self.plan.fates_of_block.get(None, ())
            return [info.name for f in outside if f.name in wanted for info in f.output]
        block = None if step == "outside" else int(step.removeprefix("block "))
        fates = self.plan.fates_of_block.get(block, ())
        if step == "outside":
            fates = tuple(fate for fate in fates if fate.fate != "quantized")
        return [info.name for fate in fates for info in fate.output]


def block_needs(
    plan: Plan, index: int, *, parts: bool = True, transforms: bool = True
) -> BlockNeeds:
    """The statistics that a plan's method reads at the inputs of a block.

    Those of its target, range and rounding, those of its transforms, or both.
    """
    recipe = plan.recipe
    solving = recipe.make_target(), recipe.make_range(), recipe.make_rounding()
    needs: dict[str, Needs] = {}
    features: dict[str, int] = {}
    for key, refs in plan.input_groups(index) if parts else ():
        needs[key] = input_needs(solving, plan.scheme_of(refs[0]))
        if refs[0].role == "expert":
            # The two models route differently.
            needs[key] = dataclasses.replace(needs[key], drift=False)
        features[key] = refs[0].shape[1]
    for group in plan.groups[index] if transforms else ():
        for transform in recipe.make_transforms():
            for key in group.inputs:
                needs[key] = needs.get(key, Needs()) | transform.needs(recipe.scheme)
                features[key] = len(group.channel_map)
    needs = {key: _fitting(need, features[key]) for key, need in needs.items() if need}
    return BlockNeeds(needs=needs, features=features)


def _fitting(needs: Needs, features: int) -> Needs:
    """The needs without a block diagonal that does not divide the features.

    Only flat blocks (nf4, fp4) get there: they straddle rows, and parts use moments instead.
    """
    if needs.gram > 0 and features % needs.gram:
        return dataclasses.replace(needs, gram=0, moments=True)
    return needs
