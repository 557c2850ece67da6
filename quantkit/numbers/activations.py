"""8-bit activations, one scale per token: what an 8-bit layer does to its input, in one place.

The pipeline, which must show later blocks the error of earlier ones, and the running model use the
same codes.  Shapes: T tokens (any leading dimensions), I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.numbers.grid import Float8Grid
from quantkit.numbers.scheme import Kind

# Symmetric, so that -128 stays unused: codes and weights then share one absmax / 127 rule.
_LIMIT = 127.0


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


def fake_quantize_activation(x_TI: Tensor, kind: Kind = "int") -> Tensor:
    """x as an 8-bit layer sees it: codes · scale in float32, rounded once to the dtype of x."""
    codes, scale = float8_activation(x_TI) if kind == "fp8" else quantize_activation(x_TI)
    return codes.to(torch.float32).mul_(scale).to(x_TI.dtype)


def _scaled(x_TI: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """(x / scale, scale) in float32, the largest magnitude of a token becoming `limit`."""
    x = x_TI.to(torch.float32)
    scale = x.abs().amax(dim=-1, keepdim=True) / limit
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return x / scale, scale
