"""Qronos: on inputs that carry the errors made so far, the outputs of the original model.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.methods.parts import Retargeted, Work
from quantkit.methods.stats import Needs, Stats
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

# The least damping that float32 needs, and what it is raised by where a factorisation fails.
_LIMIT, _RAISE = 1.0, 10.0


@dataclass(frozen=True, kw_only=True)
class Qronos:
    """The weight whose outputs on the quantized model's inputs are nearest to the original's.

    Zhang, Colbert et al. 2025 (https://arxiv.org/abs/2505.11695); GPTAQ (Li et al. 2025,
    https://arxiv.org/abs/2504.02692) minimises the same.  For each row w of a weight, X the
    original model's inputs and Y the quantized one's,

        ‖X w - Y v‖² + λ‖w - v‖²  =  (w' - v)(YᵀY + λI)(w' - v)ᵀ + what no v changes
        w' = w + w Dᵀ (YᵀY + λI)⁻¹,  D = Yᵀ(X - Y)

    so that any range and rounding may follow, on w' in the place of w.

    damp   λ, as a part of the mean of the diagonal of YᵀY
    share  part of the way from w to w' that is gone, 0 to 1

    The last matrix of a block makes up for more, where its outputs are a summand of the block's:
    with R what the block's output lacks, YᵀR takes the place of D wᵀ (Lin, Wan 2025,
    https://arxiv.org/abs/2509.06297, the output of a sub-block).

    Deviations: w' is taken for all channels before the first is rounded, where Qronos and GPTAQ
    correct the remaining ones after each; inputs that only some tokens reach (routed experts) keep
    their own outputs as the target, because the two models route differently; no paper has
    `share`; a row of zeros stays one.
    """

    damp: float = 0.01
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp {self.damp}: must lie above 0 and be at most 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share {self.share}: must lie in 0..1")

    def needs(self, scheme: Scheme) -> Needs:
        """The full Gram matrix, and how the inputs drifted."""
        return Needs(gram=-1, drift=True)

    def work(self, rows: int, columns: int, scheme: Scheme) -> Work:
        """A factorisation and two triangular solutions for every row."""
        products = columns**3 / 3 + 4.0 * rows * columns**2
        return Work(products=products, passes=4.0 * rows * columns)

    def __call__(self, weight_OI: Tensor, stats: Stats | None) -> Retargeted:
        """w' of every row of a float32 weight."""
        if stats is None or stats.count == 0:
            return Retargeted(weight=weight_OI)
        if stats.lack is not None:
            right_IO = stats.lack
        elif stats.drift is not None:
            right_IO = stats.drift @ weight_OI.t()
        else:
            return Retargeted(weight=weight_OI)
        assert stats.gram is not None
        mean = float(stats.gram.diagonal().mean(dtype=torch.float64))
        damp = self.damp
        while mean > 0:
            matrix = stats.gram.clone()
            matrix.diagonal().add_(damp * mean)
            lower, info = torch.linalg.cholesky_ex(matrix)
            del matrix
            if int(info) == 0:
                pulled = torch.cholesky_solve(right_IO, lower).t()
                # Rows that were pruned stay so.
                pulled = pulled * (weight_OI != 0).any(dim=1, keepdim=True)
                moved = torch.add(weight_OI, pulled, alpha=self.share)
                note = None if damp == self.damp else f"target: damping raised to {damp:g}"
                return Retargeted(weight=moved.contiguous(), degraded=note)
            if damp >= _LIMIT:
                break
            damp = min(damp * _RAISE, _LIMIT)
        return Retargeted(
            weight=weight_OI,
            degraded="its own outputs are the target: the Gram matrix has no Cholesky factor",
        )
