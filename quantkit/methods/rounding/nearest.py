"""Round to nearest: each weight to the closest value of its group's grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quantkit.methods.nearest import nearest_codes
from quantkit.methods.parts import Rounded
from quantkit.methods.stats import Needs, Stats
from quantkit.numbers.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The code of the nearest grid value, ties to even multiples of the scale (nf4, fp4: down)."""

    def needs(self, scheme: Scheme) -> Needs:
        """Nothing: no calibration data."""
        return Needs()

    def __call__(
        self,
        weight_OI: Tensor,
        scheme: Scheme,
        scale: Tensor,
        zero: Tensor | None,
        stats: Stats | None,
    ) -> Rounded:
        """Codes of a float32 weight; scale and zero: float32 [O, G] ([N] for flat blocks)."""
        return Rounded(codes=nearest_codes(weight_OI, scheme, scale, zero))
