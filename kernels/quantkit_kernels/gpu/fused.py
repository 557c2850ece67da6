"""Triton: the fused product of every weight-only op for few rows, and a decoder for many.

M rows of x, N rows of the weight (padded: N_PAD), K columns, G groups per row.  The product is
computed transposed, acc[N, M] = weight · xᵀ: wgmma reads its left operand from registers, where the
decoded values are, and works at 16 rows of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.gpu.decode import decode
from quantkit_kernels.gpu.launch import Launcher
from quantkit_kernels.gpu.reduce import reduce
from quantkit_kernels.gpu.tuning import Tile
from quantkit_kernels.gpu.weight import Weight


@triton.jit
def _scales(scale, group, rows, N_PAD):
    """Scales of a group [BN, 1], or of a row of groups [BN, P], as stored."""
    return tl.load(scale + group * N_PAD + rows[:, None])


@triton.jit
def _x_tile(
    x_row,
    start,
    present,
    K,
    WIDTH: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """x transposed [WIDTH, BM], zero outside; float32 for the interpreter."""
    columns = start + tl.arange(0, WIDTH)
    inside = present[None, :]
    if not EVEN_K:
        inside = inside & (columns < K)[:, None]
    tile = tl.load(x_row + columns[:, None], mask=inside, other=0.0)
    if not ASM:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def accumulate(
    x_row,
    present,
    packed,
    scale,
    zero,
    outer,
    rows,
    first,
    last,
    N_PAD,
    K,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Float32 [BN, BM]: rows of the weight times `present` rows of x, blocks `first` to `last`."""
    acc = tl.zeros((BN, BM), tl.float32)
    if GROUP == 0:
        row_scale = tl.load(scale + rows).to(tl.float32)[:, None]
    for block in tl.range(first, last, num_stages=STAGES):
        values = decode(packed, zero, block, rows, N_PAD, KIND, GROUP, HAS_ZERO, BN, DTYPE, ASM)
        # Scales of 64 columns and more go on the float32 product: integer codes are never rounded.
        # Products are added outside: an accumulator beside operands in registers makes wgmma wait
        # for each of its steps.
        if GROUP == 64:
            low, high = tl.split(tl.permute(tl.reshape(values, (BN, 2, 64)), (0, 2, 1)))
            first_x = _x_tile(x_row, block * 128, present, K, 64, EVEN_K, ASM)
            s = _scales(scale, 2 * block, rows, N_PAD)
            acc += tl.dot(low.to(first_x.dtype), first_x) * s.to(tl.float32)
            second_x = _x_tile(x_row, block * 128 + 64, present, K, 64, EVEN_K, ASM)
            s = _scales(scale, 2 * block + 1, rows, N_PAD)
            acc += tl.dot(high.to(second_x.dtype), second_x) * s.to(tl.float32)
        else:
            x_KM = _x_tile(x_row, block * 128, present, K, 128, EVEN_K, ASM)
            if GROUP == 0:
                acc += tl.dot(values, x_KM) * row_scale
            elif GROUP >= 128:
                group = block // (GROUP // 128)
                s = _scales(scale, group, rows, N_PAD)
                acc += tl.dot(values, x_KM) * s.to(tl.float32)
            else:
                group = (block * (128 // GROUP) + tl.arange(0, 128 // GROUP))[None, :]
                s = _scales(scale, group, rows, N_PAD)
                if HAS_OUTER:
                    # Scales beside an outer factor are e4m3 numbers: exact in 16 bits.
                    s = s.to(values.dtype)
                grouped = tl.reshape(values, (BN, 128 // GROUP, GROUP))
                if s.dtype == values.dtype:
                    grouped = grouped * s[:, :, None]
                else:
                    grouped = grouped.to(tl.float32) * s.to(tl.float32)[:, :, None]
                acc += tl.dot(tl.reshape(grouped, (BN, 128)).to(x_KM.dtype), x_KM)
    if HAS_OUTER:
        acc *= tl.load(outer + rows)[:, None]
    return acc


@triton.jit(do_not_specialize=["M", "SHARE"])
def fused_kernel(
    x,
    packed,
    scale,
    zero,
    outer,
    bias,
    out,
    M,
    SHARE,
    N,
    N_PAD,
    K,
    stride_x,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """out[split, m, n]: SHARE blocks of the columns, of all with one split, then plus bias."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    split = tl.program_id(1)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    x_row = x + tokens[None, :].to(tl.int64) * stride_x
    blocks = tl.cdiv(K, 128)
    first = split * SHARE
    acc = accumulate(
        x_row,
        tokens < M,
        packed,
        scale,
        zero,
        outer,
        rows,
        first,
        tl.minimum(first + SHARE, blocks),
        N_PAD,
        K,
        KIND,
        GROUP,
        HAS_ZERO,
        HAS_OUTER,
        EVEN_K,
        BN,
        BM,
        STAGES,
        DTYPE,
        ASM,
    )
    inside = (rows < N)[:, None] & (tokens < M)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    place = (split.to(tl.int64) * M + tokens[None, :]) * N + rows[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def decode_kernel(
    packed,
    scale,
    zero,
    outer,
    out,
    N,
    N_PAD,
    K,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    BN: tl.constexpr,
    ASM: tl.constexpr,
):
    """out [N, K] = value · scale (· outer)."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    block = tl.program_id(1)
    # float16 holds integer codes exactly whatever the output's dtype.
    values = decode(packed, zero, block, rows, N_PAD, KIND, GROUP, HAS_ZERO, BN, tl.float16, ASM)
    values = values.to(tl.float32)
    PER_BLOCK: tl.constexpr = 128 // GROUP if GROUP > 0 and GROUP < 128 else 1
    if GROUP == 0:
        group = tl.arange(0, 1)[None, :]
    else:
        group = (block * 128 // GROUP + tl.arange(0, PER_BLOCK))[None, :]
    s = _scales(scale, group, rows, N_PAD).to(tl.float32)
    if HAS_OUTER:
        s *= tl.load(outer + rows)[:, None]
    grouped = tl.reshape(values, (BN, PER_BLOCK, 128 // PER_BLOCK))
    weight = tl.reshape(grouped * s[:, :, None], (BN, 128))
    columns = block * 128 + tl.arange(0, 128)
    place = rows[:, None].to(tl.int64) * K + columns[None, :]
    inside = (rows < N)[:, None] & (columns < K)[None, :]
    tl.store(out + place, weight.to(out.dtype.element_ty), mask=inside)


_FUSED = Launcher(fused_kernel)


def matmul(
    x_MK: Tensor,
    weight: Weight,
    bias: Tensor | None,
    out_features: int,
    tile: Tile,
    *,
    use_asm: bool = True,
) -> Tensor:
    """[M, N] in the dtype of x; rows of x are contiguous, M > 0.

    `use_asm=False` decodes in plain Triton and multiplies in float32, for the interpreter.
    """
    rows, columns = x_MK.shape
    out = x_MK.new_empty(rows, out_features)
    stride = x_MK.stride(0)
    multiply(x_MK, rows, columns, stride, weight, bias, out, out_features, tile, use_asm)
    return out


def multiply(
    x: Tensor,
    rows: int,
    columns: int,
    stride: int,
    weight: Weight,
    bias: Tensor | None,
    out: Tensor,
    out_features: int,
    tile: Tile,
    use_asm: bool = True,
) -> None:
    """Writes the product to `out`, M · N numbers in order; rows of x are `stride` apart, M > 0."""
    split, tile_rows, tokens, stages = tile.split, tile.rows, tile.tokens, tile.stages
    whole = split == 1
    # Of x, which makes one more cheaply than torch does.
    target = out if whole else x.new_empty((split, rows, out_features), dtype=torch.float32)
    kind, packed, scale, zero, group, outer = weight
    blocks, padded, _ = packed.shape
    added = bias if whole else None
    plain = zero is None and outer is None and added is None
    _FUSED(
        (padded // tile_rows, split, -(-rows // tokens)),
        (
            x,
            packed,
            scale,
            scale if zero is None else zero,
            scale if outer is None else outer,
            scale if added is None else added,
            target,
        ),
        (rows, -(-blocks // split)),
        (out_features, padded, columns, stride),
        (
            kind,
            group,
            zero is not None,
            outer is not None,
            added is not None,
            columns % 128 == 0,
            tile_rows,
            tokens,
            stages,
            use_asm,
        ),
        tile.warps,
        stages,
        (x, packed, scale, target) if plain else None,
    )
    if not whole:
        reduce(target, bias, out)


def dequantize(
    weight: Weight, shape: tuple[int, int], dtype: torch.dtype, *, use_asm: bool = True
) -> Tensor:
    """The weight [N, K] in `dtype`; integer weights are rounded once."""
    out = torch.empty(shape, dtype=dtype, device=weight.packed.device)
    blocks, padded, _ = weight.packed.shape
    block_rows = 64
    unused = weight.scale
    decode_kernel[(padded // block_rows, blocks)](
        weight.packed,
        weight.scale,
        unused if weight.zero is None else weight.zero,
        unused if weight.outer is None else weight.outer,
        out,
        shape[0],
        padded,
        shape[1],
        KIND=weight.kind,
        GROUP=weight.group,
        HAS_ZERO=weight.zero is not None,
        HAS_OUTER=weight.outer is not None,
        BN=block_rows,
        ASM=use_asm,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
