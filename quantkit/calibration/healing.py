"""Scales of a whole quantized model trained on the original's logits, block by block in memory.

A step runs a batch forward through all blocks and keeps what enters each; backward, each block runs
again and hands the gradient on to the one before it.  What is learned is small: the scales.
Letters: B sequences, T tokens, H hidden size, V vocabulary, O out features, I in features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.calibration.batches import Batch
from quantkit.calibration.block_loss import repeatable
from quantkit.calibration.held_blocks import Held, HeldBlocks
from quantkit.calibration.kept_training import KeptTraining, Trained
from quantkit.calibration.spans import phase
from quantkit.calibration.stream import TIMES_SAVING, CalibrationStream
from quantkit.errors import StoppedError
from quantkit.methods.descent import LearnedScales
from quantkit.methods.parts import Heal
from quantkit.model.refs import BlockCall, WeightRef, part_view, weight_view
from quantkit.numbers.tensor import QuantizedTensor, decode_rows

# Logits that are computed at a time.
LOGITS = 1 << 22

# Whether there is no time left for so many seconds of work.
Late = Callable[[float], bool]


def never(seconds: float) -> bool:
    """Whether it is late for a run without an end in sight."""
    return False


@dataclass(frozen=True, kw_only=True)
class _Weight:
    ref: WeightRef
    tensor: QuantizedTensor


class _Pace:
    """Seconds that things took, at most, and whether it is time to keep what there is."""

    def __init__(self) -> None:
        self._seconds = {"step": 0.0, "look": 0.0, "save": 0.0}
        self._saved_at = time.monotonic()

    def stepping(self) -> AbstractContextManager[None]:
        """A step."""
        return self._taking("step")

    def judging(self) -> AbstractContextManager[None]:
        """A look at what is held out."""
        return self._taking("look")

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """What keeps it."""
        with self._taking("save"):
            yield
        self._saved_at = time.monotonic()

    def needed(self, looks: bool) -> float:
        """For another step, and to keep what comes of it."""
        return self._seconds["step"] + looks * self._seconds["look"] + self._seconds["save"]

    def is_time(self) -> bool:
        """Whether keeping it is a small part of what there is to lose."""
        return time.monotonic() - self._saved_at > TIMES_SAVING * self._seconds["save"]

    @contextlib.contextmanager
    def _taking(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds[what] = max(self._seconds[what], time.monotonic() - began)


class Healing:
    """Training of the scales of held blocks; `values` are then the best that were found.

    Several processes take the same steps: the one that has a batch works it out for all.
    """

    def __init__(
        self,
        stream: CalibrationStream,
        part: Heal,
        blocks: HeldBlocks,
        held: Sequence[Held],
        half: Mapping[str, bool],
        *,
        resident: bool,
        late: Late = never,
    ) -> None:
        """half: by name, whether the file stores scales in float16; resident: keep all blocks in
        memory, which changes nothing but the time."""
        self._stream, self._model, self._part = stream, stream.model, part
        self._blocks, self._held = blocks, held
        self._resident, self._late = resident, late
        self._kept: dict[int, tuple[nn.Module, list[_Weight]]] = {}
        self._scales = {
            name: LearnedScales(blocks.scale(name), half=half[name])
            for weights in held
            for name in weights
        }
        self._batches, self._owners = stream.shares.every, stream.shares.owners
        self._training = KeptTraining(stream.scratch / "training")
        rows = self._model.projection.shape[0]
        self._rows_VH = self._model.head_rows(0, rows)

    def run(self) -> tuple[float, float]:
        """Trains, on from the step that an interrupted run kept last; returns the KL divergence in
        nats per token of batches that only judge, before and after, which is never more.

        Raises StoppedError, with what is done on the disk, once it is too late for another step,
        but not before the first.
        """
        world, steps = self._stream.world, self._part.iterations
        count = self._part.judges(len(self._batches))
        judges = range(len(self._batches) - count, len(self._batches))
        fitted = max(len(self._batches) - count, 1)
        pace = _Pace()
        kept = self._training.load(self._scales, self._model.device)
        if kept is None:
            with pace.judging():
                least = self._judged(judges)
            now, best = Trained(steps=0, before=least, after=least), self._values()
        else:
            now, best = kept
        first = now.steps
        order = torch.Generator().manual_seed(0)
        queue: list[int] = []
        for step in range(steps):
            queue = queue or torch.randperm(fitted, generator=order).tolist()
            batch = queue.pop()
            if step < first:
                continue
            looks = self._part.looks_after(step)
            needed = functools.partial(self._late, pace.needed(looks))
            if step > first and world.first(needed):
                self._save(now, best)
                raise StoppedError(f"{step} of {steps} training steps are kept")
            with pace.stepping():
                self._step(batch, step + 1, self._part.rate * (1 - step / steps))
            now = dataclasses.replace(now, steps=step + 1)
            if looks:
                with pace.judging():
                    least = self._judged(judges)
                if least < now.after:
                    now, best = dataclasses.replace(now, after=least), self._values()
            if world.first(pace.is_time):
                with pace.saving():
                    self._save(now, best)
        self.values = best
        self._kept.clear()
        return now.before, now.after

    def _values(self) -> dict[str, Tensor]:
        return {name: scale.values for name, scale in self._scales.items()}

    def _save(self, now: Trained, best: Mapping[str, Tensor]) -> None:
        """Keeps how far it has come; all processes have come as far, and one of them says so."""
        with phase("fsync"):
            self._stream.world.first(lambda: self._training.save(now, self._scales, best))

    def _judged(self, numbers: Sequence[int]) -> float:
        def judging(batch: Batch) -> Callable[[], float]:
            return lambda: self._divergence(batch, self._forward(batch)[0][-1])[0]

        batches = [self._batches[number] for number in numbers]
        owners = [self._owners[number] for number in numbers]
        total = 0.0
        for divergence in self._stream.world.spread(owners, [judging(each) for each in batches]):
            total += divergence
        return total / max(sum(self._stream.tokens(batch) for batch in batches), 1)

    def _step(self, batch: int, number: int, rate: float) -> None:
        owner, world = self._owners[batch], self._stream.world
        slopes = self._slopes(self._batches[batch]) if owner == world.rank else iter(())
        for index in reversed(range(self._model.num_blocks)):
            (found,) = world.spread([owner], [lambda: next(slopes)])
            for name, slope_OG in zip(self._held[index], found, strict=True):
                self._scales[name].step_(slope_OG, number, rate)

    def _slopes(self, batch: Batch) -> Iterator[list[Tensor]]:
        """The gradients by the scales' logarithms [O, G], from the last block to the first."""
        entered, calls = self._forward(batch)
        _, slope = self._divergence(batch, entered.pop())
        for index in reversed(range(self._model.num_blocks)):
            block, weights = self._load(index)
            slope, found = self._back(block, weights, entered.pop(), calls[index], slope)
            yield found

    def _forward(self, batch: Batch) -> tuple[list[Tensor], tuple[BlockCall, ...]]:
        """What enters each block, and what the last one hands on."""
        hidden, calls = self._stream.entering(batch)
        entered = [hidden]
        for index in range(self._model.num_blocks):
            block, _ = self._load(index)
            with phase("forward"):
                # Blocks may work in place.
                entered.append(self._model.run(block, entered[-1].clone(), calls[index]))
        return entered, calls

    def _back(
        self,
        block: nn.Module,
        weights: Sequence[_Weight],
        entered: Tensor,
        call: BlockCall,
        slope: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradients by what entered a block, and by the logarithms of its scales."""
        parameters = {w.ref.parameter: block.get_parameter(w.ref.parameter) for w in weights}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with phase("heal"), repeatable(self._stream.device), torch.enable_grad():
            leaf = entered.detach().requires_grad_(True)
            out = self._model.output(block, leaf.clone(), call)
            before, *found = torch.autograd.grad(
                out,
                [leaf, *parameters.values()],
                slope.to(out.dtype),
                allow_unused=True,
                materialize_grads=True,
            )
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        by_path = dict(zip(parameters, found, strict=True))
        slopes = []
        for weight in weights:
            slope_OI = part_view(by_path[weight.ref.parameter], weight.ref).float()
            value_OI = weight_view(block, weight.ref).float()
            slopes.append(self._scales[weight.ref.name].slope(slope_OI, value_OI))
        return before, slopes

    def _divergence(self, batch: Batch, hidden: Tensor) -> tuple[float, Tensor]:
        """KL(original || model) of a batch, summed over its tokens, and its gradient by what the
        last block hands on."""
        original = self._stream.original
        assert original is not None
        blocks = self._model.num_blocks
        wanted = self._stream.read(original, blocks, batch)
        total, slopes = 0.0, torch.zeros_like(hidden)
        for part in self._pieces(hidden, batch):
            with phase("heal"), repeatable(self._stream.device), torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_(True)
                # A sum: its gradient is far from where 16 bits end, which a mean's is not.
                divergence = self._between(wanted[part], leaf, batch, part)
                (slope,) = torch.autograd.grad(divergence, leaf)
            total += float(divergence.detach())
            slopes[part] = slope
        return total, slopes

    def _pieces(self, hidden: Tensor, batch: Batch) -> list[tuple[slice, slice]]:
        """Parts of hidden states that are taken to logits together."""
        sequences, tokens = hidden.shape[:2]
        length = batch.length or self._stream.calibration.ids.shape[1]
        if hidden.ndim > 3 or tokens != length:
            # Models that do not have a row for each token.
            return [(slice(k, k + 1), slice(None)) for k in range(sequences)]
        step = max(1, LOGITS // (len(self._rows_VH) * sequences))
        return [(slice(None), slice(at, at + step)) for at in range(0, tokens, step)]

    def _between(
        self, wanted: Tensor, got: Tensor, batch: Batch, part: tuple[slice, slice]
    ) -> Tensor:
        with torch.no_grad():
            p = self._logits(wanted)
        q = self._logits(got)
        each_BT = (p.exp() * (p - q)).sum(-1)
        if batch.mask is None:
            return each_BT.sum()
        return (each_BT * batch.mask[part].to(each_BT.device)).sum()

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._model.partial_logits(hidden, self._rows_VH, 0, grad=torch.is_grad_enabled())
        return logits.float().log_softmax(-1)

    def _load(self, index: int) -> tuple[nn.Module, list[_Weight]]:
        """A block with its weights at the scales that they have now."""
        found = self._kept.get(index)
        if found is None:
            with phase("reading"):
                block = self._blocks.load(index)
                weights = [
                    _Weight(ref=ref, tensor=self._blocks.tensor(index, name, self._model.dtype))
                    for name, (ref, _) in self._held[index].items()
                ]
            found = block, weights
            if self._resident:
                self._kept[index] = found
        block, weights = found
        for weight in weights:
            name, tensor = weight.ref.name, weight.tensor
            values = self._scales[name].values
            decoded = decode_rows(tensor.codes, values, tensor.zero, tensor.scheme)
            weight_view(block, weight.ref).copy_(decoded)
        return found
