"""Products on CPUs with weights that are decoded a tile of rows at a time.

M rows of x, N rows of the weight, K columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit_kernels.cpu import isa

# Float32 weights decoded at a time, 4 MiB: larger than a second-level cache, but starting torch's
# ops more often costs more (measured on two cores from 2^17 to 2^21).
ELEMENTS = 1 << 20


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to multiply in: bfloat16 where oneDNN has instructions for it, else at least float32.

    Without them torch multiplies 16-bit matrices in scalar loops, some hundred times slower.
    """
    as_it_is = dtype == torch.float64 or (dtype == torch.bfloat16 and isa.fast_bfloat16())
    return dtype if as_it_is else torch.float32


def tiled_linear(
    x_MK: Tensor,
    rows: int,
    bias: Tensor | None,
    decode: Callable[[slice], Tensor],
    row_scale: Tensor | None = None,
) -> Tensor:
    """[M, rows] in the dtype of x; `decode(rows)` gives those rows of the weight in float32.

    `row_scale` [rows] multiplies the product.
    """
    wide = wide_dtype(x_MK.dtype)
    x = x_MK.to(wide)
    out = torch.empty(x.shape[0], rows, dtype=torch.float32)
    step = max(1, ELEMENTS // x.shape[1])
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        out[:, part] = x @ decode(part).to(wide).t()
    if row_scale is not None:
        out *= row_scale.to(torch.float32)
    if bias is not None:
        out += bias.to(torch.float32)
    return out.to(x_MK.dtype)
