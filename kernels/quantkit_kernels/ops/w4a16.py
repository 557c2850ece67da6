"""quantkit::w4a16: 4-bit integer weights in groups, 16-bit activations.

`packed` and `scale` depend on the device, see `Packed`.  M rows of x, N rows of the weight, K
columns, G groups per row.  weight = (code - zero) · scale, zero 8 where none is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.cpu import int4pack
from quantkit_kernels.gpu.weight import Weight
from quantkit_kernels.ops import layout, weight_only
from quantkit_kernels.ops.device import Device
from quantkit_kernels.ops.product import Product
from quantkit_kernels.ops.rows import flat_rows


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight in the layout of one device; group_size 0 means one group per row.

    triton: `packed` qk4 int32 [K'/128, N', 16]; `scale` [G', N']; `zero` [G', N'] or None.
    cpu: `packed` uint8 [N', K'/2], aten's own; `scale` bfloat16 [G', N', 2]; `zero` is in it.
    Primes are sizes padded to whole tiles.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int


def supported(
    *, bits: int, group_size: int | None, dtype: torch.dtype, device: Device
) -> str | None:
    """Why a weight cannot run here, or None if it can; group_size None is a whole row."""
    if bits != 4:
        return f"{bits}-bit weights have no kernel"
    if reason := weight_only.unsupported(dtype, device):
        return reason
    if device == "triton":
        return weight_only.unsupported_group(group_size)
    if group_size is not None and group_size not in int4pack.GROUPS:
        return f"group size {group_size}: torch's CPU op takes 32, 64, 128, 256 or whole rows"
    return None


def pack(
    codes_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    group_size: int | None,
    device: Device,
    minimum_NG: Tensor | None = None,
) -> Packed:
    """A supported weight of codes uint8 [N, K] in the layout of `device`.

    With `minimum_NG` it is code · scale + minimum instead, on CPUs only.
    """
    columns = codes_NK.shape[1]
    if device == "triton":
        assert minimum_NG is None
        group = group_size or 0
        scale = weight_only.kernel_scale(scale_NG, group_size)
        zero = weight_only.kernel_zero(zero_NG, group_size)
        return Packed(
            packed=layout.pack_qk4(codes_NK),
            scale=layout.pad_groups(scale, columns, group),
            zero=None if zero is None else layout.pad_groups(zero, columns, group),
            group_size=group,
        )
    group = group_size or 32
    rows, wide = layout.up(codes_NK.shape[0], 64), layout.up(columns, group)
    codes = codes_NK.new_full((rows, wide), 8)
    codes[: codes_NK.shape[0], :columns] = codes_NK
    scales = int4pack.scales_and_offsets(scale_NG, zero_NG, minimum_NG)
    if group_size is None:
        scales = scales.expand(wide // group, -1, -1)
    padded = scales.new_zeros(wide // group, rows, 2)
    padded[:, : scales.shape[1]] = scales
    return Packed(packed=int4pack.pack(codes), scale=padded, zero=None, group_size=group)


def unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Codes uint8 [N, K], the inverse of `pack` on both devices."""
    if packed.dtype == torch.int32:
        return layout.unpack_qk4(packed, *shape)
    return int4pack.unpack(packed)[: shape[0], : shape[1]].contiguous()


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K] from the layouts of `pack`: float32 arithmetic, rounded once."""
    rows, columns = shape
    if packed.dtype == torch.uint8:
        return int4pack.dequantize(packed, scale, dtype)[:rows, :columns]
    codes = layout.unpack_qk4(packed, *shape).to(torch.float32)
    per_group = group_size or columns
    index = torch.arange(columns, device=packed.device) // per_group
    scale_NK = scale.to(torch.float32).t()[:rows, index]
    offset = 8.0 if zero is None else zero.to(torch.float32).t()[:rows, index]
    return ((codes - offset) * scale_NK).to(dtype)


def reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    """The op in plain PyTorch: the decoded weight times x, in the dtype of x."""
    shape = (out_features, x.shape[-1])
    weight = dequantize(packed, scale, zero, group_size, shape, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _cpu(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    if packed.dtype != torch.uint8:
        return reference(x, packed, scale, zero, bias, group_size, out_features)
    x_MK, out_shape = flat_rows(x, out_features, columns=2 * packed.shape[1])
    if x_MK.shape[0] == 0:
        return x.new_empty(out_shape)
    out = int4pack.matmul(x_MK, packed, scale)
    # Each call that changes nothing still takes a microsecond or two of every token's time.
    if packed.shape[0] != out_features:
        out = out[:, :out_features]
    if bias is not None:
        out = (out.to(torch.float32) + bias.to(torch.float32)).to(x.dtype)
    return out.contiguous().view(out_shape)


def _cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    return weight_only.run_triton(
        "w4a16", x, _weight(packed, scale, zero, group_size), bias, out_features
    )


def _weight(packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Weight:
    return Weight("int4", packed, scale, zero, group_size)


def columns(packed: Tensor, *rest: Any) -> tuple[int, int]:
    """(columns that the layout has room for, the multiple that they are padded to)."""
    if packed.dtype == torch.uint8:
        return 2 * packed.shape[1], rest[-2]
    return layout.COLUMNS * packed.shape[0], layout.COLUMNS


product = Product(
    "w4a16",
    tensors="Tensor packed, Tensor scale, Tensor? zero",
    numbers="int group_size",
    columns=columns,
    dequantize=dequantize,
    dequantize_cuda=weight_only.decoder(_weight),
    cpu=_cpu,
    cuda=_cuda,
)
