"""quantkit::fp8a16: e4m3 weights, a scale per row or group, 16-bit activations.

Codes are the bytes of torch.float8_e4m3fn, none of them NaN.  `packed` depends on the device, see
`Packed`.  M rows of x, N rows of the weight, K columns, G groups per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_kernels.cpu.tiled import tiled_linear
from quantkit_kernels.gpu.weight import Weight
from quantkit_kernels.ops import layout, weight_only
from quantkit_kernels.ops.device import Device
from quantkit_kernels.ops.product import Product
from quantkit_kernels.ops.rows import flat_rows

# Where float32 has sign, exponent and mantissa of e4m3, its byte shifted left by 20 with its sign
# extended; what they make is 2^-120 of the number.
_PLACES = 0x87F00000 - (1 << 32)
_POWER = 2.0**120


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight in the layout of one device; group_size 0 means one scale per row.

    triton: `packed` qk8 int32 [K'/128, N', 32]; `scale` [G', N'], primes padded to whole tiles.
    cpu: `packed` int8 [N, K], the codes as they are; `scale` float32 [N, G].
    """

    packed: Tensor
    scale: Tensor
    group_size: int


def supported(*, group_size: int | None, dtype: torch.dtype, device: Device) -> str | None:
    """Why a weight cannot run here, or None if it can; group_size None is a whole row."""
    if reason := weight_only.unsupported(dtype, device):
        return reason
    return weight_only.unsupported_group(group_size) if device == "triton" else None


def pack(codes_NK: Tensor, scale_NG: Tensor, group_size: int | None, device: Device) -> Packed:
    """A supported weight of codes uint8 [N, K] in the layout of `device`."""
    group = group_size or 0
    signed = codes_NK.view(torch.int8)
    if device == "triton":
        scale = layout.pad_groups(
            weight_only.kernel_scale(scale_NG, group_size), signed.shape[1], group
        )
        return Packed(packed=layout.pack_qk8(signed), scale=scale, group_size=group)
    return Packed(packed=signed, scale=scale_NG.to(torch.float32), group_size=group)


def unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Codes uint8 [N, K], the inverse of `pack` on both devices."""
    if packed.dtype == torch.int32:
        packed = layout.unpack_qk8(packed, *shape)
    return packed.clone().view(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """Float32 numbers of e4m3 codes int8 of any shape, in fresh memory.

    Moves bits: some fifty times faster than torch's conversion on CPUs.
    """
    bits = codes.to(torch.int32).bitwise_left_shift_(20).bitwise_and_(_PLACES)
    return bits.view(torch.float32).mul_(_POWER)


def dequantize(
    packed: Tensor, scale: Tensor, group_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] from the layouts of `pack`: float32 arithmetic, rounded once."""
    rows, columns = shape
    numbers = unpack(packed, shape).view(torch.float8_e4m3fn).to(torch.float32)
    scale_NG = scale.t()[:rows] if packed.dtype == torch.int32 else scale
    index = torch.arange(columns, device=packed.device) // (group_size or columns)
    return (numbers * scale_NG.to(torch.float32)[:, index]).to(dtype)


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
    x_MK, out_shape = flat_rows(x, out_features)
    if x_MK.shape[0] == 0:
        return x.new_empty(out_shape)

    def decoded(rows: slice) -> Tensor:
        weight = decode(packed[rows])
        if not group_size:
            return weight
        return weight.view(len(weight), -1, group_size).mul_(scale[rows, :, None]).view_as(weight)

    row_scale = None if group_size else scale.view(-1)
    return tiled_linear(x_MK, out_features, bias, decoded, row_scale).view(out_shape)


def _cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    return weight_only.run_triton(
        "fp8a16", x, _weight(packed, scale, group_size), bias, out_features
    )


def _weight(packed: Tensor, scale: Tensor, group_size: int) -> Weight:
    return Weight("fp8", packed, scale, None, group_size)


def _columns(packed: Tensor, *rest: object) -> tuple[int, int]:
    if packed.dtype == torch.int8:
        return packed.shape[1], 1
    return layout.COLUMNS * packed.shape[0], layout.COLUMNS


product = Product(
    "fp8a16",
    tensors="Tensor packed, Tensor scale",
    numbers="int group_size",
    columns=_columns,
    dequantize=dequantize,
    dequantize_cuda=weight_only.decoder(_weight),
    cpu=_cpu,
    cuda=_cuda,
)
