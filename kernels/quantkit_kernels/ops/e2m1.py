"""quantkit::e2m1: e2m1 weights in groups of 16 or 32, as NVFP4 and MXFP4 have; x in 16 bits.

Codes are sign, two bits of exponent and one of mantissa (OCP Microscaling Formats 1.0, section
5.3.3).  M rows of x, N rows of the weight, K columns, G groups per row.
weight = number · scale (· outer, a factor for the whole weight).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_kernels.cpu.tiled import tiled_linear
from quantkit_kernels.gpu.weight import Weight
from quantkit_kernels.ops import codebook, layout, pairs, weight_only
from quantkit_kernels.ops.device import Device
from quantkit_kernels.ops.product import Product
from quantkit_kernels.ops.rows import flat_rows

GROUPS = (16, 32)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight in the layout of one device.

    triton: `packed` qk4 int32 [K'/128, N', 16]; `scale` bfloat16 or float32 [G', N']; `outer`
            float32 [N'] or None.
    cpu: `packed` uint8 [N, K/2], first code low; `scale` float32 [N, G]; `outer` float32 [N] or
         None.
    """

    packed: Tensor
    scale: Tensor
    outer: Tensor | None
    group_size: int


def supported(
    *, group_size: int | None, shape: tuple[int, int], dtype: torch.dtype, device: Device
) -> str | None:
    """Why a weight [N, K] cannot run here, or None if it can."""
    if group_size not in GROUPS:
        return f"group size {group_size}: the kernel takes groups of 16 and 32"
    if shape[1] % group_size:
        return f"{shape[1]} columns: groups of {group_size} straddle the rows"
    return weight_only.unsupported(dtype, device)


def pack(
    codes_NK: Tensor, scale_NG: Tensor, outer: Tensor | None, group_size: int, device: Device
) -> Packed:
    """A supported weight of codes uint8 [N, K] in the layout of `device`.

    scale float32 [N, G]; outer float32 [] or None.  Powers of two and e4m3 numbers fit bfloat16,
    and their products with e2m1 numbers do too: on a GPU such weights are never rounded.
    """
    rows, columns = codes_NK.shape
    factor = None if outer is None else outer.to(torch.float32).expand(rows)
    if device == "triton":
        if factor is not None:
            factor = torch.nn.functional.pad(factor, (0, layout.up(rows, layout.ROWS) - rows))
        scale = layout.pad_groups(
            weight_only.kernel_scale(scale_NG, group_size), columns, group_size
        )
        words = layout.pack_qk4(codes_NK)
        return Packed(packed=words, scale=scale, outer=factor, group_size=group_size)
    return Packed(
        packed=pairs.pack(codes_NK),
        scale=scale_NG.to(torch.float32).contiguous(),
        outer=None if factor is None else factor.contiguous(),
        group_size=group_size,
    )


def unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Codes uint8 [N, K], the inverse of `pack` on both devices."""
    if packed.dtype == torch.int32:
        return layout.unpack_qk4(packed, *shape)
    return pairs.unpack(packed, shape)


def dequantize(
    packed: Tensor,
    scale: Tensor,
    outer: Tensor | None,
    group_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K] from the layouts of `pack`: float32 arithmetic, rounded once."""
    rows, columns = shape
    codes = unpack(packed, shape).to(torch.int32)
    if packed.dtype == torch.int32:
        scale = scale.t()[:rows, : columns // group_size]
    value = scale.to(torch.float32)
    if outer is not None:
        value = value * outer[:rows, None]
    book = torch.tensor(codebook.E2M1, device=packed.device)
    return (book[codes] * value.repeat_interleave(group_size, dim=1)).to(dtype)


def reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    outer: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    """The op in plain PyTorch: the decoded weight times x, in the dtype of x."""
    shape = (out_features, x.shape[-1])
    weight = dequantize(packed, scale, outer, group_size, shape, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _cpu(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    outer: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    if packed.dtype != torch.uint8:
        return reference(x, packed, scale, outer, bias, group_size, out_features)
    x_MK, out_shape = flat_rows(x, out_features)
    if x_MK.shape[0] == 0:
        return x.new_empty(out_shape)
    book = pairs.table(codebook.E2M1)

    def decode(rows: slice) -> Tensor:
        return pairs.decode(packed[rows], book, scale[rows])

    return tiled_linear(x_MK, out_features, bias, decode, outer).view(out_shape)


def _cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    outer: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    weight = _weight(packed, scale, outer, group_size)
    return weight_only.run_triton("e2m1", x, weight, bias, out_features)


def _weight(packed: Tensor, scale: Tensor, outer: Tensor | None, group_size: int) -> Weight:
    return Weight("e2m1", packed, scale, None, group_size, outer)


def _columns(packed: Tensor, *rest: object) -> tuple[int, int]:
    if packed.dtype == torch.uint8:
        return 2 * packed.shape[1], 1
    return layout.COLUMNS * packed.shape[0], layout.COLUMNS


product = Product(
    "e2m1",
    tensors="Tensor packed, Tensor scale, Tensor? outer",
    numbers="int group_size",
    columns=_columns,
    dequantize=dequantize,
    dequantize_cuda=weight_only.decoder(_weight),
    cpu=_cpu,
    cuda=_cuda,
)
