"""The scales and zeros that cover a given extent of each group, and bounded iteration over groups.

Shapes: R rows of work, G groups per row, B weights per group.  A weight's groups are seen as
[R, G, B] where groups lie within rows, and as [N, 1, B] where flat blocks straddle rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.methods.parts import GroupRange
from quantkit.numbers.grid import Float8Grid, blocks, grid_of, store_scale
from quantkit.numbers.nested import nest
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale

# Weights per chunk of work, so that its temporaries stay in a core's cache.
_CHUNK_ELEMENTS = 1 << 18


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
    activations: absmax / 127; fp8: absmax / 448.  Asymmetric: zeros in 1..2^b - 1, which every file
    format can hold, so the extent is widened until at least one step lies below zero.
    """
    if scheme.flat:
        return extent.magnitude, None
    if scheme.kind == "mxfp4":
        raise SchemeError("mxfp4_g32 is read, not written: quantize to another scheme")
    if scheme.kind == "ggml":
        raise SchemeError(
            f"{scheme.name}: this range knows no block types of ggml; minmax, mse, clip and "
            "weighted_mse fit their scales"
        )

    def store(scale: Tensor) -> Tensor:
        if exact:
            return torch.where(scale == 0, 1.0, scale)
        return store_scale(scale, half=scheme.half_scales)

    if scheme.kind == "fp8":
        return store(extent.magnitude / Float8Grid().largest), None
    top = 2**scheme.bits - 1
    if scheme.activation_bits == 8:
        return store(extent.magnitude / (top // 2)), None
    if scheme.symmetric:
        scale = store(extent.magnitude * (2 / top))
        if scheme.bits < 8:
            scale = torch.where(extent.high > -extent.low, -scale, scale)
        return scale, None
    low = torch.minimum(extent.low, extent.high / (1 - top))
    scale = store((extent.high - low) / top)
    return scale, torch.round(-low / scale).clamp_(1, top)


def chunks(weight_OI: Tensor, scheme: Scheme) -> Iterator[tuple[slice, Tensor]]:
    """(rows, groups [R, G, B]) of a float32 weight, a bounded number of weights at a time.

    `rows` indexes the first axis of what `group_range` takes: rows of [O, G] or blocks of [N, 1].
    """
    if aligned(weight_OI, scheme):
        groups = weight_OI.view(weight_OI.shape[0], -1, scheme.group_size or weight_OI.shape[1])
    else:
        groups = blocks(weight_OI, scheme)[:, None]
    step = max(1, _CHUNK_ELEMENTS // (groups.shape[1] * groups.shape[2]))
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
