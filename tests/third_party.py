"""Parts as someone else's package would bring them: found as `third_party:Class`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.extent import aligned, chunks, extent_of, group_range, scale_and_zero
from quantkit.nearest import nearest_codes
from quantkit.parts import GroupRange, Reader, Rounded
from quantkit.scheme import Scheme
from quantkit.search import both_ends
from quantkit.stats import Needs, Stats


@dataclass(frozen=True, kw_only=True)
class Tighter:
    """A range that clips every group by the same factor."""

    factor: float = 0.9

    def needs(self, scheme: Scheme) -> Needs:
        return Needs()

    def __call__(
        self, name: str, weight_OI: Tensor, scheme: Scheme, stats: Stats | None
    ) -> GroupRange:
        scales, zeros = [], []
        for _, groups in chunks(weight_OI, scheme):
            extent = both_ends(extent_of(groups), self.factor)
            scale, zero = scale_and_zero(extent, scheme)
            scales.append(scale[..., 0])
            if zero is not None:
                zeros.append(zero[..., 0])
        return group_range(
            torch.cat(scales),
            torch.cat(zeros) if zeros else None,
            scheme,
            straddling=not aligned(weight_OI, scheme),
        )


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A rounding to nearest."""

    def needs(self, scheme: Scheme) -> Needs:
        return Needs()

    def __call__(
        self,
        weight_OI: Tensor,
        scheme: Scheme,
        scale: Tensor,
        zero: Tensor | None,
        stats: Stats | None,
    ) -> Rounded:
        return Rounded(codes=nearest_codes(weight_OI, scheme, scale, zero))


@dataclass(frozen=True, kw_only=True)
class HalfWay:
    """A transform that scales by the square root of the mean magnitude."""

    def needs(self, scheme: Scheme) -> Needs:
        return Needs(moments=True)

    def __call__(
        self, readers: Sequence[Reader], stats: Stats, channel_map: Tensor | None
    ) -> Tensor | None:
        if stats.count == 0 or all(reader.scheme is None for reader in readers):
            return None
        scale = torch.where(stats.mean_abs > 0, stats.mean_abs, 1.0)
        if channel_map is not None:
            scale = scale.clone()
            for channel in channel_map.unique():
                scale[channel_map == channel] = scale[channel_map == channel].mean()
        return scale.sqrt()
