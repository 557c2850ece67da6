"""Triton: sums, sums of squares and the largest size of each channel of activations, in one pass.

Shapes: T tokens, C channels, P parts of the tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.gpu.launch import Launcher

# Tokens of a part.  Additions have one order for each T and C, whatever the GPU's size.
PART = 256
_TOKENS, _CHANNELS = 16, 128


@triton.jit(do_not_specialize=["T"])
def moments_kernel(
    x,
    sums,
    squares,
    largest,
    T,
    C,
    stride_x,
    PART: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """sums, squares float64 [P, C] of |x| and x² of float32; largest float32 [P, C] or NaN."""
    part = tl.program_id(1)
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = channels < C
    total = tl.zeros((BT, BC), tl.float64)
    square = tl.zeros((BT, BC), tl.float64)
    most = tl.zeros((BT, BC), tl.float32)
    for start in tl.range(0, PART, BT):
        tokens = part * PART + start + tl.arange(0, BT)
        place = x + tokens[:, None].to(tl.int64) * stride_x + channels[None, :]
        size = tl.load(place, mask=(tokens < T)[:, None] & inside[None, :], other=0.0)
        size = tl.abs(size.to(tl.float32))
        # A NaN must stay one, which a plain maximum does not promise.
        most = tl.where((size > most) | (size != size), size, most)
        total += size.to(tl.float64)
        square += (size * size).to(tl.float64)
    bad = tl.max((most != most).to(tl.int32), axis=0)
    most = tl.max(tl.where(most != most, 0.0, most), axis=0)
    out = part.to(tl.int64) * C + channels
    tl.store(sums + out, tl.sum(total, axis=0), mask=inside)
    tl.store(squares + out, tl.sum(square, axis=0), mask=inside)
    tl.store(largest + out, tl.where(bad > 0, float("nan"), most), mask=inside)


@triton.jit(do_not_specialize=["P"])
def total_kernel(parts, out, P, C, BC: tl.constexpr):
    """out float64 [C]: the sum of float64 [P, C], one part after the other."""
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = channels < C
    total = tl.zeros((BC,), tl.float64)
    place = parts + channels
    for _ in tl.range(0, P):
        total += tl.load(place, mask=inside, other=0.0)
        place += C
    tl.store(out + channels, total, mask=inside)


_MOMENTS = Launcher(moments_kernel)
_TOTAL = Launcher(total_kernel)


def column_moments(x_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ|x| and Σx² (float64 [C]) and max |x| (float32 [C], NaN where x has one) over the tokens.

    x [T, C] in 16 or 32 bits, T > 0.  Squares are rounded to float32, as in `reference`; additions
    are float64 in a fixed order: tiles of tokens, parts of 256, then the parts in turn.
    """
    x = x_TC if x_TC.stride(1) == 1 else x_TC.contiguous()
    tokens, channels = x.shape
    parts = -(-tokens // PART)
    sums, squares = (x.new_empty(2, parts, channels, dtype=torch.float64)).unbind(0)
    largest = x.new_empty(parts, channels, dtype=torch.float32)
    blocks = -(-channels // _CHANNELS)
    pointers = (x, sums, squares, largest)
    sizes = (channels, x.stride(0))
    _MOMENTS((blocks, parts, 1), pointers, (tokens,), sizes, (PART, _TOKENS, _CHANNELS), 4)
    found = x.new_empty(2, channels, dtype=torch.float64)
    for one, out in zip((sums, squares), found.unbind(0), strict=True):
        _TOTAL((blocks, 1, 1), (one, out), (parts,), (channels,), (_CHANNELS,), 4)
    return found[0], found[1], largest.amax(0)


def reference(x_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch; the order of the additions is torch's."""
    size = x_TC.to(torch.float32).abs()
    squares = size.square().sum(0, dtype=torch.float64)
    return size.sum(0, dtype=torch.float64), squares, size.amax(0)
