"""Rotations by Hadamard's matrix and signs: outliers of a channel are spread over all of them.

Shapes: n vectors, I channels; I = P * M, P the largest power of two that divides it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Hadamard:
    """R = diag(signs) (H_P (x) C_M): QuaRot's randomized Hadamard matrix (Ashkboos et al. 2024,
    https://arxiv.org/abs/2404.00456, section 3).

    stream   rotate the residual stream between the blocks (R1)
    heads    rotate each head of values (R2)
    untie    store a tied output head as a tensor of its own, which `stream` needs
    seed     of the signs

    Deviations: where I is no power of two, the factor beside H_P is the orthonormal Hartley
    transform C_M, not a Hadamard matrix from a table, so that every I has a rotation.  Of the
    paper's rotations only those are here that leave nothing to do at run time.
    """

    stream: bool = True
    heads: bool = True
    untie: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.stream or self.heads):
            raise ValueError("stream and heads are both false: nothing is rotated")

    def __call__(self, x_nI: Tensor, key: str) -> Tensor:
        """x R, float64 [n, I]; the signs come from the seed and `key`.

        Sums are added up element by element in an order of their own, so that a row has the same
        bits whatever rows come with it.
        """
        size = x_nI.shape[-1]
        power = size & -size
        x = x_nI.double() * _signs(f"{self.seed} {key}", size)
        x = _hartley(x.reshape(-1, power, size // power))
        width = 1
        while width < power:
            low, high = x.view(-1, power // (2 * width), 2, width, size // power).unbind(2)
            x = torch.stack([low + high, low - high], dim=2)
            width *= 2
        return x.reshape(x_nI.shape) / math.sqrt(power)


def _hartley(x_nPM: Tensor) -> Tensor:
    """x C over the last axis, C[i, j] = (cos + sin)(2 pi i j / M) / sqrt(M): orthogonal."""
    size = x_nPM.shape[-1]
    if size == 1:
        return x_nPM
    step = torch.arange(size, dtype=torch.float64)
    angle = (2 * math.pi / size) * (step[:, None] * step % size)
    matrix = (angle.cos() + angle.sin()) / math.sqrt(size)
    total = torch.zeros_like(x_nPM)
    for channel in range(size):
        total += x_nPM[..., channel : channel + 1] * matrix[channel]
    return total


def _signs(text: str, size: int) -> Tensor:
    """Signs [size], float64, of a hash: no generator's next version changes them."""
    data = hashlib.shake_256(text.encode()).digest(-(-size // 8))
    bits = torch.tensor([byte >> bit & 1 for byte in data for bit in range(8)])
    return 1.0 - 2.0 * bits[:size].double()
