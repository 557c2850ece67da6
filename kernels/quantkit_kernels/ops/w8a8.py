"""quantkit::w8a8: 8-bit integer weights per row, activations quantized per token on the way in.

M rows of x, N rows of the weight, K columns.  out = (codes of x · codes) · scale of x · scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.cpu import isa
from quantkit_kernels.ops import layout
from quantkit_kernels.ops.device import Device, needs_triton
from quantkit_kernels.ops.product import Product
from quantkit_kernels.ops.rows import flat_rows

# 127 · 127 · 1024 < 2^24: sums of that many products are exact in float32, in any order.
_EXACT_COLUMNS = 1024
# Float32 weights decoded at a time: the fastest of 2^17 to 2^21 on two cores.
_TILE_ELEMENTS = 1 << 19
# Rows of x up to which aten's weight-only kernel is fastest; it rounds once more, to bfloat16.
FEW_ROWS = {"avx512": 16, "avx2": 48, "default": 4}


def supported(*, dtype: torch.dtype, device: Device) -> str | None:
    """Why activations of this dtype cannot run here, or None if they can."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{dtype} activations: bfloat16, float16 or float32"
    return needs_triton() if device == "triton" else None


def pack(codes_NK: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [N', K'], float32 [N']) of codes uint8 [N, K] whose zero is 128; primes are padded.

    The layout serves both devices: K' is a multiple of 32, as aten and 16-byte loads want it.
    """
    rows, columns = codes_NK.shape
    signed = codes_NK.new_zeros(layout.up(rows, 4), layout.up(columns, 32), dtype=torch.int8)
    signed[:rows, :columns] = (codes_NK ^ 0x80).view(torch.int8)
    scale = scale_N.new_zeros(signed.shape[0], dtype=torch.float32)
    scale[:rows] = scale_N
    return signed, scale


def unpack(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """Codes uint8 [N, K], the inverse of `pack`."""
    return weight[: shape[0], : shape[1]].contiguous().view(torch.uint8) ^ 0x80


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] in -127..127 and scales float32 [M, 1]: absmax / 127, ties to even."""
    x = x_MK.to(torch.float32)
    scale = x.abs().amax(dim=-1, keepdim=True) / 127.0
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.round(x / scale).clamp_(-127, 127).to(torch.int8), scale


def dequantize(weight: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight [N, K] from the layout of `pack`: float32 arithmetic, rounded once."""
    rows, columns = shape
    return (weight[:rows, :columns].to(torch.float32) * scale[:rows, None]).to(dtype)


def reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """The op in plain PyTorch: integer products in float64, which holds them exactly."""
    x_MK, out_shape = flat_rows(x, out_features, columns=weight.shape[1])
    codes, x_scale = quantize_rows(x_MK)
    out = (codes.to(torch.float64) @ weight.to(torch.float64).t()).to(torch.float32)
    out = (out * x_scale * scale)[:, :out_features]
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(x.dtype).contiguous().view(out_shape)


def integer_product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """Exact float32 or int32 [M, N] of int8 matrices, by the fastest exact way on this CPU."""
    if isa.fast_int8():
        product: Tensor = torch._int_mm(x_MK, weight_NK.t())
        return product
    x = x_MK.to(torch.float32)
    rows, columns = weight_NK.shape
    # Sums over blocks of columns are exact in float32; adding up to 128 of them is in float64.
    out = torch.zeros(x.shape[0], rows, dtype=torch.float64)
    step = max(1, _TILE_ELEMENTS // min(columns, _EXACT_COLUMNS))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        for first in range(0, columns, _EXACT_COLUMNS):
            chunk = slice(first, first + _EXACT_COLUMNS)
            out[:, part] += x[:, chunk] @ weight_NK[part, chunk].to(torch.float32).t()
    return out


def _cpu(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    x_MK, out_shape = flat_rows(x, out_features, columns=weight.shape[1])
    rows = x_MK.shape[0]
    if rows == 0:
        return x.new_empty(out_shape)
    codes, x_scale = quantize_rows(x_MK)
    if rows <= FEW_ROWS[isa.level()] and x.dtype != torch.float32:
        # bfloat16 holds the codes of x exactly.
        one = torch.ones(weight.shape[0], dtype=torch.bfloat16)
        product: Tensor = torch.ops.aten._weight_int8pack_mm(codes.to(torch.bfloat16), weight, one)
    else:
        product = integer_product(codes, weight)
    out = (product.to(torch.float32) * x_scale * scale)[:, :out_features]
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(x.dtype).contiguous().view(out_shape)


def _cuda(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    from quantkit_kernels.gpu import tuning
    from quantkit_kernels.gpu import w8a8 as w8a8_triton

    x_MK, out_shape = flat_rows(x, out_features)
    if x_MK.shape[0] == 0:
        return x.new_empty(out_shape)
    tile = tuning.choose_eight(
        tuning.problem_of("w8a8", x.dtype, 0, out_features, x_MK.shape[1], x_MK.shape[0]),
        x.device.index,
    )
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device(x.device):
        out = w8a8_triton.matmul(x_MK, weight, scale, bias, out_features, tile)
    return out.view(out_shape)


def _columns(weight: Tensor, *rest: object) -> tuple[int, int]:
    return weight.shape[1], 32


product = Product(
    "w8a8",
    tensors="Tensor weight, Tensor scale",
    numbers="",
    columns=_columns,
    dequantize=dequantize,
    cpu=_cpu,
    cuda=_cuda,
)
