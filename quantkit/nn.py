"""Quantized layers in plain PyTorch: what a quantized checkpoint runs on, on any device.

Shapes: T tokens, O out features, I in features, G groups per row, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from quantkit.activations import (
    fake_quantize_activation,
    float8_activation,
    quantize_activation,
)
from quantkit.experts import run_experts
from quantkit.scheme import Scheme
from quantkit.tensor import NestedScale, PlainScale, QuantizedTensor, Scale

__all__ = [
    "QuantExperts",
    "QuantLinear",
    "fake_quantize_activation",
    "int8_matmul",
    "quantize_activation",
]

# Weights decoded at a time: a head of 250,000 rows must not double the memory it saves.
_ROWS_ELEMENTS = 1 << 24
# 127 · 127 · 1024 < 2^24: sums of that many products are exact in float32, in any order.
_EXACT_COLUMNS = 1024
_SCALE_BUFFERS = ("scale", "scale_table", "scale_absmax", "scale_offset")


class QuantLinear(nn.Module):
    """A linear layer on quantized numbers; replaces nn.Linear and, with [O, I] codes, Conv1D.

    Weight-only schemes decode the weight to the input's dtype and multiply; w8a8 quantizes each
    token and multiplies integers exactly.  Codes of up to 4 bits are kept packed in bytes.  Casting
    the module (`.half()`, `.to(dtype)`) casts the bias alone: scales stay as stored.
    """

    codes: Tensor
    scale: Tensor
    scale_table: Tensor | None
    scale_absmax: Tensor | None
    scale_offset: Tensor | None
    zero: Tensor | None
    columns: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.scheme: Scheme = tensor.scheme
        self.weight_dtype: torch.dtype = tensor.dtype
        self._per_byte = _codes_per_byte(tensor.scheme.bits, self.in_features)
        self.register_buffer("codes", _pack(tensor.codes, self._per_byte))
        self._nested_shape: tuple[int, ...] | None = None
        self._nested_block = 0
        if isinstance(tensor.scale, NestedScale):
            self._nested_shape, self._nested_block = tensor.scale.shape, tensor.scale.block
            self.register_buffer("scale", tensor.scale.codes)
            self.register_buffer("scale_table", tensor.scale.table)
            self.register_buffer("scale_absmax", tensor.scale.absmax)
            self.register_buffer("scale_offset", tensor.scale.offset)
        else:
            self.register_buffer("scale", tensor.scale.tensor)
            for name in _SCALE_BUFFERS[1:]:
                self.register_buffer(name, None)
        self.register_buffer("zero", tensor.zero)
        self.register_buffer("columns", tensor.columns)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def quantized_tensor(self) -> QuantizedTensor:
        """The tensor this layer was made of, bit for bit; unpacks the codes into fresh memory."""
        return QuantizedTensor(
            codes=_unpack(self.codes, self._per_byte),
            scale=self._scale,
            zero=self.zero,
            scheme=self.scheme,
            dtype=self.weight_dtype,
            columns=self.columns,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O] in the dtype of x."""
        if self.scheme.activation_bits == 8:
            return self._forward_int8(x) if self.scheme.kind == "int" else self._forward_fp8(x)
        if self.columns is not None:
            # The weight stays in the order of its groups: the input follows it.
            x = x.index_select(-1, self.columns)
        values = self._scale.values()
        rows = self.out_features
        # Blocks that straddle rows are decoded whole: small, oddly shaped weights only.
        if values.ndim == 2 and self.in_features % values.shape[1] == 0:
            rows = max(1, _ROWS_ELEMENTS // self.in_features)
        parts = [
            self._linear_rows(x, values, slice(start, start + rows))
            for start in range(0, self.out_features, rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def extra_repr(self) -> str:
        """Shapes and scheme, as nn.Linear prints them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme.name}"
        )

    def _linear_rows(self, x: Tensor, values: Tensor, rows: slice) -> Tensor:
        part = QuantizedTensor(
            codes=_unpack(self.codes[rows], self._per_byte),
            scale=PlainScale(tensor=values[rows] if values.ndim == 2 else values),
            zero=None if self.zero is None else self.zero[rows],
            scheme=self.scheme,
            dtype=self.weight_dtype,
        )
        bias = None if self.bias is None else self.bias[rows].to(x.dtype)
        return nn.functional.linear(x, part.dequantize(x.dtype), bias)

    def _forward_int8(self, x: Tensor) -> Tensor:
        x_codes, x_scale = quantize_activation(x)
        product = int8_matmul(x_codes.reshape(-1, self.in_features), self.codes)
        out = product.to(torch.float32).view(*x.shape[:-1], self.out_features)
        out = out * x_scale * self._scale.values().view(-1)
        if self.bias is not None:
            out += self.bias.to(torch.float32)
        return out.to(x.dtype)

    def _forward_fp8(self, x: Tensor) -> Tensor:
        """Products of e4m3 numbers, summed in float32; scales and bias come last."""
        x_numbers, x_scale = float8_activation(x)
        numbers = x_numbers.to(torch.float32)
        rows = max(1, _ROWS_ELEMENTS // self.in_features)
        parts = [
            nn.functional.linear(
                numbers, self.codes[start : start + rows].view(torch.float8_e4m3fn).float()
            )
            for start in range(0, self.out_features, rows)
        ]
        out = torch.cat(parts, dim=-1).mul_(x_scale).mul_(self._scale.values().view(-1))
        if self.bias is not None:
            out += self.bias.to(torch.float32)
        return out.to(x.dtype)

    @property
    def _scale(self) -> Scale:
        if self._nested_shape is None:
            return PlainScale(tensor=self.scale)
        assert self.scale_table is not None
        assert self.scale_absmax is not None and self.scale_offset is not None
        return NestedScale(
            codes=self.scale,
            table=self.scale_table,
            absmax=self.scale_absmax,
            offset=self.scale_offset,
            shape=self._nested_shape,
            block=self._nested_block,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        before = {name: self._buffers[name] for name in _SCALE_BUFFERS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class QuantExperts(nn.Module):
    """A fused experts layer whose projections are quantized, one expert at a time.

    `base` is transformers' experts module without the projections replaced here: it gives the gate
    function, biases and whatever stays fused.  `projections[name][expert]` are the linears that
    fill that expert's rows of the fused parameter, in order (gate, then up).
    """

    def __init__(self, base: nn.Module, projections: Mapping[str, Sequence[Sequence[nn.Module]]]):
        super().__init__()
        for name in projections:
            base.register_parameter(name, None)
        self.base = base
        self.projections = nn.ModuleDict(
            {
                name: nn.ModuleList(nn.ModuleList(pieces) for pieces in experts)
                for name, experts in projections.items()
            }
        )

    def forward(self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Output [T, H], each expert on the tokens routed to it."""
        return run_experts(self.base, hidden_TH, index_TK, weight_TK, self._project)

    def linears(self, name: str, expert: int) -> Sequence[nn.Module]:
        """The QuantLinear or nn.Linear pieces of one expert's projection."""
        experts = self.projections[name]
        assert isinstance(experts, nn.ModuleList)
        pieces = experts[expert]
        assert isinstance(pieces, nn.ModuleList)
        return list(pieces)

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


def int8_matmul(x_TI: Tensor, codes_OI: Tensor) -> Tensor:
    """Exact int32 [T, O] of int8 activations [T, I] by uint8 codes [O, I] whose zero is 128.

    Multiplies in float32, where integer sums below 2^24 are exact: faster than torch._int_mm on
    CPUs without VNNI, and the same whatever the number of threads.  Temporaries are bounded.
    """
    tokens, columns = x_TI.shape
    rows = codes_OI.shape[0]
    out = torch.empty(tokens, rows, dtype=torch.int32, device=x_TI.device)
    step = max(1, _ROWS_ELEMENTS // columns)
    for start in range(0, rows, step):
        part = codes_OI[start : start + step]
        total = torch.zeros(tokens, len(part), dtype=torch.int32, device=x_TI.device)
        for first in range(0, columns, _EXACT_COLUMNS):
            chunk = slice(first, first + _EXACT_COLUMNS)
            weight = part[:, chunk].to(torch.float32).sub_(128)
            total += (x_TI[:, chunk].to(torch.float32) @ weight.t()).to(torch.int32)
        out[:, start : start + step] = total
    return out


def _codes_per_byte(bits: int, columns: int) -> int:
    """How many codes share a byte: a power of two that holds `bits` and divides the row."""
    per_byte = 4 if bits <= 2 else 2 if bits <= 4 else 1
    while columns % per_byte:
        per_byte //= 2
    return per_byte


def _pack(codes_OI: Tensor, per_byte: int) -> Tensor:
    """Bytes [O, I / per_byte]; the first code of a byte is in its lowest bits."""
    if per_byte == 1:
        return codes_OI
    width = 8 // per_byte
    packed = codes_OI[:, ::per_byte].clone()
    for position in range(1, per_byte):
        packed |= codes_OI[:, position::per_byte] << (position * width)
    return packed


def _unpack(packed: Tensor, per_byte: int) -> Tensor:
    """Codes uint8 [O, I], the inverse of `_pack`."""
    if per_byte == 1:
        return packed
    width = 8 // per_byte
    parts = [(packed >> (position * width)) & ((1 << width) - 1) for position in range(per_byte)]
    return torch.stack(parts, dim=-1).view(packed.shape[0], -1)
