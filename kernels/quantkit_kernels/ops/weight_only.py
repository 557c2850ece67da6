"""What the weight-only ops share: when they can run, and how a product is dispatched on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit_kernels.gpu import tuning
from quantkit_kernels.ops.device import Device, needs_triton
from quantkit_kernels.ops.layout import COLUMNS
from quantkit_kernels.ops.rows import flat_rows

if TYPE_CHECKING:
    from quantkit_kernels.gpu.fused import Weight


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
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device(x.device):
        return _run(op, x, weight, bias, out_features)


def decoder(weight: Callable[..., Weight]) -> Callable[..., Tensor]:
    """What decodes on a GPU: the weight [N, K] of what `weight` is made of, (N, K) and a dtype."""

    def dequantize(*arguments: Any) -> Tensor:
        from quantkit_kernels.gpu import fused as fused_triton

        *parts, shape, dtype = arguments
        with torch.cuda.device(parts[0].device):
            return fused_triton.dequantize(weight(*parts), shape, dtype)

    return dequantize


def _run(op: str, x: Tensor, weight: Weight, bias: Tensor | None, out_features: int) -> Tensor:
    from quantkit_kernels.gpu import fused as fused_triton

    x_MK, out_shape = flat_rows(x, out_features)
    rows, columns = x_MK.shape
    if rows == 0:
        return x.new_empty(out_shape)
    tile = None
    if x.dtype in (torch.bfloat16, torch.float16):
        problem = tuning.Problem(
            op=op,
            dtype=str(x.dtype).removeprefix("torch."),
            group=weight.group,
            rows=out_features,
            columns=columns,
            tokens=rows,
        )
        tile = tuning.choose(problem, x.device.index)
    if tile is not None:
        return fused_triton.matmul(x_MK, weight, bias, out_features, tile).view(out_shape)
    decoded = fused_triton.dequantize(weight, (out_features, columns), x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x_MK, decoded, bias).view(out_shape)
