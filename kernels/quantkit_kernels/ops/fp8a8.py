"""quantkit::fp8a8: e4m3 weights per row, activations rounded to e4m3 per token on the way in.

M rows of x, N rows of the weight, K columns.  out = (numbers of x · numbers) · scale of x · scale,
the numbers summed in float32.  Codes are the bytes of torch.float8_e4m3fn, seen as int8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.cpu.tiled import tiled_linear, wide_dtype
from quantkit_kernels.ops import layout
from quantkit_kernels.ops.device import Device, needs_triton
from quantkit_kernels.ops.fp8a16 import decode
from quantkit_kernels.ops.product import Product
from quantkit_kernels.ops.rows import flat_rows

# The largest number of e4m3 (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433).
LARGEST = 448.0


def supported(*, dtype: torch.dtype, device: Device) -> str | None:
    """Why activations of this dtype cannot run here, or None if they can."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{dtype} activations: bfloat16, float16 or float32"
    if device == "cpu":
        return None
    if reason := needs_triton():
        return reason
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        found = ".".join(map(str, capability))
        return f"compute capability {found}: products of 8-bit floats need 8.9 or newer"
    return None


def pack(codes_NK: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [N', K'], float32 [N']) of codes uint8 [N, K]; primes are padded with zeros.

    The layout serves both devices: K' is a multiple of 32, as 16-byte loads want it.
    """
    rows, columns = codes_NK.shape
    weight = codes_NK.new_zeros(layout.up(rows, 4), layout.up(columns, 32))
    weight[:rows, :columns] = codes_NK
    scale = scale_N.new_zeros(weight.shape[0], dtype=torch.float32)
    scale[:rows] = scale_N
    return weight.view(torch.int8), scale


def unpack(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """Codes uint8 [N, K], the inverse of `pack`."""
    return weight.view(torch.uint8)[: shape[0], : shape[1]].clone()


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers float8_e4m3fn [M, K] and scales float32 [M, 1]: absmax / 448, ties to even."""
    x = x_MK.to(torch.float32)
    scale = x.abs().amax(dim=-1, keepdim=True) / LARGEST
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def dequantize(weight: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight [N, K] from the layout of `pack`: float32 arithmetic, rounded once."""
    rows, columns = shape
    return decode(weight[:rows, :columns]).mul_(scale[:rows, None]).to(dtype)


def reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """The op in plain PyTorch, summed in float64."""
    x_MK, out_shape = flat_rows(x, out_features, columns=weight.shape[1])
    numbers, x_scale = quantize_rows(x_MK)
    out = numbers.to(torch.float64) @ weight.view(torch.float8_e4m3fn).to(torch.float64).t()
    out = (out * x_scale * scale)[:, :out_features]
    if bias is not None:
        out = out + bias
    return out.to(x.dtype).contiguous().view(out_shape)


def _cpu(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    x_MK, out_shape = flat_rows(x, out_features, columns=weight.shape[1])
    if x_MK.shape[0] == 0:
        return x.new_empty(out_shape)
    numbers, x_scale = quantize_rows(x_MK)
    # bfloat16 holds e4m3 numbers exactly: only sums are rounded, to what the result will have.
    out = tiled_linear(
        decode(numbers.view(torch.int8)).to(wide_dtype(x.dtype)),
        out_features,
        None,
        lambda rows: decode(weight[rows]),
    )
    out = out.to(torch.float32) * x_scale * scale[:out_features]
    if bias is not None:
        out += bias.to(torch.float32)
    return out.to(x.dtype).view(out_shape)


def _cuda(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    from quantkit_kernels.gpu import fp8 as fp8_triton
    from quantkit_kernels.gpu import tuning

    x_MK, out_shape = flat_rows(x, out_features)
    if x_MK.shape[0] == 0:
        return x.new_empty(out_shape)
    if fp8_triton.library_fits(x_MK, out_features):
        with torch.cuda.device(x.device):
            out = fp8_triton.library_matmul(x_MK, weight, scale, bias, out_features)
        return out.view(out_shape)
    problem = tuning.problem_of("fp8a8", x.dtype, 0, out_features, x_MK.shape[1], x_MK.shape[0])
    tile = tuning.choose_eight(problem, x.device.index)
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device(x.device):
        out = fp8_triton.matmul(x_MK, weight, scale, bias, out_features, tile)
    return out.view(out_shape)


def _columns(weight: Tensor, *rest: object) -> tuple[int, int]:
    return weight.shape[1], 32


product = Product(
    "fp8a8",
    tensors="Tensor weight, Tensor scale",
    numbers="",
    columns=_columns,
    dequantize=dequantize,
    cpu=_cpu,
    cuda=_cuda,
)
