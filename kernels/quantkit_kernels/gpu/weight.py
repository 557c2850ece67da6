"""A weight as the fused kernels take it; without Triton, which not every machine has."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Weight(NamedTuple):
    """What the kernels read of a weight; a tuple, because every call makes one.

    kind    "int4", "int8", "fp8", "e2m1" or "nf4"
    packed  int32 [K'/128, N', 16 or 32]
    scale   [G', N']
    zero    [G', N'] or None (8 for int4)
    group   columns that share a scale; 0 means the row
    outer   float32 [N'], a factor of each row beside the scales, or None
    """

    kind: str
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int
    outer: Tensor | None = None
