"""AWQ's weight clipping."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.methods.extent import aligned
from quantkit.methods.parts import GroupRange, Work
from quantkit.methods.search import (
    clip_magnitude,
    gram_blocks,
    quadratic,
    search_range,
    search_work,
    shrink_factors,
    squared,
)
from quantkit.methods.stats import Needs, Stats
from quantkit.methods.superblock import fit_range, relative_importance
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Clip:
    """AWQ's clip search (Lin et al. 2023, https://arxiv.org/abs/2306.00978, section 5.1 and code).

    steps, shrink   weights are clipped to 1, 1 - shrink/steps, .. times the group's largest
                    magnitude: 1.0 .. 0.55 by default
    skip            globs of weight names that keep their full range: clipping queries and keys,
                    fused with values or not, moves attention scores

    Deviation: the group's output error is d·H·dᵀ with its block H of XᵀX over all calibration
    tokens, where the authors multiply 512 sampled tokens.
    """

    steps: int = 10
    shrink: float = 0.5
    skip: tuple[str, ...] = ("*q_proj*", "*k_proj*", "*qkv*", "*query*", "*c_attn*")

    def __post_init__(self) -> None:
        shrink_factors(self.steps, self.shrink)

    def needs(self, scheme: Scheme) -> Needs:
        """The Gram matrix's blocks (all of it for whole rows); moments for block types."""
        if scheme.kind == "ggml":
            return Needs(moments=True)
        return Needs(gram=scheme.group_size or -1)

    def work(self, rows: int, columns: int, scheme: Scheme) -> Work:
        """One rounding of the weights for each candidate."""
        return search_work(self.steps, rows, columns, scheme, quadratic=True)

    def __call__(
        self, name: str, weight_OI: Tensor, scheme: Scheme, stats: Stats | None
    ) -> GroupRange:
        """Scale and zero of each group of a float32 weight; `degraded` without statistics.

        A block type's scales are fitted by least squares, weighted by each channel's mean square.
        """
        if scheme.kind == "ggml":
            if stats is None or stats.count == 0:
                note = "fitted without weights: no calibration token reached this weight"
                return fit_range(weight_OI, scheme, None, degraded=note)
            return fit_range(weight_OI, scheme, relative_importance(stats.mean_sq))
        if any(fnmatch.fnmatchcase(name, glob) for glob in self.skip):
            return search_range(weight_OI, scheme, [1.0], squared())
        factors = shrink_factors(self.steps, self.shrink)
        if stats is None or stats.count == 0:
            note = "not clipped: no calibration token reached this weight"
            return search_range(weight_OI, scheme, [1.0], squared(), degraded=note)
        if not aligned(weight_OI, scheme):
            note = f"not clipped: blocks of {scheme.group_size} straddle rows"
            return search_range(weight_OI, scheme, [1.0], squared(), degraded=note)
        blocks = gram_blocks(stats, scheme.group_size or weight_OI.shape[1])
        return search_range(weight_OI, scheme, factors, quadratic(blocks), clip_magnitude)
