"""Ranges of least squared weight error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.methods.parts import GroupRange, Work
from quantkit.methods.search import search_range, search_work, shrink_factors, squared
from quantkit.methods.stats import Needs, Stats
from quantkit.methods.superblock import fit_range
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Mse:
    """The shrunk range whose nearest rounding has the least squared error in each group.

    steps, shrink   candidates are 1, 1 - shrink/steps, .. times the full range, `steps` of them

    After the `find_params` search of GPTQ's code (Frantar et al. 2022,
    https://arxiv.org/abs/2210.17323), which takes the 2.4th power of the error, not its square.
    """

    steps: int = 20
    shrink: float = 0.5

    def __post_init__(self) -> None:
        shrink_factors(self.steps, self.shrink)

    def needs(self, scheme: Scheme) -> Needs:
        """Nothing: no calibration data."""
        return Needs()

    def work(self, rows: int, columns: int, scheme: Scheme) -> Work:
        """One rounding of the weights for each candidate."""
        return search_work(self.steps, rows, columns, scheme, quadratic=False)

    def __call__(
        self, name: str, weight_OI: Tensor, scheme: Scheme, stats: Stats | None
    ) -> GroupRange:
        """Scale and zero of each group of a float32 weight; a block type's are fitted to it."""
        if scheme.kind == "ggml":
            return fit_range(weight_OI, scheme, None)
        factors = shrink_factors(self.steps, self.shrink)
        return search_range(weight_OI, scheme, factors, squared())
