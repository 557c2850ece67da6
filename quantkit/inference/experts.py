"""One projection of all experts of a layer, on `quantkit::w4a16_experts`, and back bit for bit.

Shapes: E experts, S sorted rows, O out features (all pieces), I in features, G groups per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from quantkit_kernels.ops import w4a16, w4a16_experts
from quantkit_kernels.ops.device import Device
from torch import Tensor

from quantkit.inference.backend import Backend, moved
from quantkit.inference.reference import StoredModule
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor


@dataclass(frozen=True, kw_only=True)
class _Expert:
    """One expert's weight as the kernel reads it, and its scales [O, G] as stored."""

    weight: w4a16.Packed
    scale: Tensor
    zero: Tensor | None
    pieces: tuple[int, ...]
    in_features: int
    scheme: Scheme
    dtype: torch.dtype


class PackedExperts(StoredModule):
    """The 4-bit weights of one projection; an expert's pieces (gate, then up) are its rows.

    Scales and zero points are kept as stored beside what the kernel reads.
    """

    packed: Tensor
    kernel_scale: Tensor
    kernel_zero: Tensor | None
    stored_scale: Tensor
    stored_zero: Tensor | None

    def __init__(self, experts: Sequence[_Expert]) -> None:
        super().__init__()
        self._fill(experts)

    @classmethod
    def of(cls, experts: Iterable[Sequence[QuantizedTensor]]) -> PackedExperts | None:
        """The projection of all experts, whose pieces come in order; None if they differ in kind.

        Asks for one expert after the other and keeps none; the first must be `supported`.
        """
        packed: list[_Expert] = []
        first: QuantizedTensor | None = None
        for tensors in experts:
            first = first or tensors[0]
            if not all(_alike(first, tensor) for tensor in tensors):
                return None
            packed.append(_pack(tensors))
        return cls(packed)

    @staticmethod
    def supported(tensor: QuantizedTensor, dtype: torch.dtype, backend: Backend) -> str | None:
        """Why experts with such weights run one after the other, or None."""
        kind = tensor.codes.device.type
        if backend in ("reference", "cpu-int8") or kind not in ("cpu", "cuda"):
            return f"backend {backend} runs one expert at a time"
        if tensor.scheme.kind != "int" or tensor.scheme.activation_bits != 16:
            return f"{tensor.scheme.name} has no kernel for many experts"
        if tensor.columns is not None or not isinstance(tensor.scale, PlainScale):
            return "activation order and nested scales have no kernel for many experts"
        return w4a16.supported(
            bits=tensor.scheme.bits,
            group_size=tensor.scheme.group_size,
            dtype=dtype,
            device=_device(tensor),
        )

    def forward(self, x: Tensor, source_S: Tensor, offsets: Tensor) -> Tensor:
        """[S, O]: row source[s] of x times the weight of the expert of row s; see the op."""
        out: Any = torch.ops.quantkit.w4a16_experts(
            x,
            source_S,
            offsets,
            self.packed,
            self.kernel_scale,
            self.kernel_zero,
            self.group_size,
            sum(self.pieces),
        )
        return out

    def tensor(self, expert: int, piece: int) -> QuantizedTensor:
        """The tensor a piece was made of, bit for bit, in fresh memory."""
        rows = slice(sum(self.pieces[:piece]), sum(self.pieces[: piece + 1]))
        codes = w4a16.unpack(self.packed[expert], (sum(self.pieces), self.in_features))
        zero = None if self.stored_zero is None else self.stored_zero[expert, rows].clone()
        return QuantizedTensor(
            codes=codes[rows].clone(),
            scale=PlainScale(tensor=self.stored_scale[expert, rows].clone()),
            zero=zero,
            scheme=self.scheme,
            dtype=self.weight_dtype,
        )

    def extra_repr(self) -> str:
        """Shapes and scheme, as torch prints them."""
        return (
            f"experts={len(self.packed)}, in_features={self.in_features}, "
            f"out_features={sum(self.pieces)}, scheme={self.scheme.name}"
        )

    def _fill(self, experts: Sequence[_Expert]) -> None:
        weight = w4a16_experts.stack(expert.weight for expert in experts)
        first = experts[0]
        zeros = [expert.zero for expert in experts if expert.zero is not None]
        self.pieces = first.pieces
        self.in_features = first.in_features
        self.scheme: Scheme = first.scheme
        self.weight_dtype = first.dtype
        self.group_size = weight.group_size
        self.register_buffer("packed", weight.packed)
        self.register_buffer("kernel_scale", weight.scale)
        self.register_buffer("kernel_zero", weight.zero)
        self.register_buffer("stored_scale", torch.stack([expert.scale for expert in experts]))
        self.register_buffer("stored_zero", torch.stack(zeros) if zeros else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        here = self.packed.device
        there = fn(torch.empty(0, dtype=torch.uint8, device=here)).device
        if {here.type, there.type} == {"cpu", "cuda"}:
            # Layouts belong to a kind of device: go by way of the canonical tensors.
            self._fill(
                [
                    _pack(
                        [
                            moved(self.tensor(expert, piece), lambda part: part.to(there))
                            for piece in range(len(self.pieces))
                        ]
                    )
                    for expert in range(len(self.packed))
                ]
            )
        return super()._apply(fn, recurse)


def _pack(tensors: Sequence[QuantizedTensor]) -> _Expert:
    first = tensors[0]
    scale = torch.cat([_scale(tensor) for tensor in tensors])
    zeros = [tensor.zero for tensor in tensors if tensor.zero is not None]
    zero = torch.cat(zeros) if zeros else None
    codes = torch.cat([tensor.codes for tensor in tensors])
    group_size = first.scheme.group_size
    return _Expert(
        weight=w4a16.pack(codes, scale.float(), zero, group_size, _device(first)),
        scale=scale,
        zero=zero,
        pieces=tuple(tensor.shape[0] for tensor in tensors),
        in_features=first.shape[1],
        scheme=first.scheme,
        dtype=first.dtype,
    )


def _alike(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    """Whether two weights can be pieces of the same projection."""
    return (
        isinstance(one.scale, PlainScale)
        and isinstance(other.scale, PlainScale)
        and one.scale.tensor.dtype == other.scale.tensor.dtype
        and one.columns is other.columns is None
        and (one.scheme, one.dtype, one.shape[1]) == (other.scheme, other.dtype, other.shape[1])
    )


def _scale(tensor: QuantizedTensor) -> Tensor:
    assert isinstance(tensor.scale, PlainScale)
    return tensor.scale.tensor


def _device(tensor: QuantizedTensor) -> Device:
    return "triton" if tensor.codes.device.type == "cuda" else "cpu"
