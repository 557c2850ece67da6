"""Quantized layers: what a quantized checkpoint runs on, on any device.

Shapes: T tokens, O out features, I in features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantkit.inference.backend import Backend, WeightKernel, choose_kernel, moved
from quantkit.inference.experts import PackedExperts
from quantkit.inference.reference import int8_matmul
from quantkit.inference.slices import SlicedWeight
from quantkit.model.experts import run_experts, run_sorted_experts, uses_interface
from quantkit.numbers.activations import fake_quantize_activation, quantize_activation
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import QuantizedTensor

__all__ = [
    "QuantExperts",
    "QuantLinear",
    "fake_quantize_activation",
    "int8_matmul",
    "quantize_activation",
]


class QuantLinear(nn.Module):
    """A linear layer on quantized numbers; replaces nn.Linear and, with [O, I] codes, Conv1D.

    `kernel` holds the weight in the layout of the backend and multiplies; `fallback` says why it is
    not the kernel that the backend is for, usually because only the reference takes the weight.
    Casting the module (`.half()`, `.to(dtype)`) casts the bias alone; moving it to another kind of
    device repacks the weight.
    """

    kernel: WeightKernel
    bias: nn.Parameter | None

    def __init__(
        self,
        tensor: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        backend: Backend = "reference",
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` is what activations will have; default: the weight's before quantization."""
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.scheme: Scheme = tensor.scheme
        self.backend: Backend = backend
        self.activation_dtype = dtype or tensor.dtype
        self._set_kernel(tensor)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device of the decoded weight, for who asks for those; all NaN.

        Takes no memory.  `quantized_tensor.dequantize()` has the numbers.
        """
        device = next(cast(nn.Module, self.kernel).buffers()).device
        nothing = torch.full((), torch.nan, dtype=self.activation_dtype, device=device)
        return nothing.expand(self.out_features, self.in_features)

    @property
    def quantized_tensor(self) -> QuantizedTensor:
        """The tensor this layer was made of, bit for bit; unpacks the codes into fresh memory."""
        return self.kernel.quantized_tensor

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O] in the dtype of x."""
        return self.kernel(x, self.bias)

    def extra_repr(self) -> str:
        """Shapes, scheme and kernel, as nn.Linear prints them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme.name}, kernel={self.kernel.name}"
        )

    def _set_kernel(self, tensor: QuantizedTensor) -> None:
        chosen = choose_kernel(tensor, self.backend, self.activation_dtype)
        self.kernel = chosen.kernel
        self.fallback = chosen.reason

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        module = cast(nn.Module, self.kernel)
        here = next(module.buffers()).device
        there = fn(torch.empty(0, dtype=torch.uint8, device=here)).device
        if {here.type, there.type} == {"cpu", "cuda"}:
            # Layouts belong to a kind of device: go by way of the canonical tensor.
            self._set_kernel(moved(self.quantized_tensor, lambda part: part.to(there)))
        super()._apply(fn, recurse)
        return self


class QuantExperts(nn.Module):
    """A fused experts layer whose projections are quantized.

    `base` is transformers' experts module without the projections replaced here: it gives the gate
    function, biases and whatever stays fused.  A projection is either packed, all experts in one
    product, or `projections[name][expert]` are the linears that fill that expert's rows of the
    fused parameter, in order (gate, then up).  All packed: no loop over experts, no shape that
    depends on the routing.  A base outside of transformers' ExpertsInterface runs its own code, on
    a `SlicedWeight` in the place of each projection.
    """

    def __init__(
        self,
        base: nn.Module,
        projections: Mapping[str, Sequence[Sequence[nn.Module]] | PackedExperts],
    ) -> None:
        super().__init__()
        shapes = {name: base.get_parameter(name).shape for name in projections}
        for name in projections:
            base.register_parameter(name, None)
        self.base = base
        self.projections = nn.ModuleDict(
            {
                name: experts
                if isinstance(experts, PackedExperts)
                else nn.ModuleList(nn.ModuleList(pieces) for pieces in experts)
                for name, experts in projections.items()
            }
        )
        packed = [part for part in self.projections.values() if isinstance(part, PackedExperts)]
        self.sorted = len(packed) == 2
        self.own_code = not uses_interface(base)
        if self.own_code:
            for name, shape in shapes.items():
                slices = [self.linears(name, number) for number in range(shape[0])]
                base.__dict__[name] = SlicedWeight(slices, shape)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the base's forward gives: by the interface [T, H], see `run_experts`."""
        if self.own_code:
            own: Tensor = self.base(*args, **kwargs)
            return own
        return self._routed(*args, **kwargs)

    def _routed(self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if self.sorted:
            return run_sorted_experts(
                self.base, hidden_TH, index_TK, weight_TK, self._project_sorted
            )
        return run_experts(self.base, hidden_TH, index_TK, weight_TK, self._project)

    def linears(self, name: str, expert: int) -> Sequence[nn.Module]:
        """The QuantLinear or nn.Linear pieces of one expert's projection; copies of packed ones."""
        experts = self.projections[name]
        if isinstance(experts, PackedExperts):
            count = len(experts.pieces)
            return [QuantLinear(experts.tensor(expert, piece)) for piece in range(count)]
        assert isinstance(experts, nn.ModuleList)
        pieces = experts[expert]
        assert isinstance(pieces, nn.ModuleList)
        return list(pieces)

    def _project_sorted(
        self, name: str, x: Tensor, source_S: Tensor, expert_S: Tensor, offsets: Tensor
    ) -> Tensor:
        out: Tensor = self.projections[name](x, source_S, offsets)
        if not getattr(self.base, "has_bias", False):
            return out
        bias_EO = self.base.get_parameter(f"{name}_bias")
        return out + bias_EO[expert_S.clamp(0, len(bias_EO) - 1)]

    def _project(self, name: str, expert: int, x_nI: Tensor) -> Tensor:
        biased = getattr(self.base, "has_bias", False)
        bias = self.base.get_parameter(f"{name}_bias")[expert] if biased else None
        if name not in self.projections:
            weight = self.base.get_parameter(name)[expert]
            transposed = getattr(self.base, "is_transposed", False)
            return nn.functional.linear(x_nI, weight.t() if transposed else weight, bias)
        parts = [linear(x_nI) for linear in self.linears(name, expert)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return out if bias is None else out + bias


class RowParts(nn.Module):
    """A linear layer of several weights, one above the other, as the checkpoint has them."""

    bias: nn.Parameter | None

    def __init__(self, parts: Sequence[nn.Module], bias: Tensor | None) -> None:
        """`parts` are layers without bias, [O_k, I] each; the bias is that of all rows."""
        super().__init__()
        self.parts = nn.ModuleList(parts)
        kept = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", kept)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O], the parts' products side by side."""
        y = torch.cat([part(x) for part in self.parts], dim=-1)
        return y if self.bias is None else y + self.bias
