"""Activations in few bits: what a layer does to its input, in one place.

The pipeline, which must show later blocks the error of earlier ones, and the running model use the
same codes.  Shapes: T tokens (any leading dimensions), I in features, G groups per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.numbers.grid import E4M3_LARGEST, E4M3_SMALLEST, Float8Grid, float_scale, grid_of
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

# Symmetric, so that -128 stays unused: codes and weights then share one absmax / 127 rule.
_LIMIT = 127.0
# The largest e2m1 number times the largest e4m3 scale: what a divisor of nvfp4 spreads over.
_DIVIDED = 6.0 * E4M3_LARGEST


@dataclass(frozen=True, kw_only=True)
class InputRounding:
    """What a layer of a scheme does to its input; see `fake_quantize_activation`."""

    scheme: Scheme
    scale: Tensor | None = None

    def __call__(self, x_TI: Tensor) -> Tensor:
        """x as the layer sees it, in its dtype."""
        return fake_quantize_activation(x_TI, self.scheme, self.scale)


def quantize_activation(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., I] in -127..127 and scales float32 [..., 1]: absmax / 127 of each token.

    Ties round to the even code; a token of zeros has codes 0.  NaN or infinity gives a scale of
    the same kind, so that it shows in whatever is computed from it.
    """
    x, scale = _scaled(x_TI, _LIMIT)
    codes = torch.round(x).clamp_(-_LIMIT, _LIMIT)
    return codes.to(torch.int8), scale


def float8_activation(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 numbers [..., I] and scales float32 [..., 1]: absmax / 448 of each token."""
    largest = Float8Grid().largest
    x, scale = _scaled(x_TI, largest)
    return x.clamp_(-largest, largest).to(torch.float8_e4m3fn), scale


def fake_quantize_activation(
    x_TI: Tensor, scheme: Scheme, input_scale: Tensor | None = None
) -> Tensor:
    """x as a layer of the scheme sees it: codes · scale in float32, rounded once to x's dtype.

    Scales are taken from each token, or its groups of `scheme.group_size` features; `input_scale`
    is that of `QuantizedTensor`, for schemes with `static_input`.
    """
    if scheme.kind == "int":
        codes, scale = (float8_activation if scheme.float_input else quantize_activation)(x_TI)
        return codes.to(torch.float32).mul_(scale).to(x_TI.dtype)
    groups = x_TI.to(torch.float32).unflatten(-1, (-1, scheme.group_size or x_TI.shape[-1]))
    scale = _group_scales(groups.abs().amax(-1, keepdim=True), scheme, input_scale)
    return grid_of(scheme).snap(groups, scale, None).flatten(-2).to(x_TI.dtype)


def static_input_scale(largest: float, scheme: Scheme) -> float:
    """The `input_scale` of a scheme for inputs of at most this magnitude; 1 for zero.

    A bfloat16 value, so that every reader's cast leaves it as it is; rounded so that nothing clips.
    nvfp4's is a power of two, as the divisors of weights are: the reciprocal that ModelOpt's layout
    has in its place is exact, and scales of groups lose no digit by it.
    """
    if largest <= 0:
        return 1.0
    if scheme.kind == "nvfp4":
        return float(2.0 ** math.floor(math.log2(_DIVIDED / largest)))
    wanted = largest / E4M3_LARGEST
    scale = torch.tensor(wanted, dtype=torch.float64).to(torch.bfloat16)
    if float(scale) < wanted:
        scale = torch.nextafter(scale, torch.tensor(float("inf"), dtype=torch.bfloat16))
    return float(scale)


def _group_scales(largest_TG: Tensor, scheme: Scheme, input_scale: Tensor | None) -> Tensor:
    """Float32 scales [..., G, 1] of groups whose largest magnitudes are given."""
    if not scheme.static_input:
        if scheme.kind != "fp8":
            return float_scale(largest_TG, scheme)
        return (largest_TG / E4M3_LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    assert input_scale is not None, scheme.name
    if scheme.kind == "fp8":
        return input_scale.to(largest_TG.device).expand_as(largest_TG)
    divisor = input_scale.to(largest_TG.device)
    numbers = (largest_TG / 6.0 * divisor).clamp(E4M3_SMALLEST, E4M3_LARGEST)
    return numbers.to(torch.float8_e4m3fn).to(torch.float32) / divisor


def _scaled(x_TI: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """(x / scale, scale) in float32, the largest magnitude of a token becoming `limit`."""
    x = x_TI.to(torch.float32)
    scale = x.abs().amax(dim=-1, keepdim=True) / limit
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return x / scale, scale
