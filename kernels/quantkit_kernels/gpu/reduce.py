"""Triton: the sum of split-K partial products, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.gpu.launch import Launcher


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(
    partial,
    bias,
    out,
    M,
    N,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [M, N] = sum over SPLIT of partial [SPLIT, M, N], plus bias [N]; summed in float32."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(partial + (part * M + row) * N + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * N + columns, total.to(out.dtype.element_ty), mask=inside)


_REDUCE = Launcher(reduce_kernel)


def reduce(partial: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes the sum of float32 partials [SPLIT, M, N] and the bias to out, M · N numbers."""
    split, rows, columns = partial.shape
    block = 512
    _REDUCE(
        (rows, -(-columns // block), 1),
        (partial, out if bias is None else bias, out),
        (rows,),
        (columns,),
        (split, bias is not None, block),
        4,
        3,
        (partial, out) if bias is None else None,
    )


def workspace(split: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Float32 [split, rows, columns], uninitialised, from the caching allocator."""
    return torch.empty(split, rows, columns, dtype=torch.float32, device=device)
