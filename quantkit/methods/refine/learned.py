"""Codes and scales learned by gradient descent on a block's outputs, from those that are there.

Shapes: O out features, I in features, G groups per row, B weights per group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.methods.descent import Adam, LearnedScales, check_descent, judging_batches
from quantkit.methods.parts import Outputs, Refined, Work
from quantkit.numbers.grid import IntegerGrid, grid_of
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import QuantizedTensor, decode_rows

if TYPE_CHECKING:
    from torch import Tensor

# How far beyond the middle between two codes a real number may go at the ends of the grid.
_EDGE = 0.49


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Descent on codes and scales through a whole block, in the manner of AutoRound (Cheng et al.
    2023, https://arxiv.org/abs/2309.05516, section 3), from the solution that is there.

    bits        weights of more bits are left as they are
    iterations  steps, each on one batch of the calibration
    scales      length of the first step, as a part of a scale; steps shorten linearly to zero
    codes       the same in units of a code; 0 leaves them alone
    held_out    part of the batches that only judge: the best of the looks at them is taken, the
                start included
    looks       how often they are looked at

    Each code stands for a real number that rounds to it; its gradient is taken as if it were not
    rounded (the straight-through estimator, Bengio et al. 2013, https://arxiv.org/abs/1308.3432).

    Deviations from AutoRound: it starts from codes that are there, not from the weights; steps are
    Adam's (Kingma, Ba 2014, https://arxiv.org/abs/1412.6980), not signs; scales are learned as they
    are, not the ends of ranges; text that is held out, not the text it is fitted to, chooses the
    best step.
    """

    bits: int = 3
    iterations: int = 64
    codes: float = 0.0
    scales: float = 0.002
    held_out: float = 0.0625
    looks: int = 4

    def __post_init__(self) -> None:
        check_descent(self.iterations, self.looks, self.held_out)
        if self.codes < 0 or self.scales < 0:
            raise ValueError(f"codes {self.codes}, scales {self.scales}: must be 0 or more")

    def takes(self, scheme: Scheme) -> bool:
        """Integers of at most `bits` whose inputs are not rounded."""
        plain = scheme.kind == "int" and scheme.activation_bits == 16
        return plain and scheme.bits <= self.bits

    def judges(self, batches: int) -> int:
        """How many of the batches, the last ones, judge.  With a single one it does both."""
        return judging_batches(self.held_out, batches)

    def steps(self, batches: int) -> tuple[int, int]:
        """A gradient for each iteration; the batches that judge at the start and at each look."""
        looks = min(self.looks, self.iterations)
        return self.iterations, (1 + looks) * self.judges(batches)

    def held_bytes(self) -> int:
        """Where codes learn: real numbers for them, two means of gradients, and the best so far."""
        return 3 * 4 + 1 if self.codes else 0

    def work(self, rows: int, columns: int, scheme: Scheme) -> Work:
        """What each step does to the numbers themselves; products are the block's."""
        return Work(passes=self.iterations * 25.0 * rows * columns)

    def __call__(self, tensors: Sequence[QuantizedTensor], outputs: Outputs) -> Refined:
        """The weights refined; they lie in the block when this returns, or others."""
        latents = [_Latent(tensor, moves=self.codes > 0) for tensor in tensors]
        judges = self.judges(outputs.batches)
        fitted = max(outputs.batches - judges, 1)

        def judged() -> float:
            outputs.put_(latent.decoded() for latent in latents)
            last = range(outputs.batches - 1, outputs.batches - 1 - judges, -1)
            return sum(outputs.losses(last)) / judges

        before = after = judged()
        best = list(tensors)
        order = torch.Generator().manual_seed(0)
        batches: list[int] = []
        for step in range(self.iterations):
            batches = batches or torch.randperm(fitted, generator=order).tolist()
            _, slopes = outputs.slopes(batches.pop())
            left = 1 - step / self.iterations
            for latent, slope in zip(latents, slopes, strict=True):
                latent.step_(slope, step + 1, codes=left * self.codes, scales=left * self.scales)
            if (step + 1) * self.looks // self.iterations > step * self.looks // self.iterations:
                now = judged()
                if now < after:
                    after, best = now, [latent.tensor() for latent in latents]
            else:
                outputs.put_(latent.decoded() for latent in latents)
        return Refined(tensors=best, before=before, after=after)


class _Latent:
    """The real numbers that stand for a weight's codes if they move, and its scales' logarithms."""

    def __init__(self, tensor: QuantizedTensor, *, moves: bool = True) -> None:
        grid = grid_of(tensor.scheme)
        assert isinstance(grid, IntegerGrid) and tensor.columns is None
        self._given = tensor
        self._lowest, self._highest = grid.low - _EDGE, grid.high + _EDGE
        self._real_OI = tensor.codes.to(torch.float32) if moves else None
        self._codes = None if self._real_OI is None else Adam(self._real_OI)
        self._scales = LearnedScales(tensor.scale.values(), half=tensor.scheme.half_scales)

    def decoded(self) -> Tensor:
        """The weight as it is now, float32 [O, I]."""
        given, real_OI = self._given, self._real_OI
        codes_OI = given.codes if real_OI is None else real_OI.round()
        return decode_rows(codes_OI, self._scales.values, given.zero, given.scheme)

    def tensor(self) -> QuantizedTensor:
        """The weight as it is now, as stored."""
        codes = self._given.codes
        if self._real_OI is not None:
            codes = self._real_OI.round().to(torch.uint8)
        return dataclasses.replace(self._given, codes=codes, scale=self._scales.scale())

    def slope(self, slope_OI: Tensor) -> Tensor:
        """The gradient by the real codes [O, I], from the weight's: with w = (c - z) s it is s
        times that."""
        scale_OG = self._scales.values
        slope_OGB = slope_OI.to(torch.float32).view(*scale_OG.shape, -1)
        return (slope_OGB * scale_OG[..., None]).view(slope_OI.shape)

    def scale_slope(self, slope_OI: Tensor) -> Tensor:
        """The gradient by the scales' logarithms [O, G]."""
        return self._scales.slope(slope_OI, self.decoded())

    def step_(self, slope_OI: Tensor, number: int, *, codes: float, scales: float) -> None:
        """One step against the gradient by the weight."""
        by_scale = self.scale_slope(slope_OI) if scales else None
        if self._real_OI is not None and self._codes is not None:
            self._real_OI -= codes * self._codes.direction(self.slope(slope_OI), number)
            self._real_OI.clamp_(self._lowest, self._highest)
        if by_scale is not None:
            self._scales.step_(by_scale, number, scales)
