"""AWQ: scales that spend the grid's precision on the input channels that matter.

Shapes: O out features (of all readers together), I in features, G groups per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quantkit_kernels.lazy import torch

from quantkit.methods.extent import snap_rows
from quantkit.methods.feedback import pivots
from quantkit.methods.parts import Reader, Work
from quantkit.methods.stats import Needs, Stats
from quantkit.methods.transforms._channels import pool
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

# Steps of the first walk along the grid of r.
_COARSE = 4


@dataclass(frozen=True, kw_only=True)
class Awq:
    """AWQ's scale search (Lin et al. 2023, https://arxiv.org/abs/2306.00978, equations 4 and 5).

    s = mean|x|^r, or mean|x|^r / mean|w|^(1-r) with w normalised in its group (the variant of the
    authors' later code, "duo"), for r = 0, 1/grid, ..; s is divided by the root of its largest
    times its smallest entry.

    grid   values of r
    metric "gram": the readers' output error when rounded to nearest; "pivot": what of it GPTQ
           cannot make up for, see below
    duo    "both" tries s with and without the weight term, "never" and "always" one of them
    rows   output rows the search looks at, spread evenly over the readers; 0 for all
    damp, act_order  for metric pivot: GPTQ's

    Deviations: the error is tr(ΔW·XᵀX·ΔWᵀ) of the readers, on all calibration tokens, where the
    authors re-run the block on a sample; r walks downhill in steps of 4/grid, and its neighbours
    are tried at 2/grid and, of the better variant, at 1/grid; when no s beats s = 1, the group
    stays as it is.  Metric pivot serves recipes that round with GPTQ: there a rounding error costs
    its square times the channel's pivot in the factorisation of XᵀX (Chee et al. 2023,
    https://arxiv.org/abs/2307.13304, equation 4), whatever s is, since scaling divides the pivot by
    s².
    """

    grid: int = 20
    metric: Literal["gram", "pivot"] = "gram"
    duo: Literal["both", "never", "always"] = "both"
    rows: int = 256
    damp: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise ValueError(f"grid {self.grid}: must be at least 1")
        if self.duo not in ("both", "never", "always"):
            raise ValueError(f"duo {self.duo!r}: must be both, never or always")
        if self.metric not in ("gram", "pivot"):
            raise ValueError(f"metric {self.metric!r}: must be gram or pivot")
        if self.rows < 0:
            raise ValueError(f"rows {self.rows}: must be 0 (all) or more")

    def needs(self, scheme: Scheme) -> Needs:
        """Moments and the full Gram matrix."""
        return Needs(moments=True, gram=-1)

    def work(self, rows: int, columns: int, scheme: Scheme) -> Work:
        """About fifteen candidates, each a product with the Gram matrix."""
        seen = min(rows, self.rows or rows)
        return Work(products=15 * 2.0 * seen * columns**2, passes=15 * 15.0 * seen * columns)

    def __call__(
        self, readers: Sequence[Reader], stats: Stats, channel_map: Tensor | None
    ) -> Tensor | None:
        """s float32 [I] > 0, or None if no candidate beats s = 1."""
        quantized = [reader for reader in readers if reader.scheme is not None]
        if not quantized or not bool((stats.sum_abs > 0).any()):
            return None
        return _Search(self, quantized, stats, channel_map).best()


class _Search:
    def __init__(
        self, part: Awq, readers: Sequence[Reader], stats: Stats, channel_map: Tensor | None
    ) -> None:
        assert stats.gram is not None and stats.gram.ndim == 2
        self.part = part
        self.gram, self.pivot = stats.gram, None
        if part.metric == "pivot":
            self.pivot = pivots(stats, damp=part.damp, act_order=part.act_order)
        self.activation, self.relative = stats.mean_abs, _relative_magnitude(readers)
        if channel_map is not None:
            self.activation = pool(self.activation, channel_map, "mean")
            self.relative = pool(self.relative, channel_map, "mean")
        self.live = self.activation > 0
        # s has no unit, so the floors below are parts of the mean.
        self.activation = self.activation / self.activation[self.live].mean()
        self.samples: list[tuple[Scheme, Tensor]] = []
        for scheme in dict.fromkeys(r.scheme for r in readers if r.scheme is not None):
            rows = [_sample(r.weight, part.rows, readers) for r in readers if r.scheme == scheme]
            self.samples.append((scheme, torch.cat(rows)))

    def best(self) -> Tensor | None:
        """The scale of least error, None if that is s = 1."""
        grid = self.part.grid
        duos = {"both": (False, True), "never": (False,), "always": (True,)}[self.part.duo]
        tried: dict[tuple[bool, int], float] = {}

        def error(duo: bool, step: int) -> float:
            if not 0 <= step < grid:
                return math.inf
            if (duo, step) not in tried:
                tried[duo, step] = self.error(self.scale(duo, step / grid))
            return tried[duo, step]

        for duo in duos:
            step = _COARSE
            toward = -_COARSE if error(duo, step) <= error(duo, 2 * step) else _COARSE
            while error(duo, step + toward) < error(duo, step):
                step += toward
            error(duo, step - _COARSE // 2)
            error(duo, step + _COARSE // 2)
        duo, step = min(tried, key=lambda key: tried[key])
        error(duo, step - 1)
        error(duo, step + 1)
        duo, step = min(tried, key=lambda key: tried[key])
        if tried[duo, step] >= self.error(None):
            return None
        return self.scale(duo, step / grid)

    def scale(self, duo: bool, ratio: float) -> Tensor:
        """The candidate s, float32 [I]."""
        scale = self.activation.clamp(min=1e-8) ** ratio
        if duo:
            scale = scale / (self.relative ** (1 - ratio) + 1e-4)
        chosen = scale[self.live].clamp_(min=1e-4)
        scale = scale.clamp(min=1e-4) / (chosen.max() * chosen.min()).sqrt()
        return torch.where(self.live, scale, 1.0)

    def error(self, scale: Tensor | None) -> float:
        """tr(ΔW·XᵀX·ΔWᵀ) of the sampled rows for a candidate (None: s = 1)."""
        total = 0.0
        for scheme, weight in self.samples:
            scaled = weight if scale is None else weight * scale
            delta = snap_rows(scaled, scheme).sub_(scaled)
            if scale is not None:
                delta.div_(scale)
            if self.pivot is not None:
                total += float((delta.square_() @ self.pivot).sum(dtype=torch.float64))
                continue
            total += float((delta @ self.gram).mul_(delta).sum(dtype=torch.float64))
        return total


def _sample(weight_OI: Tensor, rows: int, readers: Sequence[Reader]) -> Tensor:
    """Evenly spread rows: this reader's share of `rows`."""
    everything = sum(r.weight.shape[0] for r in readers)
    if rows == 0 or everything <= rows:
        return weight_OI
    share = max(1, round(rows * weight_OI.shape[0] / everything))
    index = torch.arange(share, device=weight_OI.device) * weight_OI.shape[0] // share
    return weight_OI[index]


def _relative_magnitude(readers: Sequence[Reader]) -> Tensor:
    """Mean over all rows of |w| / (largest |w| of its group), float32 [I]."""
    total, rows = torch.zeros_like(readers[0].weight[0]), 0
    for reader in readers:
        weight = reader.weight
        assert reader.scheme is not None
        columns = weight.shape[1]
        size = reader.scheme.group_size or columns
        groups = weight.view(weight.shape[0], -1, size if columns % size == 0 else columns).abs()
        largest = groups.amax(-1, keepdim=True)
        share = groups / torch.where(largest > 0, largest, 1.0)
        total = total + share.view(weight.shape).sum(0)
        rows += weight.shape[0]
    return total / rows
