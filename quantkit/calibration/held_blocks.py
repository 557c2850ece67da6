"""Blocks as they were quantized, on the disk until they are healed: codes, scales, and the rest.

Letters: O out features, I in features, G groups per row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.calibration.processes.ranks import ALONE, World
from quantkit.checkpoint.disk import disk_errors
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.shards import ShardLayout, ShardWriter, plan_shards
from quantkit.model.causal import CausalModel
from quantkit.model.refs import WeightRef
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

# The weights of a block whose scales are trained, each with its scheme.
Held = Mapping[str, tuple[WeightRef, Scheme]]


class HeldBlocks:
    """Integer weights as codes, scales and zeros; all else that the file of the source holds of a
    block as it is, so that the source is not read again."""

    def __init__(
        self,
        model: CausalModel,
        held: Sequence[Held],
        directory: Path,
        *,
        done: Collection[int],
        stack: contextlib.ExitStack,
        world: World = ALONE,
    ) -> None:
        """held: by block; done: blocks that an interrupted run kept; rank 0 keeps them for all."""
        self._model, self._held, self._world = model, held, world
        self._layout, names = held_layout(model, held)
        self._directory, self._stack = directory, stack
        self._files: ShardWriter | None = None
        if world.rank == 0:
            with disk_errors(directory):
                directory.mkdir(parents=True, exist_ok=True)
            self._open([name for index in done for name in names[index]])

    def _open(self, committed: Collection[str]) -> ShardWriter:
        writer = ShardWriter(self._directory, self._layout, committed=committed)
        self._files = self._stack.enter_context(writer)
        return writer

    def keep(self, index: int, block: nn.Module, tensors: Mapping[str, QuantizedTensor]) -> None:
        """Stores a block; `tensors` by the names of its held weights."""
        if self._files is None:
            return
        for name, tensor in tensors.items():
            self._files.put(f"{name}:codes", tensor.codes)
            self._files.put(f"{name}:scale", tensor.scale.values())
            if tensor.zero is not None:
                self._files.put(f"{name}:zero", tensor.zero)
        for path, value in _others(block, self._held[index]).items():
            self._files.put(f"{index}:{path}", value)

    def scale(self, name: str) -> Tensor:
        """The scales of a held weight as they were stored, float32 [O, G]."""
        return self._read(f"{name}:scale")

    def tensor(self, index: int, name: str, dtype: torch.dtype) -> QuantizedTensor:
        """A held weight as it was stored, on the model's device."""
        _, scheme = self._held[index][name]
        zero = None if scheme.symmetric else self._read(f"{name}:zero")
        return QuantizedTensor(
            codes=self._read(f"{name}:codes"),
            scale=PlainScale(tensor=self._read(f"{name}:scale")),
            zero=zero,
            scheme=scheme,
            dtype=dtype,
        )

    def load(self, index: int) -> nn.Module:
        """The block as it computed once it was quantized, but for its held weights, whose numbers
        are whatever lies in fresh memory."""
        block = self._model.empty_block(index)
        others = _others(block, self._held[index])
        state = {
            path: self._read(f"{index}:{path}")
            if path in others
            else torch.empty_like(value, device=self._model.device)
            for path, value in block.state_dict().items()
        }
        block.load_state_dict(state, assign=True)
        return block.requires_grad_(False).to(self._model.device)

    def sync(self) -> None:
        """Returns once everything kept so far is on the disk."""
        if self._files is not None:
            self._files.sync()

    def complete(self) -> None:
        """Returns once all blocks are on the disk, for all ranks to read."""
        self._world.first(self.sync)
        if self._files is None:
            self._open(list(self._layout.places))

    def _read(self, name: str) -> Tensor:
        assert self._files is not None, "other ranks read once all blocks are kept"
        return self._files.read(name).to(self._model.device)


def held_layout(
    model: CausalModel, held: Sequence[Held]
) -> tuple[ShardLayout, tuple[tuple[str, ...], ...]]:
    """The one file of held blocks, and the names of its tensors by block."""
    found = [list(_infos(model, index, weights)) for index, weights in enumerate(held)]
    layout = plan_shards([info for infos in found for info in infos], 1 << 62, stem="held")
    return layout, tuple(tuple(info.name for info in infos) for infos in found)


def _infos(model: CausalModel, index: int, held: Held) -> Iterator[TensorInfo]:
    for name, (ref, scheme) in held.items():
        rows, columns = ref.shape
        groups = (rows, columns // (scheme.group_size or columns))
        yield TensorInfo(name=f"{name}:codes", dtype=torch.uint8, shape=ref.shape)
        yield TensorInfo(name=f"{name}:scale", dtype=torch.float32, shape=groups)
        if not scheme.symmetric:
            yield TensorInfo(name=f"{name}:zero", dtype=torch.uint8, shape=groups)
    for path, value in _others(model.empty_block(index), held).items():
        yield TensorInfo(name=f"{index}:{path}", dtype=value.dtype, shape=tuple(value.shape))


def _others(block: nn.Module, held: Held) -> dict[str, Tensor]:
    """Parameters and stored buffers that held weights do not fill, by their paths."""
    filled: dict[str, int] = {}
    for ref, _ in held.values():
        filled[ref.parameter] = filled.get(ref.parameter, 0) + ref.shape[0] * ref.shape[1]
    # A block that is loaded no longer shares what an empty one does: all paths, in both.
    every = block.state_dict()
    return {path: value for path, value in every.items() if filled.get(path, 0) < value.numel()}
