"""Ranges of least output error, as far as one group can know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quantkit_kernels.lazy import torch

from quantkit.methods.extent import aligned
from quantkit.methods.feedback import pivots
from quantkit.methods.parts import GroupRange, Work
from quantkit.methods.search import (
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
class WeightedMse:
    """The shrunk range whose nearest rounding costs the group least at the output.

    metric          how errors are weighed, see below
    steps, shrink   candidates are 1, 1 - shrink/steps, .. times the full range, `steps` of them
    damp, act_order for metric pivot: the same as GPTQ's, so that both share one factorisation

    Metrics: "diagonal" weighs a squared error by its channel's mean square, as llama.cpp's
    importance matrix does (https://github.com/ggml-org/llama.cpp/pull/4861).  "gram" takes
    d·H·dᵀ with the group's block H of XᵀX, which also sees how channels move together.  "pivot" is
    made for GPTQ: a channel weighs what its error costs once the channels rounded after it have
    made up for what they can, which is its pivot in the factorisation of XᵀX (the D of LDLQ; Chee
    et al. 2023, https://arxiv.org/abs/2307.13304, equation 4).  Where blocks straddle rows "gram"
    is "diagonal", for whole rows too; where XᵀX cannot be factorised "pivot" is "diagonal".
    """

    metric: Literal["diagonal", "gram", "pivot"] = "diagonal"
    steps: int = 20
    shrink: float = 0.5
    damp: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        if self.metric not in ("diagonal", "gram", "pivot"):
            raise ValueError(f"metric {self.metric!r}: must be diagonal, gram or pivot")
        shrink_factors(self.steps, self.shrink)

    def needs(self, scheme: Scheme) -> Needs:
        """Moments, and the Gram matrix or its blocks as far as the metric reads them."""
        if self.metric == "pivot":
            return Needs(moments=True, gram=-1)
        if self.metric == "gram" and scheme.group_size is not None:
            return Needs(moments=True, gram=scheme.group_size)
        return Needs(moments=True)

    def work(self, rows: int, columns: int, scheme: Scheme) -> Work:
        """One rounding of the weights for each candidate."""
        return search_work(self.steps, rows, columns, scheme, quadratic=self.metric == "gram")

    def __call__(
        self, name: str, weight_OI: Tensor, scheme: Scheme, stats: Stats | None
    ) -> GroupRange:
        """Scale and zero of each group of a float32 weight; `degraded` without statistics."""
        factors = shrink_factors(self.steps, self.shrink)
        if stats is None or stats.count == 0:
            note = "range of least weight error: no calibration token reached this weight"
            if scheme.kind == "ggml":
                return fit_range(weight_OI, scheme, None, degraded=note)
            return search_range(weight_OI, scheme, factors, squared(), degraded=note)
        if scheme.kind == "ggml":
            return fit_range(weight_OI, scheme, self._importance(stats))
        columns = weight_OI.shape[1]
        size = scheme.group_size or columns
        within = aligned(weight_OI, scheme)
        if self.metric == "gram" and within and size < columns:
            cost = quadratic(gram_blocks(stats, size))
            return search_range(weight_OI, scheme, factors, cost)
        importance = self._importance(stats)
        if within:
            return search_range(weight_OI, scheme, factors, squared(importance.view(-1, size)))
        count = -(-weight_OI.numel() // size)
        index = torch.arange(count * size, device=weight_OI.device) % columns
        cost = squared(importance[index].view(count, 1, size))
        return search_range(weight_OI, scheme, factors, cost)

    def _importance(self, stats: Stats) -> Tensor:
        """What a squared error of each channel costs, in parts of the mean, float32 [I]."""
        importance = stats.mean_sq
        if self.metric == "pivot":
            pivot = pivots(stats, damp=self.damp, act_order=self.act_order)
            importance = importance if pivot is None else pivot
        return relative_importance(importance)
