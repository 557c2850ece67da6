"""What the weight-only ops share: when they can run, and how a product is dispatched on a GPU."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.gpu import tuning
from quantkit_kernels.gpu.weight import Weight
from quantkit_kernels.ops.device import Device, needs_triton
from quantkit_kernels.ops.layout import COLUMNS


def unsupported(dtype: torch.dtype, device: Device) -> str | None:
    """Why no weight-only kernel takes activations of this dtype on this device, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} activations: the kernels compute in 16 bits"
    return needs_triton() if device == "triton" else None


def unsupported_group(group_size: int | None) -> str | None:
    """Why the Triton kernels cannot take this group size, or None."""
    if group_size is not None and group_size not in (32, 64) and group_size % COLUMNS:
        return f"group size {group_size}: the kernel takes 32, 64, multiples of 128 or whole rows"
    return None


def kernel_scale(scale: Tensor, group_size: int | None) -> Tensor:
    """The scale as the Triton kernels load it: short where that is exact, and as fast.

    Groups of 64 and more have one scale in each row of a block.  It takes four bytes: cp.async
    moves no fewer, and what it cannot move stalls every block.
    """
    if group_size is not None and group_size >= 64:
        return scale.to(torch.float32)
    short = scale.to(torch.bfloat16)
    return short if torch.equal(short.to(torch.float32), scale.to(torch.float32)) else scale


def kernel_zero(zero: Tensor | None, group_size: int | None) -> Tensor | None:
    """The zero points as the Triton kernels load them: four bytes where the scales have four."""
    wide = zero is not None and group_size is not None and group_size >= 64
    return zero.to(torch.int32) if zero is not None and wide else zero


def run_triton(
    op: str, x: Tensor, weight: Weight, bias: Tensor | None, out_features: int
) -> Tensor:
    """x [..., K] times a weight on a GPU: fused for few rows, decoded first for many."""
    # Triton launches on the current device, which need not be that of x, but nearly always is.
    index = x.device.index
    if index is not None and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return run_triton(op, x, weight, bias, out_features)
    shape, dtype = x.shape, x.dtype
    columns = stride = shape[-1]
    if not x.is_contiguous():
        x = x.reshape(-1, columns)
        x = x if x.stride(-1) == 1 else x.contiguous()
        stride = x.stride(0)
    out = x.new_empty((*shape[:-1], out_features))
    rows = x.numel() // columns
    if rows == 0:
        return out
    tile = None
    if dtype in (torch.bfloat16, torch.float16):
        problem = tuning.problem_of(op, dtype, weight.group, out_features, columns, rows)
        tile = tuning.choose(problem, index)
    if tile is not None:
        fused().multiply(x, rows, columns, stride, weight, bias, out, out_features, tile)
        return out
    decoded = fused().dequantize(weight, (out_features, columns), dtype)
    bias = None if bias is None else bias.to(dtype)
    return torch.nn.functional.linear(x, decoded, bias).view(out.shape)


def decoder(weight: Callable[..., Weight]) -> Callable[..., Tensor]:
    """What decodes on a GPU: the weight [N, K] of what `weight` is made of, (N, K) and a dtype."""

    def dequantize(*arguments: Any) -> Tensor:
        *parts, shape, dtype = arguments
        with torch.cuda.device(parts[0].device):
            decoded: Tensor = fused().dequantize(weight(*parts), shape, dtype)
            return decoded

    return dequantize


@functools.cache
def fused() -> ModuleType:
    """quantkit_kernels.gpu.fused, which needs triton; cheaper in a call than an import."""
    return importlib.import_module("quantkit_kernels.gpu.fused")
