"""quantkit::int8_dot: weights of 2 to 8 bits or e4m3, activations rounded to int8; CPUs only.

Every 32 columns of a row of x share a float32 scale, max |x| / 127; the products of a block are
integers, its sum is scaled by both scales and added in float32.  llama.cpp's Q8_0 activations and
ONNX Runtime's MatMulNBits with accuracy level 4 do the same.  Finer than W8A8's one scale per row.

M rows of x, N rows of the weight, K columns, G groups per row.
weight = (code - zero) · scale, zero 2^(bits - 1) where none is stored.  Codes lie in 4 or 8 bits.
Four-bit codes of a codebook: weight = (digit - 12) · scale where its values are twelfths of the
largest (MXFP4, NVFP4), else (digits - 8192) · scale, where they are whole numbers of steps (FP4) or
rounded to 14 bits (NF4), finer than bfloat16 for all but its smallest.
e4m3 numbers: weight = sixteenths / 16 · scale, exact from 1/2 on, smaller ones rounded half up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_kernels.cpu import isa, native
from quantkit_kernels.ops import layout
from quantkit_kernels.ops.product import Product

BLOCK = 32
# The smallest group: two of them share a scale of x.
_HALF = BLOCK // 2
# Rows of the weight side by side.
_LANES = 8
# A codebook's largest value in steps of its digits: of one, and at most of two.
_FEW_STEPS = 12
# 42 times the 192 steps of bitsandbytes' FP4, whose smallest value is 1/192 of its largest.
_WHOLE_STEPS = 8064
_STEPS = 2**13 - 1
# Smaller than any activation that matters, and 127 / x is finite above it.
_TINY = 2.0**-100


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight as int8_dot.cpp reads it; group_size 0 means one group per row.

    `packed` uint8 [N/8, K/32, 32 · bits]; `scale` [N/8, G, 8] in 16 bits where that is exact, else
    float32; `zero` uint8 [N/8, G, 8], or None for 2^(bits - 1).  N and K are filled up to whole
    panels and blocks.  `table` uint8 [1, 16] holds the digits of a codebook's values, [2, 16]
    their high and low seven bits, or None.  `bits` are those that a code lies in, 4 or 8.
    `floats`: codes are e4m3.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    bits: int
    group_size: int
    floats: bool = False


def processor_suits() -> bool:
    """Whether the processor has what the op needs; building it may fail all the same."""
    return isa.level() != "default"


def unavailable() -> str | None:
    """Why this machine cannot run the op, or None; the first call may compile for some seconds."""
    if not processor_suits():
        return "int8 activations need an x86 CPU with AVX2"
    return native.load("int8_dot")


def supported(*, bits: int, group_size: int | None, dtype: torch.dtype) -> str | None:
    """Why a weight cannot run here, or None if it can; group_size None is a whole row."""
    if not 2 <= bits <= 8:
        return f"{bits}-bit weights have no kernel"
    if group_size is not None and group_size != _HALF and group_size % BLOCK:
        return (
            f"group size {group_size}: int8 activations need {_HALF}, multiples of {BLOCK} or "
            "whole rows"
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{dtype} activations: the kernel takes float32, bfloat16 and float16"
    return unavailable()


def pack(
    codes_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    group_size: int | None,
    bits: int,
) -> Packed:
    """A supported weight of codes uint8 [N, K] below 2^bits."""
    stored = 4 if bits <= 4 else 8
    if zero_NG is None and bits != stored:
        zero_NG = torch.full_like(scale_NG, 2 ** (bits - 1), dtype=torch.uint8)
    packed = _pack(codes_NK, stored)
    return Packed(
        packed=packed,
        scale=_lanes(_short(scale_NG), packed, group_size),
        zero=None if zero_NG is None else _lanes(zero_NG, packed, group_size),
        table=None,
        bits=stored,
        group_size=group_size or 0,
    )


def pack_codebook(
    codes_NK: Tensor, scale_NG: Tensor, values: Sequence[float], group_size: int
) -> Packed:
    """A weight values[code] · scale of codes uint8 [N, K] below 16."""
    numbers = torch.tensor(values, dtype=torch.float64)
    shares = numbers / numbers.abs().max()
    steps = _steps(shares)
    digits = torch.round(shares * steps).to(torch.int64)
    if steps == _FEW_STEPS:
        table = (digits + _FEW_STEPS)[None]
    else:
        table = torch.stack(((digits + _STEPS + 1) >> 7, (digits + _STEPS + 1) & 127))
    packed = _pack(codes_NK, 4)
    scale = (scale_NG.double() * (numbers.abs().max() / steps)).float()
    return Packed(
        packed=packed,
        scale=_lanes(_short(scale), packed, group_size),
        zero=None,
        table=table.to(torch.uint8),
        bits=4,
        group_size=group_size,
    )


def _steps(shares: Tensor) -> int:
    """Into how many steps the largest value is cut: so that all are whole numbers, if they can."""
    for steps in (_FEW_STEPS, _WHOLE_STEPS):
        if torch.allclose(shares * steps, torch.round(shares * steps), rtol=0, atol=1e-5):
            return steps
    return _STEPS


def pack_floats(codes_NK: Tensor, scale_NG: Tensor, group_size: int | None) -> Packed:
    """A weight of e4m3 numbers times scale; codes uint8 [N, K], their bytes, none of them NaN."""
    packed = _pack(codes_NK, 8)
    return Packed(
        packed=packed,
        scale=_lanes(_short(scale_NG.to(torch.float32) / 16), packed, group_size),
        zero=None,
        table=None,
        bits=8,
        group_size=group_size or 0,
        floats=True,
    )


def _pack(codes_NK: Tensor, bits: int) -> Tensor:
    rows, columns = codes_NK.shape
    panels, blocks = layout.up(rows, _LANES) // _LANES, layout.up(columns, BLOCK) // BLOCK
    codes = codes_NK.new_zeros(panels * _LANES, blocks * BLOCK)
    codes[:rows, :columns] = codes_NK
    # Four columns of each row next to each other: [panel, block, four, row, column].
    fours = codes.view(panels, _LANES, blocks, BLOCK // 4, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        fours = fours[:, :, 0::2] | (fours[:, :, 1::2] << 4)
    return fours.reshape(panels, blocks, BLOCK * bits)


def unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Codes uint8 [N, K], the inverse of `pack`."""
    panels, blocks, size = packed.shape
    fours = packed.view(panels, blocks, -1, _LANES, 4)
    if size == BLOCK * 4:
        fours = torch.stack((fours & 15, fours >> 4), dim=3).flatten(2, 3)
    codes = fours.permute(0, 3, 1, 2, 4).reshape(panels * _LANES, blocks * BLOCK)
    return codes[: shape[0], : shape[1]].contiguous()


