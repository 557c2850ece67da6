"""The scales and zeros that cover a given extent of each group, and bounded iteration over groups.

Shapes: R rows of work, G groups per row, B weights per group.  A weight's groups are seen as
[R, G, B] where groups lie within rows, and as [N, 1, B] where flat blocks straddle rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.errors import SchemeError
from quantkit.methods.parts import GroupRange
from quantkit.numbers.grid import E4M3_LARGEST, blocks, float_scale, grid_of, store_scale
from quantkit.numbers.nested import nest
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import DividedScale, PlainScale

if TYPE_CHECKING:
    from torch import Tensor

# Weights per chunk of work, so that its temporaries stay in a core's cache; on a GPU, where every
# operation has to fill the chip, in a few GiB.
_CHUNK_ELEMENTS, _GPU_CHUNK_ELEMENTS = 1 << 18, 1 << 26


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The real interval each group has to cover, both float32 [..., 1]; low <= 0 <= high."""

    low: Tensor
    high: Tensor

    @property
    def magnitude(self) -> Tensor:
        """The largest magnitude in the interval."""
        return torch.maximum(-self.low, self.high)


def extent_of(groups: Tensor) -> Extent:
    """Smallest and largest weight of each group [..., B], zero included."""
    return Extent(
        low=groups.amin(-1, keepdim=True).clamp_(max=0),
        high=groups.amax(-1, keepdim=True).clamp_(min=0),
    )


