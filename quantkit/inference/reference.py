"""Quantized weights decoded in plain PyTorch: right on any device, fast on none.

Shapes: T tokens, O out features, I in features, G groups per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from quantkit.numbers.activations import (
    fake_quantize_activation,
    float8_activation,
    quantize_activation,
)
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.superblock import BlockScale
from quantkit.numbers.tensor import PlainScale, QuantizedTensor, Scale, tensors_of, with_tensors

# Weights decoded at a time: a head of 250,000 rows must not double the memory it saves.
_ROWS_ELEMENTS = 1 << 24
# 127 · 127 · 1024 < 2^24: sums of that many products are exact in float32, in any order.
_EXACT_COLUMNS = 1024


class StoredModule(nn.Module):
    """A module whose buffers keep their dtypes when a model is cast: they are stored numbers."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class StoredScale(StoredModule):
    """The scales of a weight as stored, whatever their kind."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        parts = tensors_of(scale)
        # The kind, and its numbers that are no tensors.
        self._form = with_tensors(scale, dict.fromkeys(parts))
        for name, part in parts.items():
            self.register_buffer(name, part)

    def get(self) -> Scale:
        """The scale this was made of, on the same memory."""
        return with_tensors(self._form, self._buffers)


class ReferenceKernel(StoredModule):
    """Weight-only schemes decode the weight to the input's dtype and multiply; w8a8 quantizes each
    token and multiplies integers exactly, fp8a8 per row e4m3 numbers; all others round the input
    and multiply both decoded in float32.  Codes of up to 4 bits are kept
    packed in bytes.
    """

    name = "reference"
    decodes_always = True
    codes: Tensor
    zero: Tensor | None
    columns: Tensor | None
    input_scale: Tensor | None

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.scheme: Scheme = tensor.scheme
        self.weight_dtype: torch.dtype = tensor.dtype
        self._per_byte = _codes_per_byte(tensor.scheme.bits, self.in_features)
        self.register_buffer("codes", _pack(tensor.codes, self._per_byte))
        self.scale = StoredScale(tensor.scale)
        self.register_buffer("zero", tensor.zero)
        self.register_buffer("columns", tensor.columns)
        self.register_buffer("input_scale", tensor.input_scale)

    @property
    def quantized_tensor(self) -> QuantizedTensor:
        """The tensor this was made of, bit for bit; unpacks the codes into fresh memory."""
        return QuantizedTensor(
            codes=_unpack(self.codes, self._per_byte),
            scale=self.scale.get(),
            zero=self.zero,
            scheme=self.scheme,
            dtype=self.weight_dtype,
            columns=self.columns,
            input_scale=self.input_scale,
        )

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I] -> [..., O] in the dtype of x."""
        values = self.scale.get().values()
        if self.scheme.activation_bits != 16:
            out = self._forward_rounded(x.detach(), values, None if bias is None else bias.detach())
            return out if not _wants_gradient(x, bias) else self._straight_through(out, x, bias)
        if self.columns is not None:
            # The weight stays in the order of its groups: the input follows it.
            x = x.index_select(-1, self.columns)
        return self._forward_decoded(x, values, bias)

    def _forward_rounded(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """The product of a scheme that rounds its input."""
        if self.scheme.centered:
            return self._forward_int8(x, values, bias)
        if self.scheme.name == "fp8a8_row":
            return self._forward_fp8(x, values, bias)
        # Both sides are exact in float32, where the products are summed; one rounding at last.
        rounded = fake_quantize_activation(x.float(), self.scheme, self.input_scale)
        return self._forward_decoded(rounded, values, bias).to(x.dtype)

    def _forward_decoded(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """x times the weight decoded to x's dtype, rows at a time."""
        rows = self.out_features
        # Blocks that straddle rows are decoded whole: small, oddly shaped weights only.
        if values.ndim == 2 and self.in_features % values.shape[1] == 0:
            rows = max(1, _ROWS_ELEMENTS // self.in_features)
        parts = [
            self._linear_rows(x, values, bias, slice(start, start + rows))
            for start in range(0, self.out_features, rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _linear_rows(self, x: Tensor, values: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        stored = self.scale.get()
        scale: Scale = PlainScale(tensor=values[rows] if values.ndim == 2 else values)
        part = QuantizedTensor(
            codes=_unpack(self.codes[rows], self._per_byte),
            scale=stored.rows(rows) if isinstance(stored, BlockScale) else scale,
            zero=None if self.zero is None else self.zero[rows],
            scheme=self.scheme,
            dtype=self.weight_dtype,
            input_scale=self.input_scale,
        )
        bias = None if bias is None else bias[rows].to(x.dtype)
        return nn.functional.linear(x, part.dequantize(x.dtype), bias)

    def _straight_through(self, out: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """`out` with the gradient of the plain product: rounding x has no slope to follow."""
        weight = self.quantized_tensor.dequantize(x.dtype)
        plain = nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return out + (plain - plain.detach())

    def _forward_int8(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        x_codes, x_scale = quantize_activation(x)
        product = int8_matmul(x_codes.reshape(-1, self.in_features), self.codes)
        out = product.to(torch.float32).view(*x.shape[:-1], self.out_features)
        out = out * x_scale * values.view(-1)
        if bias is not None:
            out += bias.to(torch.float32)
        return out.to(x.dtype)

    def _forward_fp8(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
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
        out = torch.cat(parts, dim=-1).mul_(x_scale).mul_(values.view(-1))
        if bias is not None:
            out += bias.to(torch.float32)
        return out.to(x.dtype)


def _wants_gradient(x: Tensor, bias: Tensor | None) -> bool:
    needed = x.requires_grad or (bias is not None and bias.requires_grad)
    return needed and torch.is_grad_enabled()


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
