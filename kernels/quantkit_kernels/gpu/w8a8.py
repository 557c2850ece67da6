"""Triton kernels of `quantkit::w8a8`: quantize each token, then multiply 8-bit numbers.

The product serves `quantkit::fp8a8` too.  M rows of x, N rows of the weight, K columns (K' in the
weight, padded with zeros).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.gpu.launch import Launcher
from quantkit_kernels.gpu.reduce import reduce, workspace
from quantkit_kernels.gpu.tuning import Tile

# Adding and taking away 1.5 · 2^23 rounds a float32 below 2^22 to an integer, ties to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def token_scale(row, K, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """absmax / LIMIT of the K numbers at `row`, at least the smallest normal float32."""
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, K, BLOCK):
        part = tl.load(row + start + columns, mask=start + columns < K, other=0.0)
        part = tl.abs(part.to(tl.float32))
        # A NaN must stay one, which a plain maximum does not promise.
        largest = tl.where((part > largest) | (part != part), part, largest)
    bad = tl.max((largest != largest).to(tl.int32), axis=0)
    largest = tl.where(largest != largest, 0.0, largest)
    step = tl.maximum(tl.max(largest, axis=0) / LIMIT, 1.1754943508222875e-38)
    return tl.where(bad > 0, float("nan"), step)


@triton.jit
def quantize_kernel(x, codes, scale, K, K_PAD, stride_x, BLOCK: tl.constexpr):
    """codes [M, K'] int8 and scale [M] of one row of x: absmax / 127."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    step = token_scale(x + row * stride_x, K, 127.0, BLOCK)
    tl.store(scale + row, step)
    for start in tl.range(0, K_PAD, BLOCK):
        inside = start + columns < K
        part = tl.load(x + row * stride_x + start + columns, mask=inside, other=0.0)
        value = tl.minimum(tl.maximum(part.to(tl.float32) / step, -127.0), 127.0)
        whole = (value + _ROUND) - _ROUND
        place = codes + row * K_PAD + start + columns
        tl.store(place, whole.to(tl.int8), mask=start + columns < K_PAD)


@triton.jit(do_not_specialize=["M", "SHARE"])
def product_kernel(
    codes,
    weight,
    x_scale,
    scale,
    bias,
    out,
    M,
    SHARE,
    N,
    K_PAD,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[split, m, n]: products of this program's share of the columns, scaled at the end.

    Integers are summed in int32, e4m3 numbers in float32.
    """
    INTEGER: tl.constexpr = weight.dtype.element_ty == tl.int8
    split = tl.program_id(1)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BK)
    present, inside = tokens < M, rows < N
    x_tile = codes + tokens[None, :].to(tl.int64) * K_PAD + columns[:, None]
    w_tile = weight + rows[:, None].to(tl.int64) * K_PAD + columns[None, :]
    blocks = tl.cdiv(K_PAD, BK)
    first = split * SHARE
    acc = tl.zeros((BN, BM), tl.int32 if INTEGER else tl.float32)
    for block in tl.range(first, tl.minimum(first + SHARE, blocks), num_stages=STAGES):
        x_mask, w_mask = present[None, :], inside[:, None]
        if not EVEN_K:
            within = block * BK + columns < K_PAD
            x_mask, w_mask = x_mask & within[:, None], w_mask & within[None, :]
        if INTEGER:
            x_KM = tl.load(x_tile + block * BK, mask=x_mask, other=0)
            w_NK = tl.load(w_tile + block * BK, mask=w_mask, other=0)
            acc = tl.dot(w_NK, x_KM, acc, out_dtype=tl.int32)
        else:
            x_KM = tl.load(x_tile + block * BK, mask=x_mask, other=0.0)
            w_NK = tl.load(w_tile + block * BK, mask=w_mask, other=0.0)
            # Hopper's own sums of 8-bit floats keep few bits: add to float32 after each block.
            acc = tl.dot(w_NK, x_KM, acc, max_num_imprecise_acc=BK)
    s = tl.load(scale + rows, mask=inside, other=0.0)
    t = tl.load(x_scale + tokens, mask=present, other=0.0)
    result = acc.to(tl.float32) * t[None, :] * s[:, None]
    if HAS_BIAS:
        result += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    place = (split.to(tl.int64) * M + tokens[None, :]) * N + rows[:, None]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside[:, None] & present[None, :])


_QUANTIZE = Launcher(quantize_kernel)
_PRODUCT = Launcher(product_kernel)


def quantize(x_MK: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, padded], zeros behind K, and scales float32 [M]."""
    rows, columns = x_MK.shape
    codes = torch.empty(rows, padded, dtype=torch.int8, device=x_MK.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x_MK.device)
    block = min(4096, triton.next_power_of_2(padded))
    sizes = (columns, padded, x_MK.stride(0))
    _QUANTIZE((rows, 1, 1), (x_MK, codes, scale), (), sizes, (block,), warps=8)
    return codes, scale


def matmul(
    x_MK: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, tile: Tile
) -> Tensor:
    """[M, N] in the dtype of x; rows of x are contiguous, M > 0."""
    codes, x_scale = quantize(x_MK, weight.shape[1])
    out = torch.empty(x_MK.shape[0], out_features, dtype=x_MK.dtype, device=x_MK.device)
    multiply(codes, x_scale, weight, scale, bias, out, tile)
    return out


def multiply(
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile,
) -> None:
    """Writes the scaled product of codes [M, K'] and a weight [N', K'] to out [M, N]; M > 0."""
    rows, out_features = out.shape
    padded = weight.shape[1]
    whole = tile.split == 1
    target = out if whole else workspace(tile.split, rows, out_features, out.device)
    block_columns = 128
    blocks = -(-padded // block_columns)
    has_bias = whole and bias is not None
    _PRODUCT(
        (-(-out_features // tile.rows), tile.split, -(-rows // tile.tokens)),
        (codes, weight, x_scale, scale, bias if has_bias and bias is not None else scale, target),
        (rows, -(-blocks // tile.split)),
        (out_features, padded),
        (
            has_bias,
            padded % block_columns == 0,
            tile.rows,
            tile.tokens,
            block_columns,
            tile.stages,
        ),
        warps=tile.warps,
        stages=tile.stages,
    )
    if not whole:
        reduce(target, bias, out)
