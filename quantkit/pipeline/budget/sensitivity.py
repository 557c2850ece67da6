"""What each group loses under each scheme: KL of the model in which it alone is quantized.

Measured at two widths with cheap rounding, and carried to other schemes along the output error of
rounding to nearest on a sample of rows.  All branches advance together, so that every block is read
once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from quantkit.calibration.batches import batches_of
from quantkit.calibration.data.tokens import Calibration
from quantkit.calibration.gather import StatsBook
from quantkit.calibration.hidden import HiddenStore
from quantkit.calibration.kept_calls import KeptCalls
from quantkit.calibration.processes.ranks import ALONE, World
from quantkit.calibration.stream import CalibrationStream
from quantkit.checkpoint.memory import release_free_memory
from quantkit.methods.recipe import Recipe, input_needs
from quantkit.methods.stats import Needs, Stats
from quantkit.model.causal import CausalModel
from quantkit.model.refs import BlockCall, WeightRef
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.budget.candidates import Group
from quantkit.pipeline.budget.cheap import Cheap
from quantkit.pipeline.budget.divergence import mean_divergences

# Tokens that divergence is measured on, and those that statistics are taken of.
KL_TOKENS, STATS_TOKENS = 4096, 16384
# Bits of the two schemes that are measured; what lies between follows a power of the error.
PROBED_BITS = (2, 4)
# A divergence below this is the noise of float32 logits.
_LEAST_KL = 1e-9
_SLOPES = (0.5, 2.0)


def split_calibration(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """The first windows for divergence, the next for statistics; of one window both are made."""
    windows, length = calibration.ids.shape
    first = min(-(-KL_TOKENS // length), max(1, windows // 2))
    last = min(windows, first + -(-STATS_TOKENS // length))
    rest = slice(first, last) if last > first else slice(0, windows)
    return _part(calibration, slice(0, first)), _part(calibration, rest)


def _part(calibration: Calibration, chosen: slice) -> Calibration:
    pictured = calibration.pictured
    return dataclasses.replace(
        calibration,
        ids=calibration.ids[chosen],
        mask=calibration.mask[chosen],
        pictured=None if pictured is None else pictured.part(chosen.start, chosen.stop),
    )


def measure(
    model: CausalModel,
    recipe: Recipe,
    groups: Sequence[Group],
    schemes: Sequence[Mapping[Scheme, int]],
    calibration: Calibration,
    *,
    scratch: Path,
    gram_budget: int | None,
    device: str,
    progress: bool,
    world: World = ALONE,
) -> list[dict[Scheme, float]]:
    """For each group, scheme -> estimated KL in nats per token; `schemes` are those it may have.

    Hidden states of all branches go to `scratch`.  Each rank of `world` measures groups of its own,
    which depend on no others, and is told the rest.
    """
    own = range(world.rank, len(groups), world.size)
    scored, counted = split_calibration(calibration)
    probes = [_probes(choices) for choices in schemes]
    cheap = Cheap.of(recipe)
    needs = _needs(cheap, schemes)
    errors: dict[int, dict[Scheme, float]] = {}
    started: dict[int, dict[Scheme, int]] = {k: {} for k in own}
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stream = CalibrationStream(
            model,
            counted,
            device=device,
            scratch=scratch / "counted",
            gram_budget=gram_budget,
            stack=stack,
            spread=recipe.experts == "all",
        )
        most = sum(len(probes[k]) for k in own)
        branches = _Branches(model, scored, most, device, scratch / "scored", stack)
        stream.embed()
        branches.embed()
        for k in own:
            (ref, *_) = groups[k].refs
            if groups[k].block is not None or not (ref.role != "head" or model.head_tied):
                continue
            errors[k] = cheap.errors(model, [([ref], None, [_read(model, ref)])], schemes[k])
            for scheme in probes[k]:
                with model.embedding_as(cheap.rows_as(model, ref, scheme, None)):
                    started[k][scheme] = branches.start_embedded()
        bar = stack.enter_context(
            tqdm(total=model.num_blocks, unit="block", disable=None if progress else True)
        )
        bar.set_description("sensitivity")
        for index in range(model.num_blocks):
            block = model.load_block(index)
            mine = [k for k in own if groups[k].block == index]
            book = _gather(stream, index, block, needs, [groups[k] for k in mine])
            branches.forward(index, block)
            for k in mine:
                for scheme in probes[k]:
                    with _quantized(model, block, groups[k], book, cheap, scheme):
                        started[k][scheme] = branches.start(index, block)
                inputs = [
                    (refs, _stats(book, key), [model.weight(block, ref) for ref in refs])
                    for key, refs in groups[k].inputs.items()
                ]
                errors[k] = cheap.errors(model, inputs, schemes[k])
            del block
            release_free_memory()
            bar.update()
        for k in own:
            (ref, *_) = groups[k].refs
            if groups[k].block is not None or ref.role != "head":
                continue
            stats = stream.head_stats(ref.shape[1], needs, stream="original")
            errors[k] = cheap.errors(model, [([ref], stats, [_read(model, ref)])], schemes[k])
            for scheme in probes[k]:
                head = cheap.rows_as(model, ref, scheme, stats)
                started[k][scheme] = branches.project(head, started[k].get(scheme))
        found = branches.divergences()
    curves = {
        k: _curve(errors[k], {s: found[branch - 1] for s, branch in started[k].items()}, schemes[k])
        for k in own
    }
    every = {k: curve for told in world.gathered(curves) for k, curve in told.items()}
    return [every[k] for k in range(len(groups))]


class _Branches:
    """Hidden states of the original and of every model with one group quantized."""

    def __init__(
        self,
        model: CausalModel,
        calibration: Calibration,
        most: int,
        device: str,
        scratch: Path,
        stack: contextlib.ExitStack,
    ) -> None:
        self.model, self.calibration = model, calibration
        self.batches = list(batches_of(calibration, device))
        self._pictured = calibration.pictured
        self._kept = None if self._pictured is None else KeptCalls(scratch / "calls")
        # Without their images some models refuse the tokens that stand for them.
        with torch.no_grad():
            first, _ = model.calls(calibration.ids[:1] * (self._pictured is None))
        self.windows, self.count = len(calibration.ids), 1
        shape = ((most + 1) * self.windows, *first.shape[1:])
        self.hidden = stack.enter_context(HiddenStore(scratch, shape, first.dtype))
        self._calls: dict[int, tuple[BlockCall, ...]] = {}
        # Of branches with a head of their own: what it makes of rows, and whose states it reads.
        self._heads: dict[int, Callable[[Tensor], Tensor]] = {}
        self._states: dict[int, int] = {}

    def embed(self) -> None:
        """Stores what enters the first block; images pass the towers."""
        self._embed(0, keep=True)

    def start_embedded(self) -> int:
        """A new branch, of the embedding as the model has it now; returns its number."""
        self._embed(self.count, keep=False)
        self.count += 1
        return self.count - 1

    def _embed(self, branch: int, *, keep: bool) -> None:
        with contextlib.ExitStack() as stack:
            if self._pictured is not None:
                stack.enter_context(self.model.towers.loaded())
            for number, batch in enumerate(self.batches):
                ids = self.calibration.ids[batch.start : batch.stop, : batch.length]
                inputs = None if self._pictured is None else self._pictured.inputs(batch.start)
                hidden, calls = self.model.calls(ids, batch.mask, inputs)
                if keep and self._kept is not None:
                    self._kept.write(number, calls)
                elif keep:
                    self._calls[number] = calls
                self._write(0, branch * self.windows + batch.start, hidden)

    def forward(self, index: int, block: nn.Module) -> None:
        """All branches that have begun, through the original block."""
        for branch in range(self.count):
            self._run(index, block, branch, branch)

    def start(self, index: int, block: nn.Module) -> int:
        """A new branch: the original's hidden states through this block; returns its number."""
        self._run(index, block, 0, self.count)
        self.count += 1
        return self.count - 1

    def project(self, head: Callable[[Tensor], Tensor], branch: int | None) -> int:
        """Gives a branch (None: a new one, as the original up to there) a head of its own."""
        if branch is None:
            branch = self.count
            self.count += 1
            self._states[branch] = 0
        self._heads[branch] = head
        return branch

    def divergences(self) -> list[float]:
        """KL of each branch to the original, by number from 1 on."""
        last = self.model.num_blocks

        def read(branch: int, number: int) -> Tensor:
            return self._read(last, self._states.get(branch, branch), number)

        return mean_divergences(self.model, read, self._masks(), self.count - 1, self._heads)

    def _masks(self) -> list[Tensor]:
        """Tokens bool [B, T] of every batch that count: not those that an image's follows, which
        nobody predicts."""
        marks = torch.tensor(sorted(self.model.towers.placeholders()), dtype=torch.int64)
        found = []
        for batch in self.batches:
            mask = self.calibration.mask[batch.start : batch.stop, : batch.length].clone()
            if self._pictured is not None:
                ids = self.calibration.ids[batch.start : batch.stop, : batch.length]
                mask[:, :-1] &= ~torch.isin(ids[:, 1:], marks)
            found.append(mask)
        return found

    def _read(self, index: int, branch: int, number: int) -> Tensor:
        batch, first = self.batches[number], branch * self.windows
        hidden = self.hidden.read(index, first + batch.start, first + batch.stop)
        return hidden[:, : batch.length]

    def _write(self, index: int, first: int, hidden_BTH: Tensor) -> None:
        """Stores hidden states, with zeros behind a shorter sequence."""
        short = self.hidden.shape[1] - hidden_BTH.shape[1]
        self.hidden.write(index, first, functional.pad(hidden_BTH, (0, 0, 0, short)))

    def _call(self, index: int, number: int) -> BlockCall:
        if self._kept is not None:
            return self._kept.read(number, index, self.model.device)
        return self._calls[number][index]

    def _run(self, index: int, block: nn.Module, source: int, target: int) -> None:
        for number, batch in enumerate(self.batches):
            entered = self._read(index, source, number).to(self.model.device)
            out = self.model.run(block, entered, self._call(index, number))
            self._write(index + 1, target * self.windows + batch.start, out)


