"""Blocks as they were quantized, on the disk until they are healed: codes, scales, and the rest.

Letters: O out features, I in features, G groups per row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.shards import ShardLayout, ShardWriter, plan_shards
from quantkit.model.causal import CausalModel
from quantkit.model.refs import WeightRef
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

# The weights of a block whose scales are trained, each with its scheme.
Held = Mapping[str, tuple[WeightRef, Scheme]]


class HeldBlocks:
    """Integer weights as codes, scales and zeros; parameters that hold none of them as they are."""

    def __init__(
        self,
        model: CausalModel,
        held: Sequence[Held],
        directory: Path,
        *,
        done: Collection[int],
        stack: contextlib.ExitStack,
    ) -> None:
        """held: by block; done: blocks that an interrupted run kept."""
        self._model, self._held = model, held
        layout, names = held_layout(model, held)
        self._names = names
        committed = [name for index in done for name in names[index]]
        directory.mkdir(parents=True, exist_ok=True)
        self._files = stack.enter_context(ShardWriter(directory, layout, committed=committed))

    def keep(self, index: int, block: nn.Module, tensors: Mapping[str, QuantizedTensor]) -> None:
        """Stores a block; `tensors` by the names of its held weights."""
        for name, tensor in tensors.items():
            self._files.put(f"{name}:codes", tensor.codes)
            self._files.put(f"{name}:scale", tensor.scale.values())
            if tensor.zero is not None:
                self._files.put(f"{name}:zero", tensor.zero)
        for path in _others(block, self._held[index]):
            self._files.put(f"{index}:{path}", block.get_parameter(path))

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
        """The block as it computed once it was quantized, but for its held weights."""
        block = self._model.load_block(index)
        with torch.no_grad():
            for path in _others(block, self._held[index]):
                block.get_parameter(path).copy_(self._read(f"{index}:{path}"))
        return block

    def sync(self) -> None:
        """Returns once everything kept so far is on the disk."""
        self._files.sync()

    def _read(self, name: str) -> Tensor:
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
    block = model.empty_block(index)
    for path in _others(block, held):
        value = block.get_parameter(path)
        yield TensorInfo(name=f"{index}:{path}", dtype=value.dtype, shape=tuple(value.shape))


def _others(block: nn.Module, held: Held) -> list[str]:
    """Paths of the parameters that held weights do not fill."""
    filled: dict[str, int] = {}
    for ref, _ in held.values():
        filled[ref.parameter] = filled.get(ref.parameter, 0) + ref.shape[0] * ref.shape[1]
    # A block that is loaded no longer shares what an empty one does: all paths, in both.
    every = block.named_parameters(remove_duplicate=False)
    return [path for path, value in every if filled.get(path, 0) < value.numel()]
