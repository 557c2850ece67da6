"""Triton kernels of `quantkit::fp8a8`: round each token to e4m3, then multiply 8-bit floats.

M rows of x, K columns (K' in the weight, padded with zeros).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.gpu import w8a8 as w8a8_triton
from quantkit_kernels.gpu.launch import Launcher
from quantkit_kernels.gpu.tuning import Tile

# Rows of x from which on cuBLAS is the faster one (kernels/bench/results/gpu_h200.json).
LIBRARY_ROWS = 65
_LARGEST = tl.constexpr(448.0)
# Adding and taking away 1.5 · 2^14 rounds a float32 to multiples of 2^-9, ties to even.
_ROUND = tl.constexpr(24576.0)


@triton.jit
def quantize_kernel(x, numbers, scale, K, K_PAD, stride_x, BLOCK: tl.constexpr):
    """numbers [M, K'] e4m3 and scale [M] of one row of x: absmax / 448."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    step = w8a8_triton.token_scale(x + row * stride_x, K, _LARGEST, BLOCK)
    tl.store(scale + row, step)
    for start in tl.range(0, K_PAD, BLOCK):
        inside = start + columns < K
        part = tl.load(x + row * stride_x + start + columns, mask=inside, other=0.0)
        value = tl.minimum(tl.maximum(part.to(tl.float32) / step, -_LARGEST), _LARGEST)
        place = numbers + row * K_PAD + start + columns
        tl.store(place, round_e4m3(value).to(tl.float8e4nv), mask=start + columns < K_PAD)


@triton.jit
def round_e4m3(value):
    """The nearest e4m3 number, ties to even, in float32: what is cast to e4m3 is exact."""
    bits = value.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576
    normal = bits.to(tl.float32, bitcast=True)
    # Below 2^-6 the numbers are 2^-9 apart.
    return tl.where(tl.abs(value) < 0.015625, (value + _ROUND) - _ROUND, normal)


_QUANTIZE = Launcher(quantize_kernel)


def quantize(x_MK: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    """Numbers float8_e4m3fn [M, padded], zeros behind K, and scales float32 [M]."""
    rows, columns = x_MK.shape
    numbers = torch.empty(rows, padded, dtype=torch.float8_e4m3fn, device=x_MK.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x_MK.device)
    block = min(4096, triton.next_power_of_2(padded))
    sizes = (columns, padded, x_MK.stride(0))
    _QUANTIZE((rows, 1, 1), (x_MK, numbers, scale), (), sizes, (block,), warps=8)
    return numbers, scale


def matmul(
    x_MK: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, tile: Tile
) -> Tensor:
    """[M, N] in the dtype of x; `weight` are codes int8, rows of x are contiguous, M > 0."""
    numbers, x_scale = quantize(x_MK, weight.shape[1])
    out = torch.empty(x_MK.shape[0], out_features, dtype=x_MK.dtype, device=x_MK.device)
    w8a8_triton.multiply(numbers, x_scale, weight.view(torch.float8_e4m3fn), scale, bias, out, tile)
    return out


def library_fits(x_MK: Tensor, out_features: int) -> bool:
    """Whether cuBLAS has the product, scaled by row and by column, and is the faster one."""
    return (
        x_MK.shape[0] >= LIBRARY_ROWS
        and x_MK.dtype == torch.bfloat16
        and out_features % 16 == 0
        and torch.cuda.get_device_capability(x_MK.device) >= (9, 0)
    )


def library_matmul(
    x_MK: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """`matmul` by cuBLAS, whose sums leave the tensor cores' few bits as ours do."""
    numbers, x_scale = quantize(x_MK, weight.shape[1])
    out: Tensor = torch._scaled_mm(
        numbers,
        weight[:out_features].view(torch.float8_e4m3fn).t(),
        scale_a=x_scale[:, None],
        scale_b=scale[None, :out_features],
        bias=None if bias is None else bias.to(x_MK.dtype),
        out_dtype=x_MK.dtype,
        use_fast_accum=False,
    )
    return out
