"""The work of one step: statistics, folds, quantized weights, packed tensors, hidden states.

Letters: N sequences, T tokens, H hidden size, O out features, I in features, C producer channels.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.calibration.ahead import BlocksAhead
from quantkit.calibration.data.tokens import Calibration
from quantkit.calibration.gather import StatsBook
from quantkit.calibration.healing import Late, never
from quantkit.calibration.processes.ranks import ALONE, World
from quantkit.calibration.processes.work import work_owners
from quantkit.calibration.shared import MethodStats, SharedMethod
from quantkit.calibration.spans import phase
from quantkit.calibration.staged import Staged, stages_of
from quantkit.calibration.stream import CalibrationStream
from quantkit.checkpoint.disk import disk_errors
from quantkit.checkpoint.shards import Elsewhere, ShardWriter, TensorWriter
from quantkit.formats.format import PlannedWeight
from quantkit.methods.parts import Range, Rounding, Target
from quantkit.methods.recipe import input_needs, load_recipe
from quantkit.methods.stats import Stats, Stream
from quantkit.model.causal import CausalModel
from quantkit.model.fold import in_dtype
from quantkit.model.fold_vectors import FOLDS_FILE
from quantkit.model.refs import WeightRef
from quantkit.numbers.activations import InputRounding
from quantkit.numbers.tensor import QuantizedTensor
from quantkit.pipeline.cache import CacheRanges
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.records import Record, WeightRecord
from quantkit.pipeline.solve import Solved, quantize_weights
from quantkit.pipeline.work.fold import fold_block_
from quantkit.pipeline.work.heal import HealWork
from quantkit.pipeline.work.imatrix import GivenStats
from quantkit.pipeline.work.needs import block_needs, fitting, stored_scheme
from quantkit.pipeline.work.outputs import outputs_of
from quantkit.pipeline.work.refine import refine_block_

Book = StatsBook | MethodStats
Known = Book | Staged | Mapping[str, Stats]
# A weight, and how many tokens reached its input.
_Solved = tuple[Solved, int | None]
# Input key -> the rank that has its statistics and solves what reads it.
Owners = Mapping[str, int]
# The weights of an input, and the tokens that were seen there.
Answer = tuple[list[Solved], int | None]


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
        resident: bool = False,
        late: Late = never,
        world: World = ALONE,
        given: GivenStats | None = None,
    ) -> None:
        """keep_hidden: see CalibrationStream; ahead: read a block while the one before is at work;
        resident: hold all blocks in memory while they are healed; late: whether there are not so
        many seconds left.

        world: whom calibration and solving are shared with; rank 0 alone writes tensors.

        Raises ResumeError if what `done` wrote is gone.
        """
        self.tell, self.world = tell, world
        self._load: Callable[[int], nn.Module] = model.load_block
        if ahead:
            reader = BlocksAhead(model)
            stack.callback(reader.close)
            self._load = reader.load
        # The hidden states that the next step needs.
        self._generation: int | None = None
        self.model, self.plan, self.calibration, self.given = model, plan, calibration, given
        recipe = plan.recipe
        self.transforms = recipe.make_transforms()
        self.target = recipe.make_target()
        self.range, self.rounding = recipe.make_range(), recipe.make_rounding()
        self.refine = recipe.make_refine() if recipe.refines else None
        self.steps = ["outside"]
        if calibration is not None:
            self.steps.append("embed")
        self.steps += [f"block {index}" for index in range(model.num_blocks)]
        self.heal: HealWork | None = None
        if recipe.heals:
            self.steps.append("heal")
            self.heal = HealWork(
                model,
                plan,
                scratch,
                done=done,
                resident=resident,
                late=late,
                stack=stack,
                world=world,
            )
        if plan.head is not None:
            self.steps.append("head")
        if plan.embedding is not None:
            self.steps.append("embedding")
        if plan.extra:
            self.steps.append("extra")
        later = set() if self.heal is None else self.heal.names
        self._outputs = functools.partial(outputs_of, plan, later)
        committed = [name for step in done for name in self._outputs(step)]
        self.writer: TensorWriter = Elsewhere()
        if world.rank == 0:
            self.writer = stack.enter_context(plan.layout.writer(partial, committed=committed))
        self.folds: ShardWriter | None = None
        if plan.folds_layout is not None and world.rank == 0:
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
                original=self.target is not None or self.heal is not None,
                keep=keep_hidden,
                spread=recipe.experts == "all",
                world=world,
            )

    def run(self, step: str) -> Record:
        """Does a step; `settle` tells whether it is on the disk."""
        self._generation = None
        with torch.no_grad():
            if step == "outside":
                record = self._outside()
            elif step == "embed":
                record = self._embed()
            elif step == "heal":
                record = self._healed()
            elif step == "head":
                record = self._head()
            elif step == "embedding":
                record = self.world.first(self._embedding)
            elif step == "extra":
                record = self.world.first(self._extra)
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
            if self.heal is not None:
                self.heal.blocks.sync()
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
        plan = self.plan
        owners = work_owners(plan.input_groups(index), plan.groups[index], self.world.size)
        book: Known | None = self._statistics(index, block, owners)
        with phase("transform"):
            folded = self._fold(index, block, book, owners)
        rounded: dict[str, InputRounding] = {}
        if self.target is not None:
            book = self._staged(index, block, rounded, owners)
        if self.stream is not None and self.target is None:
            if self.stream.original is not None:
                self.stream.forward_original(index, block)
            elif self.refine is not None:
                # What is wanted, until it is known what comes.
                self.stream.forward(index, block, None, write=True)
        solved: Iterable[_Solved] = self._quantize(index, block, book, rounded, owners)
        refined = None
        if self.refine is not None:
            solved = list(solved)
            if isinstance(book, Staged):
                book.close()
            solved, refined = self._refined(index, block, solved, rounded)
        if self.heal is not None:
            solved = list(solved)
            self.heal.keep(index, block, [weight for weight, _ in solved])
        weights = [self._finish(weight, tokens) for weight, tokens in solved]
        if isinstance(book, Staged):
            book.close()
        del book
        with phase("writing"):
            self._write_kept(index, block)
        go_on = self._handed_on(index) and self.shared is None
        self._generation = index + 1 if go_on else None
        write = self._generation is not None and plan.recipe.propagate
        if self.stream is not None and (write or self.plan.cache is not None):
            ranges = None if self.plan.cache is None else CacheRanges(self.plan.cache, index)
            see = None if ranges is None else ranges.see
            self.stream.forward(index, block, None, write=write, rounded=rounded, cached=see)
            if ranges is not None:
                ranges.merge_(self.world.gathered(ranges.largest))
                for name, scale in ranges.scales().items():
                    self.writer.put(name, scale)
        return Record(step=f"block {index}", weights=tuple(weights), folded=folded, refined=refined)

    def _handed_on(self, index: int) -> bool:
        """Whether anyone reads the hidden states that a block hands on."""
        last = index == self.model.num_blocks - 1
        return not last or self.plan.head is not None or self.heal is not None

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

    def _statistics(self, index: int, block: nn.Module, owners: Owners) -> Known | None:
        """Statistics of the block's inputs: shared with other methods, or the run's own."""
        if self.stream is None:
            return None if self.given is None else self.given.book(self.plan, index)
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
            owners=owners,
        )

    def _staged(
        self, index: int, block: nn.Module, rounded: dict[str, InputRounding], owners: Owners
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
            write=self.refine is not None or self._handed_on(index),
            last=last,
            owners=owners,
        )

    def _fold(
        self, index: int, block: nn.Module, book: Known | None, owners: Owners
    ) -> tuple[str, ...]:
        """Applies the transforms; returns the producers that were changed."""
        if not self.plan.groups[index]:
            return ()
        assert isinstance(book, Book), "transforms are calibrated"
        vectors, changed = fold_block_(
            self.model, self.plan, self.transforms, block, index, book, owners, self.world
        )
        if self.folds is not None:
            for name, vector in vectors.tensors.items():
                self.folds.put(name, vector)
        return changed

    def _quantize(
        self,
        index: int,
        block: nn.Module,
        book: Known | None,
        rounded: dict[str, InputRounding],
        owners: Owners,
    ) -> Iterator[_Solved]:
        """Quantizes a block's weights, and tells how many tokens reached each; `rounded` receives
        parameters whose inputs are, and how."""

        def solving(key: str, refs: Sequence[WeightRef]) -> Callable[[], Answer]:
            def solve() -> Answer:
                stats = book.get(key) if book is not None and key in book else None
                weights = [self.model.weight(block, ref) for ref in refs]
                tokens = None if stats is None else stats.count
                sent = None if self.stream is None else self.stream.sent(index, key)
                return self._solve(refs, weights, stats), tokens if sent is None else sent

            return solve

        staged = book if isinstance(book, Staged) else None
        groups = list(self.plan.input_groups(index))
        stages = itertools.groupby(groups, lambda g: 0 if staged is None else staged.stage_of(g[0]))
        for stage, found in stages:
            if staged is not None:
                staged.reach(stage)
            now = list(found)
            tasks = [solving(key, refs) for key, refs in now]
            for solution, count in self.world.spread([owners[key] for key, _ in now], tasks):
                for solved in solution:
                    self.model.set_weight_(block, solved.ref, solved.tensor.dequantize())
                    if solved.tensor.scheme.activation_bits != 16:
                        rounded[solved.ref.parameter] = InputRounding(
                            scheme=solved.tensor.scheme, scale=solved.tensor.input_scale
                        )
                    name = solved.ref.parameter.removesuffix(".weight")
                    self.tell(f"{name} {solved.cost.error:.1e}")
                    yield solved, count

    def _finish(self, solved: Solved, tokens: int | None) -> WeightRecord:
        """Writes a weight of a block, unless its scales are still to be healed."""
        if self.heal is None or solved.ref.name not in self.heal.names:
            self._put(self.plan.weight_of[solved.ref.name], solved.tensor)
        return WeightRecord.of(solved, solved.ref.name, tokens)

    def _refined(
        self,
        index: int,
        block: nn.Module,
        solved: Sequence[_Solved],
        rounded: Mapping[str, InputRounding],
    ) -> tuple[list[_Solved], tuple[float, float] | None]:
        """A block's weights, moved for the sake of its outputs; their loss before and after."""
        assert self.refine is not None and self.stream is not None
        # A rounded input has no gradient.
        weights = [] if rounded else [weight for weight, _ in solved]
        taken, loss = refine_block_(self.refine, self.stream, self.plan, index, block, weights)
        if loss is not None:
            self.tell(f"refined {loss[0]:.2e} -> {loss[1]:.2e}")
        return [(taken.get(weight.ref.name, weight), count) for weight, count in solved], loss

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
            stored_scheme(self.model, self.plan, refs[0], scheme),
            stats,
            target=target,
            range_part=range_part,
            rounding=rounding,
            dtype=torch.float32 if scheme.kind == "ggml" else stored,
        )

    def _put(self, weight: PlannedWeight, tensor: QuantizedTensor) -> None:
        if self.world.rank != 0:
            return
        with phase("writing"):
            for name, packed in self.plan.format.pack(weight, tensor).items():
                self.writer.put(name, packed)

    def _healed(self) -> Record:
        """Trains the scales of all blocks and writes the weights that have them.

        Raises StoppedError.
        """
        assert self.heal is not None and self.stream is not None
        loss = self.heal.run(self.stream)
        if self.world.rank == 0:
            for name, tensor in self.heal.tensors():
                self._put(self.plan.weight_of[name], tensor)
        self._generation = None if self.plan.head is None else self.model.num_blocks
        return Record(step="heal", refined=loss)

    def _head(self) -> Record:
        """Quantizes the output head on the hidden states that reach it."""
        head = self.plan.head
        assert head is not None
        scheme = self.plan.scheme_of(head)
        needs = input_needs((self.target, self.range, self.rounding), scheme)
        needs = fitting(needs, head.shape[1])
        stats: Stats | None = None if self.given is None else self.given.of(head)
        if self.stream is not None and needs:
            stream: Stream = "quantized" if self.plan.recipe.propagate else "original"
            stats = self.stream.head_stats(head.shape[1], needs, stream=stream)
        weight = self.world.first(lambda: self._outside_matrix(head, stats))
        return Record(step="head", weights=(weight,))

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
                self._put(self.plan.weight_of[solved.ref.name], solved.tensor)
                self.tell(f"{solved.ref.name.removesuffix('.weight')} {solved.cost.error:.1e}")
                records.append(WeightRecord.of(solved, solved.ref.name, None))
        return Record(step="extra", weights=tuple(records))

    def _outside_matrix(self, ref: WeightRef, stats: Stats | None) -> WeightRecord:
        planned = self.plan.planned_head if ref.role == "head" else self.plan.weight_of[ref.name]
        (solved,) = self._solve([ref], [self._read(ref)], stats)
        self._put(planned, solved.tensor)
        return WeightRecord.of(solved, planned.name, None if stats is None else stats.count)

    def _read(self, ref: WeightRef) -> Tensor:
        """A weight that no block holds, where the statistics are."""
        return self.model.source.read(ref.name).to(self.model.device, self.model.dtype)
