"""quantkit::nf4: NF4 weights in flat blocks of 64, scales plain or quantized themselves.

Blocks must lie within rows (K a multiple of 64).  M rows of x, N rows of the weight, K columns,
G = K/64 blocks per row.  weight = codebook[code] · absmax.
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

BLOCK = 64
# Blocks that share an outer scale.
OUTER = 256


@dataclass(frozen=True, kw_only=True)
class Nested:
    """Scales that are codes: value = table[code] · absmax[block / 256] + offset, all float32."""

    table: Tensor
    absmax: Tensor
    offset: Tensor


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight in the layout of one device.

    triton: `packed` qk4 with adjacent pairs int32 [K'/128, N', 16]; `scale` float32 [G', N'].
    cpu: `packed` uint8 [N, K/2], first code low; `scale` [N, G], float32 or, `nested`, uint8 codes.
    """

    packed: Tensor
    scale: Tensor
    nested: Nested | None

    @property
    def nest(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The op's table, absmax and offset."""
        found = self.nested
        return (found.table, found.absmax, found.offset) if found else (None, None, None)


def supported(
    *, block: int | None, shape: tuple[int, int], dtype: torch.dtype, device: Device
) -> str | None:
    """Why a weight [N, K] cannot run here, or None if it can."""
    if block != BLOCK:
        return f"blocks of {block}: the kernel takes blocks of {BLOCK}"
    if shape[1] % BLOCK:
        return f"{shape[1]} columns: blocks of {BLOCK} straddle the rows"
    return weight_only.unsupported(dtype, device)


def pack(
    codes_NK: Tensor, scale_NG: Tensor, device: Device, nested: Nested | None = None
) -> Packed:
    """A supported weight of codes uint8 [N, K]; the scale is float32, or `nested` its uint8 codes.

    GPUs read scales and not their codes, which would be three loads in each block, none of them in
    the pipeline: 0.37 bits per weight more.
    """
    if device == "triton":
        if nested is not None:
            scale_NG = scales(scale_NG, 0, nested.table, nested.absmax, nested.offset)
        scale = layout.pad_groups(scale_NG, codes_NK.shape[1], BLOCK)
        words = layout.pack_qk4(codes_NK, adjacent=True)
        return Packed(packed=words, scale=scale, nested=None)
    packed = pairs.pack(codes_NK)
    return Packed(packed=packed, scale=scale_NG.contiguous(), nested=nested)


def unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Codes uint8 [N, K], the inverse of `pack` on both devices."""
    if packed.dtype == torch.int32:
        return layout.unpack_qk4(packed, *shape, adjacent=True)
    return pairs.unpack(packed, shape)


def scales(
    scale_NG: Tensor,
    first_row: int,
    table: Tensor | None,
    absmax: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """Float32 scales of some rows [n, G], the first of which is `first_row`."""
    if table is None:
        return scale_NG.to(torch.float32)
    assert absmax is not None and offset is not None
    rows, groups = scale_NG.shape
    flat = torch.arange(first_row * groups, (first_row + rows) * groups, device=scale_NG.device)
    outer = absmax[flat // OUTER].view(rows, groups)
    return table[scale_NG.to(torch.int64)] * outer + offset


def dequantize(
    packed: Tensor,
    scale: Tensor,
    table: Tensor | None,
    absmax: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K] from the layouts of `pack`: float32 arithmetic, rounded once."""
    rows, columns = shape
    codes = unpack(packed, shape).to(torch.int32)
    if packed.dtype == torch.int32:
        scale = scale.t()[:rows, : columns // BLOCK]
    book = torch.tensor(codebook.NF4, device=packed.device)
    value = scales(scale, 0, table, absmax, offset).repeat_interleave(BLOCK, dim=1)
    return (book[codes] * value).to(dtype)


def reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    table: Tensor | None,
    absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    """The op in plain PyTorch: the decoded weight times x, in the dtype of x."""
    shape = (out_features, x.shape[-1])
    weight = dequantize(packed, scale, table, absmax, offset, shape, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _cpu(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    table: Tensor | None,
    absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    if packed.dtype != torch.uint8:
        return reference(x, packed, scale, table, absmax, offset, bias, out_features)
    x_MK, out_shape = flat_rows(x, out_features)
    if x_MK.shape[0] == 0:
        return x.new_empty(out_shape)
    book = pairs.table(codebook.NF4)

    def decode(rows: slice) -> Tensor:
        value = scales(scale[rows], rows.start, table, absmax, offset)
        return pairs.decode(packed[rows], book, value)

    return tiled_linear(x_MK, out_features, bias, decode).view(out_shape)


def _cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    table: Tensor | None,
    absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    weight = _weight(packed, scale, table, absmax, offset)
    return weight_only.run_triton("nf4", x, weight, bias, out_features)


def _weight(
    packed: Tensor,
    scale: Tensor,
    table: Tensor | None,
    absmax: Tensor | None,
    offset: Tensor | None,
) -> Weight:
    if table is not None:
        raise ValueError("quantkit::nf4: GPUs read scales, not their codes; see `pack`")
    return Weight("nf4", packed, scale, None, BLOCK)


def _columns(packed: Tensor, *rest: object) -> tuple[int, int]:
    if packed.dtype == torch.uint8:
        return 2 * packed.shape[1], 1
    return layout.COLUMNS * packed.shape[0], layout.COLUMNS


product = Product(
    "nf4",
    tensors="Tensor packed, Tensor scale, Tensor? table, Tensor? absmax, Tensor? offset",
    numbers="",
    columns=_columns,
    dequantize=dequantize,
    dequantize_cuda=weight_only.decoder(_weight),
    cpu=_cpu,
    cuda=_cuda,
)
