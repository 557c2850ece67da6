"""quantkit::w8a16: 8-bit symmetric integer weights per row or in groups, 16-bit activations.

`packed` depends on the device, see `Packed`.  M rows of x, N rows of the weight, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.cpu import isa
from quantkit_kernels.cpu.tiled import tiled_linear
from quantkit_kernels.gpu.weight import Weight
from quantkit_kernels.ops import layout, weight_only
from quantkit_kernels.ops.device import Device
from quantkit_kernels.ops.product import Product
from quantkit_kernels.ops.rows import flat_rows

# Rows of x up to which aten's kernel, which converts weights every four rows, beats converting
# once; see int4pack.FEW_ROWS.
FEW_ROWS = {"avx512": 32, "avx2": 48, "default": 4}
# The overload itself: looking it up by the arguments takes as long as the call.
_multiply = torch.ops.aten._weight_int8pack_mm.default


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight in the layout of one device; group_size 0 means one scale per row.

    triton: `packed` qk8 int32 [K'/128, N', 32]; `scale` [G', N'].
    cpu: `packed` int8 [N', K'], scale bfloat16 [N'] per row, float32 [N, G] in groups.
    Primes are sizes padded to whole tiles.
    """

    packed: Tensor
    scale: Tensor
    group_size: int


def supported(
    *, symmetric: bool, group_size: int | None, dtype: torch.dtype, device: Device
) -> str | None:
    """Why a weight cannot run here, or None if it can; group_size None is a whole row."""
    if not symmetric:
        return "8-bit weights with zero points have no kernel"
    if reason := weight_only.unsupported(dtype, device):
        return reason
    return weight_only.unsupported_group(group_size) if device == "triton" else None


def pack(codes_NK: Tensor, scale_NG: Tensor, group_size: int | None, device: Device) -> Packed:
    """A supported weight of codes uint8 [N, K], whose zero is 128, in the layout of `device`."""
    group = group_size or 0
    signed = (codes_NK ^ 0x80).view(torch.int8)
    rows, columns = signed.shape
    if device == "triton":
        scale = layout.pad_groups(weight_only.kernel_scale(scale_NG, group_size), columns, group)
        return Packed(packed=layout.pack_qk8(signed), scale=scale, group_size=group)
    if group:
        return Packed(packed=signed, scale=scale_NG.to(torch.float32), group_size=group)
    # aten reads whole vectors of 16 columns, and has no loop for what is left over.
    packed = signed.new_zeros(layout.up(rows, 4), layout.up(columns, 32))
    packed[:rows, :columns] = signed
    scale = scale_NG.new_zeros(packed.shape[0], dtype=torch.bfloat16)
    scale[:rows] = scale_NG.view(-1)
    return Packed(packed=packed, scale=scale, group_size=0)


def unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Codes uint8 [N, K], the inverse of `pack` on both devices."""
    if packed.dtype == torch.int32:
        signed = layout.unpack_qk8(packed, *shape)
    else:
        signed = packed[: shape[0], : shape[1]].contiguous()
    return signed.view(torch.uint8) ^ 0x80


def dequantize(
    packed: Tensor, scale: Tensor, group_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] from the layouts of `pack`: float32 arithmetic, rounded once."""
    rows, columns = shape
    signed = (unpack(packed, shape) ^ 0x80).view(torch.int8)
    scale_NG = scale.t() if packed.dtype == torch.int32 else scale.view(scale.shape[0], -1)
    index = torch.arange(columns, device=packed.device) // (group_size or columns)
    return (signed.to(torch.float32) * scale_NG.to(torch.float32)[:rows, index]).to(dtype)


def reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    """The op in plain PyTorch: the decoded weight times x, in the dtype of x."""
    weight = dequantize(packed, scale, group_size, (out_features, x.shape[-1]), x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _cpu(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    if packed.dtype != torch.int8:
        return reference(x, packed, scale, bias, group_size, out_features)
    x_MK, out_shape = flat_rows(x, out_features, columns=packed.shape[1])
    few = 0 < x_MK.shape[0] <= FEW_ROWS[isa.level()] and x.dtype != torch.float32
    if few and not group_size:
        short = x_MK.to(torch.bfloat16).contiguous()
        out = _multiply(short, packed, scale)[:, :out_features]
        if bias is not None:
            out = out.to(torch.float32) + bias.to(torch.float32)
        result: Tensor = out.to(x.dtype).contiguous().view(out_shape)
        return result

    x_MK = x_MK[:, : x.shape[-1]]

    def decode(rows: slice) -> Tensor:
        weight = packed[rows, : x.shape[-1]].to(torch.float32)
        if not group_size:
            return weight
        grouped = weight.view(len(weight), -1, group_size)
        return grouped.mul_(scale[rows, :, None]).view(weight.shape)

    row_scale = None if group_size else scale[:out_features]
    return tiled_linear(x_MK, out_features, bias, decode, row_scale).view(out_shape)


def _cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    return weight_only.run_triton(
        "w8a16", x, _weight(packed, scale, group_size), bias, out_features
    )


def _weight(packed: Tensor, scale: Tensor, group_size: int) -> Weight:
    return Weight("int8", packed, scale, None, group_size)


def _columns(packed: Tensor, *rest: Any) -> tuple[int, int]:
    if packed.dtype == torch.int8:
        return packed.shape[1], 1 if rest[-2] else 32
    return layout.COLUMNS * packed.shape[0], layout.COLUMNS


product = Product(
    "w8a16",
    tensors="Tensor packed, Tensor scale",
    numbers="int group_size",
    columns=_columns,
    dequantize=dequantize,
    dequantize_cuda=weight_only.decoder(_weight),
    cpu=_cpu,
    cuda=_cuda,
)
