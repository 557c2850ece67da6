"""What learning by gradient descent shares: Adam's directions, and scales that grow by factors.

Shapes: O out features, I in features, G groups per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.numbers.grid import store_scale
from quantkit.numbers.tensor import PlainScale

if TYPE_CHECKING:
    from torch import Tensor

# Adam's memory of gradients and of their squares.
_BETA, _BETA_SQUARE = 0.9, 0.95
# Below any slope that a loss of a part of 10^-9 has.
_TINY = 1e-30


class Adam:
    """Directions of Adam's steps: mean gradient over the root of the mean square (Kingma, Ba 2014,
    https://arxiv.org/abs/1412.6980, algorithm 1)."""

    def __init__(self, like: Tensor) -> None:
        self._mean, self._square = torch.zeros_like(like), torch.zeros_like(like)

    @property
    def state(self) -> dict[str, Tensor]:
        """What the next direction depends on, by name: not copies."""
        return {"mean": self._mean, "square": self._square}

    def direction(self, slope: Tensor, number: int) -> Tensor:
        """The direction of step `number`, from 1 on; zero where no gradient ever came."""
        self._mean.lerp_(slope, 1 - _BETA)
        self._square.mul_(_BETA_SQUARE).addcmul_(slope, slope, value=1 - _BETA_SQUARE)
        root = (self._square / (1 - _BETA_SQUARE**number)).sqrt_().add_(_TINY)
        return (self._mean / (1 - _BETA**number)).div_(root)


class LearnedScales:
    """A weight's scales times factors whose logarithms are learned; `values` are those stored."""

    def __init__(self, start_OG: Tensor, *, half: bool) -> None:
        """half: see `store_scale`."""
        self._start_OG, self._half = start_OG, half
        self._growth_OG = torch.zeros_like(self._start_OG)
        self._adam = Adam(self._growth_OG)
        self.values = self._start_OG

    @property
    def state(self) -> dict[str, Tensor]:
        """What the next step depends on, by name, float32 [O, G] each: not copies.  After a change
        `refresh` it."""
        return {"growth": self._growth_OG, **self._adam.state}

    def refresh(self) -> None:
        """Has `values` follow the state."""
        self.values = store_scale(self._start_OG * self._growth_OG.exp(), half=self._half)

    def slope(self, slope_OI: Tensor, value_OI: Tensor) -> Tensor:
        """The gradient by the logarithms [O, G], from that by the weight, whose value is given.

        With w = (c - z) s, dw/d(log s) = w, summed over a group.
        """
        return (slope_OI.to(torch.float32) * value_OI).view(*self.values.shape, -1).sum(-1)

    def step_(self, slope_OG: Tensor, number: int, rate: float) -> None:
        """Step `number`, from 1 on, against the gradient by the logarithms."""
        self._growth_OG -= rate * self._adam.direction(slope_OG, number)
        self.refresh()

    def scale(self) -> PlainScale:
        """The scales as they are now."""
        return PlainScale(tensor=self.values.clone())


def judging_batches(held_out: float, batches: int) -> int:
    """How many of the batches, the last ones, judge.  With a single one it does both."""
    return min(max(1, round(held_out * batches)), max(1, batches - 1))


def check_descent(iterations: int, looks: int, held_out: float) -> None:
    """Raises ValueError for options that no descent has."""
    if iterations < 1 or looks < 1:
        raise ValueError(f"iterations {iterations}, looks {looks}: must be at least 1")
    if not 0 < held_out <= 0.5:
        raise ValueError(f"held_out {held_out}: must lie in 0..0.5 and not be 0")
