"""What each group loses under each scheme: KL of the model in which it alone is quantized.

Measured at two widths with cheap rounding, and carried to other schemes along the output error of
rounding to nearest on a sample of rows.  All branches advance together, so that every block is read
once.  Letters: O out features, I in features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantkit.calibration.batches import batches_of
from quantkit.calibration.data.tokens import Calibration
from quantkit.calibration.gather import StatsBook
from quantkit.calibration.hidden import HiddenStore
from quantkit.calibration.processes.ranks import ALONE, World
from quantkit.calibration.stream import CalibrationStream
from quantkit.checkpoint.memory import release_free_memory
from quantkit.methods.parts import Range, Rounding, make_part
from quantkit.methods.recipe import Recipe, input_needs
from quantkit.methods.rounding.nearest import Nearest
from quantkit.methods.stats import Needs, Stats
from quantkit.model.causal import CausalModel
from quantkit.model.refs import BlockCall, WeightRef
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.budget.candidates import Group
from quantkit.pipeline.budget.divergence import mean_divergences
from quantkit.pipeline.solve import quantize_weights

# Tokens that divergence is measured on, and those that statistics are taken of.
KL_TOKENS, STATS_TOKENS = 4096, 16384
# Bits of the two schemes that are measured; what lies between follows a power of the error.
PROBED_BITS = (2, 4)
# Rows of each weight that errors of all schemes are compared on.
_SAMPLED_ROWS = 128
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
    return dataclasses.replace(
        calibration, ids=calibration.ids[chosen], mask=calibration.mask[chosen]
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
    probes = [_probes(tuple(choices)) for choices in schemes]
    parts = recipe.make_range(), _cheap(recipe)
    errors: dict[int, dict[Scheme, float]] = {}
    with contextlib.ExitStack() as stack, torch.no_grad():
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
        bar = stack.enter_context(
            tqdm(total=model.num_blocks, unit="block", disable=None if progress else True)
        )
        bar.set_description("sensitivity")
        for index in range(model.num_blocks):
            block = model.load_block(index)
            mine = [k for k in own if groups[k].block == index]
            book = _gather(stream, index, block, parts, [groups[k] for k in mine], schemes)
            branches.forward(index, block)
            for k in mine:
                solver = _Solver(model, block, groups[k], book, parts)
                for scheme in probes[k]:
                    with solver.quantized(scheme):
                        branches.start(index, block)
                errors[k] = {scheme: solver.error(scheme) for scheme in schemes[k]}
            del block
            release_free_memory()
            bar.update()
        found = iter(branches.divergences())
    curves = {
        k: _curve(errors[k], {scheme: next(found) for scheme in probes[k]}, schemes[k])
        for k in errors
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
        with torch.no_grad():
            first, _ = model.calls(calibration.ids[:1])
        self.windows, self.count = len(calibration.ids), 1
        shape = ((most + 1) * self.windows, *first.shape[1:])
        self.hidden = stack.enter_context(HiddenStore(scratch, shape, first.dtype))
        self._calls: dict[int, tuple[BlockCall, ...]] = {}

    def embed(self) -> None:
        """Stores what enters the first block."""
        for number, batch in enumerate(self.batches):
            ids = self.calibration.ids[batch.start : batch.stop]
            hidden, self._calls[number] = self.model.calls(ids, batch.mask)
            self.hidden.write(0, batch.start, hidden)

    def forward(self, index: int, block: nn.Module) -> None:
        """All branches that have begun, through the original block."""
        for branch in range(self.count):
            self._run(index, block, branch, branch)

    def start(self, index: int, block: nn.Module) -> None:
        """A new branch: the original's hidden states through this block."""
        self._run(index, block, 0, self.count)
        self.count += 1

    def divergences(self) -> list[float]:
        """KL of each branch to the original in the order in which they were started."""
        last = self.model.num_blocks

        def read(branch: int, number: int) -> Tensor:
            return self._read(last, branch, number)

        masks = [self.calibration.mask[b.start : b.stop] for b in self.batches]
        return mean_divergences(self.model, read, masks, self.count - 1)

    def _read(self, index: int, branch: int, number: int) -> Tensor:
        batch, first = self.batches[number], branch * self.windows
        return self.hidden.read(index, first + batch.start, first + batch.stop)

    def _run(self, index: int, block: nn.Module, source: int, target: int) -> None:
        for number, batch in enumerate(self.batches):
            entered = self._read(index, source, number).to(self.model.device)
            out = self.model.run(block, entered, self._calls[number][index])
            self.hidden.write(index + 1, target * self.windows + batch.start, out)


