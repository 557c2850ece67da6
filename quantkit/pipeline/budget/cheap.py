"""Cheap rounding: the method's range and rounding alone, and what rounding to nearest costs.

Letters: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.methods.parts import Range, Rounding, make_part
from quantkit.methods.recipe import Recipe
from quantkit.methods.rounding.nearest import Nearest
from quantkit.methods.stats import Stats
from quantkit.model.causal import CausalModel
from quantkit.model.refs import WeightRef
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.solve import quantize_weights

# Rows of each weight that errors of all schemes are compared on.
_SAMPLED_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class Cheap:
    """The parts of a recipe that a measurement takes."""

    range: Range
    rounding: Rounding

    @classmethod
    def of(cls, recipe: Recipe) -> Cheap:
        """The recipe's range, and its rounding without what refines it afterwards."""
        options = {key: value for key, value in recipe.rounding.options if key != "sweeps"}
        rounding: Rounding = make_part("rounding", recipe.rounding.name, options)
        return cls(range=recipe.make_range(), rounding=rounding)

    def decoded(
        self,
        model: CausalModel,
        refs: Sequence[WeightRef],
        weights: Sequence[Tensor],
        scheme: Scheme,
        stats: Stats | None,
        *,
        rounding: Rounding | None = None,
    ) -> list[Tensor]:
        """Weights [O, I] of one input as they decode from the scheme."""
        stored = model.source.info(refs[0].name).dtype
        solved = quantize_weights(
            refs,
            weights,
            scheme,
            stats,
            # The original's activations are measured: nothing has drifted.
            target=None,
            range_part=self.range,
            rounding=rounding or self.rounding,
            dtype=torch.float32 if scheme.kind == "ggml" else stored,
        )
        return [each.tensor.dequantize() for each in solved]

    def errors(
        self,
        model: CausalModel,
        inputs: Sequence[tuple[Sequence[WeightRef], Stats | None, Sequence[Tensor]]],
        schemes: Mapping[Scheme, int],
    ) -> dict[Scheme, float]:
        """Scheme -> relative output error of rounding to nearest on some rows, over all weights.

        inputs: for each, its weights, their statistics and values.
        """
        found = dict.fromkeys(schemes, 0.0)
        for refs, stats, weights in inputs:
            rows = [_sample(weight) for weight in weights]
            for scheme in found:
                values = self.decoded(model, refs, rows, scheme, stats, rounding=Nearest())
                for weight, value in zip(rows, values, strict=True):
                    whole = _energy(weight.float(), stats)
                    lost = _energy(weight.float() - value.float(), stats)
                    found[scheme] += lost / whole if whole > 0 else 0.0
        return found

    def rows_as(
        self, model: CausalModel, ref: WeightRef, scheme: Scheme, stats: Stats | None
    ) -> Callable[[Tensor], Tensor]:
        """What makes of some rows [R, I] of a weight those that decode from the scheme."""

        def change(rows_RI: Tensor) -> Tensor:
            (value,) = self.decoded(model, [ref], [rows_RI], scheme, stats)
            return value.to(rows_RI)

        return change


def _sample(weight_OI: Tensor) -> Tensor:
    """Rows at equal distances."""
    return weight_OI[:: max(1, len(weight_OI) // _SAMPLED_ROWS)]


def _energy(weight_OI: Tensor, stats: Stats | None) -> float:
    """tr(W H Wᵀ), with the diagonal of H where only that is known, or plain squares."""
    if stats is None or stats.count == 0:
        return float(weight_OI.square().sum())
    if stats.gram is not None and stats.gram.ndim == 2:
        return float(((weight_OI @ stats.gram) * weight_OI).sum())
    return float((weight_OI.square() @ stats.sum_sq.float()).sum())
