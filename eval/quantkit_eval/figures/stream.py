"""A model run block by block over all sequences, its hidden states in a file: memory for one block.

Shapes: B sequences in a batch, T tokens, H hidden size, V vocabulary rows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from quantkit.calibration.kept_calls import KeptCalls
from quantkit.calibration.rounded_cache import RoundedCache
from quantkit.calibration.rounded_inputs import QuantizedActivations
from quantkit.checkpoint.disk import disk_errors, open_own
from quantkit.checkpoint.files import Source
from quantkit.checkpoint.safetensors import read_into, write_from
from quantkit.inference.packed_attention import PackedAttention
from quantkit.inference.packed_cache import PACKED
from quantkit.model.attention import attending, caches_latent, keys_and_values
from quantkit.model.causal import BlockCall, CausalModel, TapCallback
from quantkit.model.decoded import Decoded
from quantkit.numbers.cache import CacheScheme
from quantkit_eval.errors import EvaluationError
from quantkit_eval.sequences import Workload


class States:
    """Hidden states of all batches in one file, `slots` times over."""

    def __init__(
        self, directory: Path, workload: Workload, hidden: int, dtype: torch.dtype, slots: int = 1
    ) -> None:
        self._workload, self._hidden, self._dtype = workload, hidden, dtype
        sizes = [batch.ids.numel() * hidden * dtype.itemsize for batch in workload.batches]
        self._starts = [sum(sizes[:k]) for k in range(len(sizes))]
        self._slot_bytes = sum(sizes)
        self._path = directory / "hidden.bin"
        with disk_errors(self._path, slots * self._slot_bytes):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = open_own(self._path, os.O_RDWR | os.O_CREAT, 0o600)

    def read(self, number: int, slot: int = 0) -> Tensor:
        """The states of a batch [B, T, H], fresh memory on the CPU."""
        batch = self._workload.batches[number]
        out = torch.empty(*batch.ids.shape, self._hidden, dtype=self._dtype)
        count = read_into(self._file, out, slot * self._slot_bytes + self._starts[number])
        assert count == out.nbytes, "states are read only after they were written"
        return out

    def write(self, number: int, hidden_BTH: Tensor, slot: int = 0) -> None:
        """Stores the states of a batch.  Raises OutputError if the disk is full."""
        with disk_errors(self._path):
            content = hidden_BTH.to("cpu", self._dtype).contiguous()
            write_from(self._file, content, slot * self._slot_bytes + self._starts[number])

    def close(self) -> None:
        """Closes and removes the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._path.unlink(missing_ok=True)