def round_activations(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [M, K/32, 32] of x, K filled up with zeros, and float32 scales [M, K/32]."""
    missing = -x_MK.shape[1] % BLOCK
    wide = torch.nn.functional.pad(x_MK.to(torch.float32), (0, missing))
    blocks = wide.view(x_MK.shape[0], -1, BLOCK)
    largest = blocks.abs().amax(dim=-1)
    # A tensor, because torch takes a number over a tensor for the number times a reciprocal.
    by = torch.where(largest > _TINY, torch.tensor(127.0) / largest, 0)
    return torch.round(blocks * by[..., None]).to(torch.int8), largest / 127


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    bits: int,
    floats: bool,
    group_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight [N, K] that the op multiplies by, in float32, rounded to `dtype`."""
    rows, columns = shape
    codes = unpack(packed, shape)
    if floats:
        numbers = codes.view(torch.float8_e4m3fn).to(torch.float32)
        codes = torch.floor(numbers.abs() * 16 + 0.5).copysign(numbers)
    elif table is not None:
        wide = table.to(torch.int16)
        codes = (wide[0] if len(wide) == 1 else wide[0] * 128 + wide[1])[codes.long()]
    group = torch.arange(columns) // (group_size or columns)
    middle = 0 if floats else 2 ** (bits - 1)
    if table is not None:
        middle = _FEW_STEPS if len(table) == 1 else _STEPS + 1
    offset = middle if zero is None else by_row(zero, rows).to(torch.float32)[:, group]
    scale_NK = by_row(scale, rows).to(torch.float32)[:, group]
    return ((codes.to(torch.float32) - offset) * scale_NK).to(dtype)


def reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    bits: int,
    floats: bool,
    group_size: int,
    out_features: int,
) -> Tensor:
    """The op in plain PyTorch: x rounded and decoded, times the decoded weight, in float32."""
    columns = x.shape[-1]
    shape = (out_features, columns)
    weight = dequantize(packed, scale, zero, table, bits, floats, group_size, shape)
    rounded, scales = round_activations(x.reshape(-1, columns))
    decoded = (rounded.to(torch.float32) * scales[..., None]).flatten(1)[:, :columns]
    wide = None if bias is None else bias.to(torch.float32)
    out = torch.nn.functional.linear(decoded, weight, wide)
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def _short(scale: Tensor) -> Tensor:
    """The scale in bfloat16 or float16 if one of them holds it exactly, else in float32."""
    wide = scale.to(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(wide.to(dtype).to(torch.float32), wide):
            return wide.to(dtype)
    return wide


def _lanes(per_group: Tensor, packed: Tensor, group_size: int | None) -> Tensor:
    """[N, G] as [N/8, G, 8], filled up with zeros; groups of 16 to two for every block."""
    rows, groups = per_group.shape
    panels, blocks, _ = packed.shape
    whole = per_group.new_zeros(panels * _LANES, 2 * blocks if group_size == _HALF else groups)
    whole[:rows, :groups] = per_group
    return whole.view(panels, _LANES, -1).transpose(1, 2).contiguous()


def by_row(lanes: Tensor, out_features: int) -> Tensor:
    """[N, G] of a packed weight's scales or zeros [N/8, G, 8]."""
    return lanes.transpose(1, 2).flatten(0, 1)[:out_features]


def _columns(packed: Tensor, *rest: object) -> tuple[int, int]:
    return BLOCK * packed.shape[1], BLOCK


# The CPU implementation is int8_dot.cpp's: `native.load` registers it.
product = Product(
    "int8_dot",
    tensors="Tensor packed, Tensor scale, Tensor? zero, Tensor? table",
    numbers="int bits, bool floats, int group_size",
    columns=_columns,
    dequantize=dequantize,
    cpu=None,
    cuda=None,
)
