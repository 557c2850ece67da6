"""Scales trained end to end: codes stay, their scales follow the original's logits."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.methods.descent import check_descent, judging_batches
from quantkit.methods.parts import Work
from quantkit.numbers.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Training of scales alone (EfficientQAT's second phase, Chen et al. 2024,
    https://arxiv.org/abs/2407.11062, section 3.3) against the original's logits.

    bits        weights of more bits keep their scales
    iterations  steps, each on one batch of the calibration
    rate        length of the first step as a part of a scale; steps shorten linearly to zero
    held_out    part of the batches that only judge: the best of the looks at them is taken, the
                start included
    looks       how often they are looked at

    Deviations from the paper: the loss is the KL divergence from the original model (its own is
    that of language modelling); a scale's logarithm is what is learned; text that is held out
    chooses the step.
    """

    bits: int = 3
    iterations: int = 60
    rate: float = 0.003
    held_out: float = 0.0625
    looks: int = 3

    def __post_init__(self) -> None:
        check_descent(self.iterations, self.looks, self.held_out)
        if self.rate <= 0:
            raise ValueError(f"rate {self.rate}: must be above 0")

    def takes(self, scheme: Scheme) -> bool:
        """Integers of at most `bits` whose inputs are not rounded."""
        plain = scheme.kind == "int" and scheme.activation_bits == 16
        return plain and scheme.bits <= self.bits

    def judges(self, batches: int) -> int:
        """How many of the batches, the last ones, judge.  With a single one it does both."""
        return judging_batches(self.held_out, batches)

    def looks_after(self, step: int) -> bool:
        """Whether what is held out is looked at after a step, the first being 0."""
        done, before = ((step + k) * self.looks // self.iterations for k in (1, 0))
        return done > before

    def steps(self, batches: int) -> tuple[int, int]:
        """A gradient for each iteration; the batches that judge at the start and at each look."""
        return self.iterations, (1 + min(self.looks, self.iterations)) * self.judges(batches)

    def work(self, rows: int, columns: int, scheme: Scheme) -> Work:
        """Decoding and the slopes of scales, in each step; products are the model's."""
        return Work(passes=self.iterations * 15.0 * rows * columns)