@contextlib.contextmanager
def _quantized(
    model: CausalModel,
    block: nn.Module,
    group: Group,
    book: StatsBook,
    cheap: Cheap,
    scheme: Scheme,
) -> Iterator[None]:
    """A context in which the block holds the group's weights decoded from the scheme."""
    kept = [(ref, model.weight(block, ref).clone()) for ref in group.refs]
    for key, refs in group.inputs.items():
        weights = [model.weight(block, ref) for ref in refs]
        values = cheap.decoded(model, refs, weights, scheme, _stats(book, key))
        for ref, value in zip(refs, values, strict=True):
            model.set_weight_(block, ref, value)
    yield
    for ref, value in kept:
        model.set_weight_(block, ref, value)


def _stats(book: StatsBook, key: str) -> Stats | None:
    return book.get(key) if key in book else None


def _read(model: CausalModel, ref: WeightRef) -> Tensor:
    return model.source.read(ref.name).to(model.device, model.dtype)


def _needs(cheap: Cheap, schemes: Sequence[Mapping[Scheme, int]]) -> Needs:
    """The statistics that the parts want for any of the schemes."""
    needs = Needs(moments=True)
    for scheme in {scheme for choices in schemes for scheme in choices}:
        needs |= input_needs((None, cheap.range, cheap.rounding), scheme)
    return needs