class _Solver:
    """One group in its block: quantized for a while, and what rounding to nearest costs it."""

    def __init__(
        self,
        model: CausalModel,
        block: nn.Module,
        group: Group,
        book: StatsBook,
        parts: tuple[Range, Rounding],
    ) -> None:
        self.model, self.block, self.group = model, block, group
        self.range, self.rounding = parts
        self.inputs = [
            (refs, book.get(key) if key in book else None) for key, refs in group.inputs.items()
        ]

    @contextlib.contextmanager
    def quantized(self, scheme: Scheme) -> Iterator[None]:
        """A context in which the block holds the group's weights decoded from the scheme."""
        kept = [(ref, self.model.weight(self.block, ref).clone()) for ref in self.group.refs]
        for refs, stats in self.inputs:
            weights = [self.model.weight(self.block, ref) for ref in refs]
            for ref, value in zip(
                refs, self._solve(refs, weights, scheme, stats, self.rounding), strict=True
            ):
                self.model.set_weight_(self.block, ref, value)
        yield
        for ref, value in kept:
            self.model.set_weight_(self.block, ref, value)

    def error(self, scheme: Scheme) -> float:
        """Relative output error of rounding to nearest on some rows, summed over the weights."""
        total = 0.0
        for refs, stats in self.inputs:
            rows = [_sample(self.model.weight(self.block, ref)) for ref in refs]
            values = self._solve(refs, rows, scheme, stats, Nearest())
            for weight, value in zip(rows, values, strict=True):
                whole = _energy(weight.float(), stats)
                lost = _energy(weight.float() - value.float(), stats)
                total += lost / whole if whole > 0 else 0.0
        return total

    def _solve(
        self,
        refs: Sequence[WeightRef],
        weights: Sequence[Tensor],
        scheme: Scheme,
        stats: Stats | None,
        rounding: Rounding,
    ) -> list[Tensor]:
        solved = quantize_weights(
            refs,
            weights,
            scheme,
            stats,
            # The original's activations are measured: nothing has drifted.
            target=None,
            range_part=self.range,
            rounding=rounding,
            dtype=self.model.source.info(refs[0].name).dtype,
        )
        return [each.tensor.dequantize() for each in solved]


def _sample(weight_OI: Tensor) -> Tensor:
    """Rows at equal distances."""
    return weight_OI[:: max(1, len(weight_OI) // _SAMPLED_ROWS)]


def _energy(weight_OI: Tensor, stats: Stats | None) -> float:
    """tr(W H Wᵀ), with the diagonal of H where only that is known, or plain squares."""
    if stats is None or stats.count == 0:
        return float(weight_OI.square().sum())
    if stats.gram is not None and stats.gram.ndim == 2:
        return float(((weight_OI @ stats.gram) * weight_OI).sum())
    return float((weight_OI.square() @ stats.sum_sq.float()).sum())


def _gather(
    stream: CalibrationStream,
    index: int,
    block: nn.Module,
    parts: tuple[Range, Rounding],
    groups: Sequence[Group],
    schemes: Sequence[Mapping[Scheme, int]],
) -> StatsBook:
    """Statistics of the groups' inputs in the original model, as the parts need them."""
    needs = Needs(moments=True)
    for scheme in {scheme for choices in schemes for scheme in choices}:
        needs |= input_needs((None, *parts), scheme)
    features = {key: refs[0].shape[1] for g in groups for key, refs in g.inputs.items()}
    return stream.gather(
        index, block, dict.fromkeys(features, needs), features, stream="original", write=True
    )


def _cheap(recipe: Recipe) -> Rounding:
    """The recipe's rounding without what refines it afterwards."""
    options = {key: value for key, value in recipe.rounding.options if key != "sweeps"}
    part: Rounding = make_part("rounding", recipe.rounding.name, options)
    return part


def _probes(schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """The schemes that are measured: with the widest groups, at the widths nearest `PROBED_BITS`.

    Those with zeros are taken where there are any.
    """
    found: dict[Scheme, None] = {}
    for wanted in PROBED_BITS:
        best = min(
            schemes,
            key=lambda s: (abs(s.bits - wanted), s.group_size is None, s.symmetric,
                           -(s.group_size or 0)),
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
