"""SmoothQuant: moves activation outliers into the weights, so that both fit 8 bits.

Shapes: O out features, I in features, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.methods.extent import snap_rows
from quantkit.methods.parts import Reader, Work
from quantkit.methods.stats import SAMPLE_ROWS, Needs, Stats
from quantkit.methods.transforms._channels import pool
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

# Output rows evaluated at a time, so that temporaries stay small.
_CHUNK_ROWS = 4096
_FLOOR = 1e-5


@dataclass(frozen=True, kw_only=True)
class Smoothquant:
    """SmoothQuant (Xiao et al. 2022, https://arxiv.org/abs/2211.10438, equation 4).

    s = max|x|^alpha / max|w|^(1-alpha) per input channel, the maximum over all readers.

    alphas   tried one by one; 1.0 moves all of an outlier into the weights

    Deviations: the paper takes one alpha for the whole model; here each group of readers takes the
    one with the least squared output error on the sampled tokens, activations in 8 bits per token
    and weights in theirs; when none beats s = 1, the group stays as it is.  A channel that
    calibration never saw active keeps s = 1.  Readers with 16-bit activations are left alone.
    """

    alphas: tuple[float, ...] = (0.3, 0.5, 0.65, 0.8, 0.9)

    def __post_init__(self) -> None:
        if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise ValueError(f"alphas {self.alphas}: one or more numbers in 0..1")

    def needs(self, scheme: Scheme) -> Needs:
        """Moments and the sampled tokens; nothing for 16-bit activations."""
        if scheme.activation_bits == 16:
            return Needs()
        return Needs(moments=True, sample=True)

    def work(self, rows: int, columns: int, scheme: Scheme) -> Work:
        """Two products with the sampled tokens for each alpha, and for none."""
        tried = (1 + len(self.alphas)) * float(rows * columns)
        return Work(products=4 * SAMPLE_ROWS * tried, passes=12 * tried)

    def __call__(
        self, readers: Sequence[Reader], stats: Stats, channel_map: Tensor | None
    ) -> Tensor | None:
        """s float32 [I] > 0, or None if no alpha beats s = 1."""
        quantized = [r for r in readers if r.scheme is not None and r.scheme.activation_bits == 8]
        if stats.count == 0 or stats.sample is None or not quantized:
            return None
        sample = stats.sample.to(torch.float32)
        weight_max = torch.stack([r.weight.abs().amax(0) for r in quantized]).amax(0)
        least, best = _error(quantized, sample, None), None
        for alpha in self.alphas:
            scale = _scale(stats.max_abs, weight_max, alpha, channel_map)
            error = _error(quantized, sample, scale)
            if error < least:
                least, best = error, scale
        return best


def _scale(
    activation_max: Tensor, weight_max: Tensor, alpha: float, channel_map: Tensor | None
) -> Tensor:
    if channel_map is not None:
        activation_max = pool(activation_max, channel_map, "amax")
        weight_max = pool(weight_max, channel_map, "amax")
    live = (activation_max > 0) & (weight_max > 0)
    # Floors are parts of the largest: a model's units are its own.
    activation = activation_max.clamp(min=_FLOOR * activation_max.max())
    weight = weight_max.clamp(min=_FLOOR * weight_max.max())
    return torch.where(live, activation**alpha / weight ** (1 - alpha), 1.0)


def _error(readers: Sequence[Reader], sample_SI: Tensor, scale_I: Tensor | None) -> float:
    """Squared error of the readers' outputs with both sides in 8 bits."""
    smoothed = sample_SI if scale_I is None else sample_SI / scale_I
    step = smoothed.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / 127
    inputs = torch.round(smoothed / step).mul_(step)
    total = 0.0
    for reader in readers:
        assert reader.scheme is not None
        for weight in reader.weight.split(_CHUNK_ROWS):
            scaled = weight if scale_I is None else weight * scale_I
            output = inputs @ snap_rows(scaled, reader.scheme).t()
            output.addmm_(sample_SI, weight.t(), alpha=-1)
            total += float(output.square_().sum(dtype=torch.float64))
    return total
