"""Weights and checkpoints in memory for the tests of on-disk formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.safetensors import TensorInfo, tensor_bytes
from quantkit.errors import CheckpointError
from quantkit.formats.format import Format, PlannedWeight
from quantkit.methods.extent import pooled
from quantkit.numbers.grid import float_scale, store_scale
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import (
    DividedScale,
    NestedScale,
    PlainScale,
    QuantizedTensor,
    Scale,
)


@dataclass(frozen=True, kw_only=True)
class MemorySource:
    """A checkpoint held in memory."""

    config: dict[str, Any]
    tensors: Mapping[str, Tensor]

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.tensors))

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{name}: there is no such tensor")
        tensor = self.tensors[name]
        return TensorInfo(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))

    def read(self, name: str) -> Tensor:
        return self.tensors[name].clone()

    def read_bytes(self, name: str) -> bytes:
        return bytes(tensor_bytes(self.tensors[name].contiguous()))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop].clone()


def planned(
    name: str, shape: tuple[int, int], scheme: Scheme | str | None, **options: Any
) -> PlannedWeight:
    """A weight whose module has its name unless `options` say otherwise."""
    parsed = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    values = {"module": name.removesuffix(".weight"), **options}
    return PlannedWeight(name=name, shape=shape, scheme=parsed, **values)


def integers(
    scheme: str, codes: Tensor, zero: Tensor | None = None, scale: float = 0.5
) -> QuantizedTensor:
    """A float32 weight of these codes, zeros and one scale."""
    parsed = Scheme.parse(scheme)
    groups = codes.shape[1] // (parsed.group_size or codes.shape[1])
    return QuantizedTensor(
        codes=codes.to(torch.uint8),
        scale=PlainScale(tensor=torch.full((codes.shape[0], groups), scale)),
        zero=None if zero is None else zero.to(torch.uint8),
        scheme=parsed,
        dtype=torch.float32,
    )


def hexes(tensor: Tensor) -> list[Any]:
    """int32 words as unsigned hexadecimal."""
    if tensor.ndim == 1:
        return [f"{word & 0xFFFFFFFF:x}" for word in tensor.tolist()]
    return [hexes(row) for row in tensor]


def quantized(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> QuantizedTensor:
    """A random weight of the scheme: every code, zero and a scale of many sizes occurs."""
    generator = torch.Generator().manual_seed(seed)
    lowest = 1 if scheme.activation_bits == 8 and scheme.kind == "int" else 0

    def whole(low: int, high: int, size: Sequence[int]) -> Tensor:
        return torch.randint(low, high, tuple(size), generator=generator, dtype=torch.uint8)

    codes = whole(lowest, 2**scheme.bits, shape)
    if scheme.kind in ("fp8", "mxfp8"):
        codes[(codes & 0x7F) == 0x7F] = 0  # the two NaNs
    groups = scheme.num_groups(shape)
    straddles = scheme.flat and shape[1] % (scheme.group_size or 1) != 0
    size = (groups,) if straddles else (shape[0], groups // shape[0])
    scale: Scale
    if scheme.double_quant:
        scale = NestedScale(
            codes=whole(0, 256, (groups,)),
            table=torch.linspace(-1, 1, 256),
            absmax=torch.rand(-(-groups // 256), generator=generator),
            offset=torch.tensor(0.0123456789),
            shape=size,
        )
    else:
        values = torch.exp2(torch.rand(size, generator=generator) * 12 - 9)
        scale = sample_scale(values, scheme)
    return QuantizedTensor(
        codes=codes,
        scale=scale,
        zero=None if scheme.symmetric else whole(1, 2**scheme.bits, size),
        scheme=scheme,
        dtype=dtype,
        input_scale=torch.tensor(0.25) if scheme.static_input else None,
    )


def sample_scale(values: Tensor, scheme: Scheme, *, half: bool = False) -> Scale:
    """Scales of about these sizes that the scheme has; `half`: that float16 holds too."""
    if scheme.kind == "nvfp4":
        # A power of two, as quantkit's are: layouts that store the reciprocal hold it exactly.
        return DividedScale.of(float_scale(6 * values, scheme), 32.0)
    if scheme.kind in ("mxfp4", "mxfp8"):
        return PlainScale(tensor=float_scale(values, scheme))
    if scheme.flat:
        return PlainScale(tensor=values)
    shared = pooled(store_scale(values, half=half), scheme, torch.amax).contiguous()
    return PlainScale(tensor=shared)


def stored(
    chosen: Format,
    weights: Sequence[PlannedWeight],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    others: Sequence[TensorInfo] = (),
) -> MemorySource:
    """The checkpoint that a format makes of packed tensors."""
    config = chosen.config(weights, model_type="llama", dtype=dtype, others=others)
    return MemorySource(
        config={
            "model_type": "llama",
            "dtype": str(dtype).removeprefix("torch."),
            "quantization_config": config,
        },
        tensors=tensors,
    )


def same(first: QuantizedTensor, second: QuantizedTensor) -> bool:
    """True if codes, scales, zeros, scheme and dtype agree exactly."""
    zeros = first.zero is None and second.zero is None
    if first.zero is not None and second.zero is not None:
        zeros = torch.equal(first.zero, second.zero)
    return (
        zeros
        and first.scheme == second.scheme
        and first.dtype == second.dtype
        and first.input_scale == second.input_scale
        and torch.equal(first.codes, second.codes)
        and first.scale.values().shape == second.scale.values().shape
        and torch.equal(first.scale.values(), second.scale.values())
    )
