"""Scales of a whole quantized model trained on the original's logits, block by block in memory.

A step runs a batch forward through all blocks and keeps what enters each; backward, each block runs
again and hands the gradient on to the one before it.  What is learned is small: the scales.
Letters: B sequences, T tokens, H hidden size, V vocabulary, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.calibration.batches import Batch
from quantkit.calibration.block_loss import repeatable
from quantkit.calibration.held_blocks import Held, HeldBlocks
from quantkit.calibration.spans import phase
from quantkit.calibration.stream import CalibrationStream
from quantkit.methods.descent import LearnedScales
from quantkit.methods.parts import Heal
from quantkit.model.refs import BlockCall, WeightRef, part_view, weight_view
from quantkit.numbers.tensor import QuantizedTensor, decode_rows

# Logits that are computed at a time.
LOGITS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class _Weight:
    ref: WeightRef
    tensor: QuantizedTensor


class Healing:
    """Training of the scales of held blocks; `values` are then the best that were found."""

    def __init__(
        self,
        stream: CalibrationStream,
        part: Heal,
        blocks: HeldBlocks,
        held: Sequence[Held],
        half: Mapping[str, bool],
        *,
        resident: bool,
    ) -> None:
        """half: by name, whether the file stores scales in float16; resident: keep all blocks in
        memory, which changes nothing but the time."""
        self._stream, self._model, self._part = stream, stream.model, part
        self._blocks, self._held, self._half = blocks, held, half
        self._resident = resident
        self._kept: dict[int, tuple[nn.Module, list[_Weight]]] = {}
        self._scales: dict[str, LearnedScales] = {}
        rows = self._model.head.shape[0]
        self._rows_VH = self._model.head_rows(0, rows)

    def run(self) -> tuple[float, float]:
        """Trains; returns the KL divergence in nats per token of batches that only judge, before
        and after, which is never more."""
        batches = self._stream.batches
        judges = batches[len(batches) - self._part.judges(len(batches)) :]
        fitted = max(len(batches) - len(judges), 1)
        before = after = self._judged(judges)
        best = {name: scale.values for name, scale in self._scales.items()}
        order = torch.Generator().manual_seed(0)
        queue: list[int] = []
        for step in range(self._part.iterations):
            queue = queue or torch.randperm(fitted, generator=order).tolist()
            rate = self._part.rate * (1 - step / self._part.iterations)
            self._step(batches[queue.pop()], step + 1, rate)
            if self._part.looks_after(step):
                now = self._judged(judges)
                if now < after:
                    after = now
                    best = {name: scale.values for name, scale in self._scales.items()}
        self.values = best
        self._kept.clear()
        return before, after

    def _judged(self, batches: Sequence[Batch]) -> float:
        total, tokens = 0.0, 0
        for batch in batches:
            *_, hidden = self._forward(batch)[0]
            total += self._divergence(batch, hidden)[0]
            tokens += self._stream.tokens(batch)
        return total / max(tokens, 1)

    def _step(self, batch: Batch, number: int, rate: float) -> None:
        entered, calls = self._forward(batch)
        _, slope = self._divergence(batch, entered.pop())
        for index in reversed(range(self._model.num_blocks)):
            block, weights = self._load(index)
            slope = self._back(block, weights, entered.pop(), calls[index], slope, number, rate)

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
        number: int,
        rate: float,
    ) -> Tensor:
        """Steps a block's scales; the gradient by what entered it."""
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
        for weight in weights:
            scales = self._scales[weight.ref.name]
            slope_OI = part_view(by_path[weight.ref.parameter], weight.ref).float()
            value_OI = weight_view(block, weight.ref).float()
            scales.step_(scales.slope(slope_OI, value_OI), number, rate)
        return before

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
            if name not in self._scales:
                self._scales[name] = LearnedScales(tensor, half=self._half[name])
            values = self._scales[name].values
            decoded = decode_rows(tensor.codes, values, tensor.zero, tensor.scheme)
            weight_view(block, weight.ref).copy_(decoded)
        return found
