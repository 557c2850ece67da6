"""Triton: the products of many experts' 4-bit weights, each with its own rows of x, in one launch.

S sorted rows (those of expert 0 first), E experts; the rest as in `fused_triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.gpu.fused import accumulate
from quantkit_kernels.gpu.launch import Launcher
from quantkit_kernels.gpu.reduce import reduce
from quantkit_kernels.gpu.tuning import Tile


@triton.jit
def _place(offsets, block, E, E_PAD: tl.constexpr, BM: tl.constexpr):
    """(expert, first sorted row, end of the expert's rows) of a block of BM rows.

    Experts have as many blocks as their rows need, one after the other; expert >= E: no such block.
    """
    experts = tl.arange(0, E_PAD)
    low = tl.load(offsets + experts, mask=experts < E, other=0)
    high = tl.load(offsets + experts + 1, mask=experts < E, other=0)
    blocks = (high - low + BM - 1) // BM
    ends = tl.cumsum(blocks, axis=0)
    expert = tl.sum((ends <= block).to(tl.int32), axis=0)
    mine = experts == expert
    before = tl.sum(tl.where(mine, ends - blocks, 0), axis=0)
    start = tl.sum(tl.where(mine, low, 0), axis=0) + (block - before) * BM
    return expert, start, tl.sum(tl.where(mine, high, 0), axis=0)


@triton.jit(do_not_specialize=["S", "SHARE"])
def experts_kernel(
    x,
    source,
    offsets,
    packed,
    scale,
    zero,
    out,
    S,
    SHARE,
    N,
    N_PAD,
    K,
    E,
    stride_x,
    stride_packed,
    stride_scale,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    EVEN_K: tl.constexpr,
    E_PAD: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """out[split, s, n]: row source[s] of x times the weight of the expert that row s belongs to."""
    expert, start, end = _place(offsets, tl.program_id(2), E, E_PAD, BM)
    if expert < E:
        split = tl.program_id(1)
        rows = tl.program_id(0) * BN + tl.arange(0, BN)
        place = start + tl.arange(0, BM)
        present = place < end
        token = tl.load(source + place, mask=present, other=0)
        blocks = tl.cdiv(K, 128)
        first = split * SHARE
        acc = accumulate(
            x + token[None, :].to(tl.int64) * stride_x,
            present,
            packed + expert.to(tl.int64) * stride_packed,
            scale + expert.to(tl.int64) * stride_scale,
            zero + expert.to(tl.int64) * stride_scale,
            scale,
            rows,
            first,
            tl.minimum(first + SHARE, blocks),
            N_PAD,
            K,
            "int4",
            GROUP,
            HAS_ZERO,
            False,
            EVEN_K,
            BN,
            BM,
            STAGES,
            x.dtype.element_ty,
            ASM,
        )
        target = (split.to(tl.int64) * S + place[None, :]) * N + rows[:, None]
        inside = (rows < N)[:, None] & present[None, :]
        tl.store(out + target, acc.to(out.dtype.element_ty), mask=inside)


_EXPERTS = Launcher(experts_kernel)


def matmul(
    x_TK: Tensor,
    source: Tensor,
    offsets: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group: int,
    out_features: int,
    tile: Tile,
    *,
    use_asm: bool = True,
) -> Tensor:
    """[S, N] in the dtype of x; rows of x are contiguous; rows that no expert has are zeros.

    `use_asm=False` decodes in plain Triton and multiplies in float32, for the interpreter.
    """
    count, columns = source.shape[0], x_TK.shape[1]
    experts, blocks, padded, _ = packed.shape
    out = torch.zeros(count, out_features, dtype=x_TK.dtype, device=x_TK.device)
    target = out
    if tile.split > 1:
        shape = (tile.split, count, out_features)
        target = torch.zeros(shape, dtype=torch.float32, device=x_TK.device)
    grid = (padded // tile.rows, tile.split, most_blocks(count, experts, tile.tokens))
    _EXPERTS(
        grid,
        (x_TK, source, offsets, packed, scale, scale if zero is None else zero, target),
        (count, -(-blocks // tile.split)),
        (
            out_features,
            padded,
            columns,
            experts,
            x_TK.stride(0),
            packed.stride(0),
            scale.stride(0),
        ),
        (
            group,
            zero is not None,
            columns % 128 == 0,
            triton.next_power_of_2(experts),
            tile.rows,
            tile.tokens,
            tile.stages,
            use_asm,
        ),
        warps=tile.warps,
        stages=tile.stages,
    )
    if tile.split > 1:
        reduce(target, None, out)
    return out


def most_blocks(rows: int, experts: int, size: int) -> int:
    """The most blocks of `size` rows that so many experts' rows can need."""
    return min(rows, (rows + experts * (size - 1)) // size)