def scale_and_zero(
    extent: Extent, scheme: Scheme, *, exact: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Scale as stored (absmax not yet nested) and integer zero of each group, float32 [..., 1].

    `exact` leaves scales as they come out, as if a file could hold any; 1 where that is zero.

    Symmetric: 2·absmax / (2^b - 1), the same whatever the signs in the group; the reference GPTQ
    code halves the range of a group without negative weights and clips it.  Below 8 bits it is
    negative where the largest magnitude is positive: the side that has a step more, -2^(b-1), goes
    to the side that needs it, as in llama.cpp's Q4_0 and AutoRound's symmetric files.  With 8-bit
    activations: absmax / 127.  Asymmetric: zeros in 1..2^b - 1, which every file format can hold,
    so the extent is widened until at least one step lies below zero.  Floats: `float_scale`.
    """
    if scheme.flat:
        return extent.magnitude, None
    if scheme.kind == "ggml":
        raise SchemeError(
            f"{scheme.name}: this range knows no block types of ggml; minmax, mse, clip and "
            "weighted_mse fit their scales"
        )

    def store(scale: Tensor) -> Tensor:
        if exact:
            return torch.where(scale == 0, 1.0, scale)
        return store_scale(scale, half=scheme.half_scales)

    if scheme.kind != "int":
        magnitude = pooled(extent.magnitude, scheme, torch.amax)
        if scheme.kind == "fp8":
            return store(magnitude / E4M3_LARGEST), None
        return float_scale(magnitude, scheme), None
    top = 2**scheme.bits - 1
    if scheme.centered:
        return store(extent.magnitude / (top // 2)), None
    if scheme.symmetric:
        scale = store(extent.magnitude * (2 / top))
        if scheme.bits < 8:
            scale = torch.where(extent.high > -extent.low, -scale, scale)
        return scale, None
    low = torch.minimum(extent.low, extent.high / (1 - top))
    scale = store((extent.high - low) / top)
    return scale, torch.round(-low / scale).clamp_(1, top)


def pooled(values_RG: Tensor, scheme: Scheme, pool: Callable[..., Tensor]) -> Tensor:
    """What `pool` (called with dim and keepdim) makes of rows that share their scales, for each.

    values [R, G, ...]; row 0 starts a block.  Where rows have their own, the values themselves.
    """
    if scheme.share == "group":
        return values_RG
    if scheme.share == "tensor":
        return pool(values_RG, dim=0, keepdim=True).expand_as(values_RG)
    parts = values_RG.split(_rows_together(scheme, len(values_RG)))
    return torch.cat([pool(part, dim=0, keepdim=True).expand_as(part) for part in parts])


def share_scales(found: Sequence[GroupRange], scheme: Scheme) -> list[GroupRange]:
    """The ranges of weights that read one input, with what servers fuse made equal.

    A server stacks queries, keys and values, and gate and up, and takes one divisor of NVFP4 scales
    and one scale of FP8 per tensor for all; weights that share an input are at least those.  The
    divisor is the power of two that brings the largest scale to 448 or just below, so that group
    scales are exact unless 2^14 times smaller than the largest.
    """
    if scheme.share == "tensor":
        widest = torch.stack([one.coding.max() for one in found]).max()
        scales = [widest.expand_as(one.coding).contiguous() for one in found]
        return [
            dataclasses.replace(one, scale=PlainScale(tensor=scale), coding=scale)
            for one, scale in zip(found, scales, strict=True)
        ]
    if scheme.kind != "nvfp4":
        return list(found)
    largest = max(float(one.coding.max()) for one in found)
    divisor = 2.0 ** math.floor(math.log2(E4M3_LARGEST / largest))
    divided = [DividedScale.of(one.coding, divisor) for one in found]
    return [
        dataclasses.replace(one, scale=scale, coding=scale.values())
        for one, scale in zip(found, divided, strict=True)
    ]


def _rows_together(scheme: Scheme, num_rows: int) -> int:
    """How many rows share their scales."""
    return {"group": 1, "block": scheme.group_size or 1, "tensor": num_rows}[scheme.share]


def chunks(weight_OI: Tensor, scheme: Scheme) -> Iterator[tuple[slice, Tensor]]:
    """(rows, groups [R, G, B]) of a float32 weight, a bounded number of weights at a time.

    `rows` indexes the first axis of what `group_range` takes: rows of [O, G] or blocks of [N, 1].
    """
    if aligned(weight_OI, scheme):
        groups = weight_OI.view(weight_OI.shape[0], -1, scheme.group_size or weight_OI.shape[1])
    else:
        groups = blocks(weight_OI, scheme)[:, None]
    together = _rows_together(scheme, len(groups))
    elements = _GPU_CHUNK_ELEMENTS if weight_OI.is_cuda else _CHUNK_ELEMENTS
    step = max(1, elements // (groups.shape[1] * groups.shape[2]))
    step = -(-step // together) * together
    for start in range(0, groups.shape[0], step):
        rows = slice(start, min(start + step, groups.shape[0]))
        yield rows, groups[rows]


def aligned(weight_OI: Tensor, scheme: Scheme) -> bool:
    """True if every group lies within one row."""
    return weight_OI.shape[1] % (scheme.group_size or weight_OI.shape[1]) == 0


def group_range(
    scale_RG: Tensor,
    zero_RG: Tensor | None,
    scheme: Scheme,
    *,
    straddling: bool,
    code_before_nesting: bool = False,
    degraded: str | None = None,
) -> GroupRange:
    """A range's answer from scales [R, G] ([N, 1] if blocks straddle rows) and zeros.

    With `code_before_nesting` codes are computed with absmax before it is nested, as bitsandbytes
    does; otherwise with the scale as stored.
    """
    scale = scale_RG[:, 0].contiguous() if straddling else scale_RG
    if not scheme.double_quant:
        return GroupRange(
            scale=PlainScale(tensor=scale), zero=zero_RG, coding=scale, degraded=degraded
        )
    nested = nest(scale)
    coding = scale if code_before_nesting else nested.values()
    return GroupRange(scale=nested, zero=None, coding=coding, degraded=degraded)


def snap_rows(weight_OI: Tensor, scheme: Scheme, *, exact: bool = False) -> Tensor:
    """The weight on the grid of its full ranges, [O, I]: what minmax and nearest would decode to.

    Blocks that straddle rows are taken as whole rows, absmax is not nested, and block types of ggml
    stand for integers of their width.  `exact`: as if scales were not rounded for storage.
    """
    scheme = scheme.integer
    columns = weight_OI.shape[1]
    size = scheme.group_size or columns
    groups = weight_OI.reshape(weight_OI.shape[0], -1, columns if columns % size else size)
    scale, zero = scale_and_zero(extent_of(groups), scheme, exact=exact)
    return grid_of(scheme).snap(groups, scale, zero).view(weight_OI.shape)
