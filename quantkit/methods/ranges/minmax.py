"""Ranges that cover every weight of the group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.methods.extent import aligned, chunks, extent_of, group_range, scale_and_zero
from quantkit.methods.parts import GroupRange
from quantkit.methods.stats import Needs, Stats
from quantkit.methods.superblock import fit_range
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Minmax:
    """The full range of each group: nothing is clipped.

    On nf4 and fp4 this is bitsandbytes' absmax, and codes are computed before absmax is nested, as
    it does (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3).
    """

    def needs(self, scheme: Scheme) -> Needs:
        """Nothing: no calibration data."""
        return Needs()

    def __call__(
        self, name: str, weight_OI: Tensor, scheme: Scheme, stats: Stats | None
    ) -> GroupRange:
        """Scale and zero of each group of a float32 weight; a block type's are fitted to it."""
        if scheme.kind == "ggml":
            return fit_range(weight_OI, scheme, None)
        scales: list[Tensor] = []
        zeros: list[Tensor] = []
        for _, groups in chunks(weight_OI, scheme):
            scale, zero = scale_and_zero(extent_of(groups), scheme)
            scales.append(scale[..., 0])
            if zero is not None:
                zeros.append(zero[..., 0])
        if scheme.flat and weight_OI.numel() % (scheme.group_size or 1):
            # bitsandbytes stores at least this in a last block that is not full.
            scales[-1][-1].clamp_(min=1e-38)
        return group_range(
            torch.cat(scales),
            torch.cat(zeros) if zeros else None,
            scheme,
            straddling=not aligned(weight_OI, scheme),
            code_before_nesting=True,
        )