class ModelStream:
    """One model and where its hidden states are between two blocks.

    Quantized weights are decoded once and multiplied in `dtype`; inputs of schemes that
    round them are rounded as the layers that run them do, keys and values as the cache does that
    the checkpoint asks for, or that `kv` names.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        workload: Workload,
        directory: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        trust_remote_code: bool = False,
        kv: str = "stored",
    ) -> None:
        self.name, self.source, self.workload = name, source, workload
        self.device = device
        self.model = CausalModel.open(
            source, trust_remote_code=trust_remote_code, dtype=dtype, device=device
        )
        self._rounded = source.input_roundings() if isinstance(source, Decoded) else {}
        self._cache = _cache(source, self.model, kv)
        self._calls: dict[tuple[int, int], tuple[BlockCall, ...]] = {}
        self._kept = KeptCalls(directory / "calls") if workload.pictured is not None else None
        if self._kept is not None and not self.model.towers.takes_images:
            raise EvaluationError(
                f"{name}: this checkpoint has no tower that reads images, and --text holds some; "
                "give text alone"
            )
        # Without their images some models refuse the tokens that stand for them.
        text = workload.batches[0].ids * (self._kept is None)
        with torch.no_grad():
            first, _ = self.model.calls(text)
        self.hidden_size: int = first.shape[-1]
        self.states = States(directory, workload, self.hidden_size, first.dtype)

    @property
    def num_blocks(self) -> int:
        """Blocks of the model."""
        return self.model.num_blocks

    def embed(self) -> None:
        """Writes what enters the first block; images pass the towers, which are loaded for that.

        What these give to later blocks is kept on the disk.
        """
        # What the stack holds turns gradients off too, so it has to end first.
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if self._kept is not None:
                stack.enter_context(self.model.towers.loaded())
            for number, batch in enumerate(self.workload.batches):
                hidden, calls = self.model.calls(batch.ids, inputs=self.workload.inputs(batch))
                if batch.pictured and self._kept is not None:
                    self._kept.write(number, calls)
                self.write(number, hidden)

    def load(self, index: int) -> nn.Module:
        """A block with its weights; drop the reference to free it."""
        with torch.no_grad():
            return self.model.load_block(index)

    def run(
        self, index: int, block: nn.Module, number: int, hidden_BTH: Tensor | None = None
    ) -> Tensor:
        """What the block makes of batch `number`, of its stored states or of those given."""
        hidden = self.read(number) if hidden_BTH is None else hidden_BTH
        call = self._call(index, number)
        rounded = {
            ref.parameter: self._rounded[ref.name]
            for ref in self.model.weights(index)
            if ref.name in self._rounded
        }
        with contextlib.ExitStack() as modes:
            modes.enter_context(torch.no_grad())
            if rounded:
                modes.enter_context(QuantizedActivations(block, rounded))
            if isinstance(self._cache, RoundedCache):
                modes.enter_context(keys_and_values(block, self._cache.of(index)))
            elif self._cache is not None:
                modes.enter_context(attending(self._cache))
            return self.model.run(block, hidden.to(self.device), call)

    @contextlib.contextmanager
    def tapped(self, index: int, block: nn.Module, callback: TapCallback) -> Iterator[None]:
        """While active, `run` hands every input of a product to the callback."""
        with self.model.tap(index, block, None, callback):
            yield

    def advance(self, index: int, block: nn.Module, done: Callable[[], object]) -> None:
        """Runs a block over all batches, in place; calls `done` after each."""
        for number in range(len(self.workload.batches)):
            self.write(number, self.run(index, block, number))
            done()

    def read(self, number: int) -> Tensor:
        """The states of a batch [B, T, H], fresh memory on the CPU."""
        return self.states.read(number)

    def write(self, number: int, hidden_BTH: Tensor) -> None:
        """Stores the states of a batch.  Raises OutputError if the disk is full."""
        self.states.write(number, hidden_BTH)

    def close(self) -> None:
        """Closes and removes the file of states."""
        self.states.close()

    def __enter__(self) -> ModelStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, index: int, number: int) -> BlockCall:
        """The block's other arguments: without padding masks they depend on the shape only, but
        where images take part on these too.

        A whole body gets token ids among them.
        """
        batch = self.workload.batches[number]
        if batch.pictured and self._kept is not None:
            return self._kept.read(number, index, self.model.device)
        shape = (batch.ids.shape[0], batch.ids.shape[1])
        if self.model.whole or shape not in self._calls:
            with torch.no_grad():
                calls = self.model.calls(batch.ids)[1]
            if self.model.whole:
                return calls[index]
            self._calls[shape] = calls
        return self._calls[shape][index]


def cached_as(source: Source, kv: str) -> str | None:
    """What a model's keys and values are rounded to; `kv` is stored, none, or a name.  None: not.

    stored: what the checkpoint asks for; int8 and int4 are quantkit's own cache.
    """
    if kv in PACKED:
        return kv
    if not isinstance(source, Decoded) or kv == "none":
        return None
    found = source.cache_scheme()
    if found is None:
        return None if kv == "stored" else kv
    return found.name


def _cache(source: Source, model: CausalModel, kv: str) -> RoundedCache | PackedAttention | None:
    """The cache that a model's keys and values go through; None if it rounds nothing."""
    name = cached_as(source, kv)
    if name is None:
        return None
    if name in PACKED:
        return PackedAttention(model.text_config, name)
    assert isinstance(source, Decoded)
    if caches_latent(model.text_config):
        raise EvaluationError(
            f"--kv {kv}: this model's cache holds what keys and values are computed from "
            "(multi-head latent attention), which is not simulated; give --kv none"
        )
    return RoundedCache(source, CacheScheme.parse(name), model)