def _gather(
    stream: CalibrationStream,
    index: int,
    block: nn.Module,
    needs: Needs,
    groups: Sequence[Group],
) -> StatsBook:
    """Statistics of the groups' inputs in the original model."""
    features = {key: refs[0].shape[1] for g in groups for key, refs in g.inputs.items()}
    return stream.gather(
        index, block, dict.fromkeys(features, needs), features, stream="original", write=True
    )


def _probes(sizes: Mapping[Scheme, int]) -> tuple[Scheme, ...]:
    """The schemes that are measured: with the widest groups, at the widths nearest `PROBED_BITS`.

    Those with zeros are taken where there are any, of two alike the smaller one.
    """
    found: dict[Scheme, None] = {}
    for wanted in PROBED_BITS:
        best = min(
            sizes,
            key=lambda s: (abs(s.bits - wanted), s.group_size is None, s.symmetric,
                           -(s.group_size or 0), sizes[s]),
        )  # fmt: skip
        found[best] = None
    return tuple(found)


def _curve(
    errors: Mapping[Scheme, float], measured: Mapping[Scheme, float], sizes: Mapping[Scheme, int]
) -> dict[Scheme, float]:
    """Scheme -> loss: a power law through what was measured, second order below its least error."""
    points = sorted(
        (math.log(max(errors[scheme], 1e-30)), math.log(max(kl, _LEAST_KL)))
        for scheme, kl in measured.items()
    )
    (low, base), (high, top) = points[0], points[-1]
    slope = 1.0 if high <= low else (top - base) / (high - low)
    slope = min(max(slope, _SLOPES[0]), _SLOPES[1])
    found = {}
    for scheme in sizes:
        above = math.log(max(errors[scheme], 1e-30)) - low
        found[scheme] = math.exp(base + above * (slope if above > 0 else 1.0))
    return found
