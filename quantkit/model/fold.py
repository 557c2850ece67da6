"""Folding scales into a block: a producer's channels divided, its readers' columns multiplied.

Stored precision decides what is exact.  A norm's new weight is rounded to its dtype first, and
readers take the ratio of the old to the new stored effective weight, so the product of the two is
off by the rounding of the readers alone.  The rows of a matrix have no single such ratio: there s
itself is used, and every element of the row is rounded once more (2^-9 relative in bfloat16).

Letters: O out features, I in features, C producer channels.
"""

from __future__ import annotations

import torch
from torch import nn

from quantkit.errors import NumericsError, ShapeError
from quantkit.model.refs import Folded, ScaleGroup, weight_view

_OTHERWISE = "use a method without transforms, or a bfloat16 copy of the model"


def fold_(
    block: nn.Module,
    group: ScaleGroup,
    scale_C: torch.Tensor,
    *,
    stored: torch.dtype | None = None,
) -> Folded:
    """What was folded; the block is changed in place.

    `stored` is the dtype a norm will be written in, where the block holds wider values.

    scale_C float32 [C] > 0.  A channel whose scale cannot be stored (a zero norm weight) stays as
    it is and gets scale 1.  Raises ShapeError for another number of scales, NumericsError for a
    scale that is not finite and positive, or weights that their dtype does not hold then.
    """
    if scale_C.shape != (group.num_channels,):
        raise ShapeError(
            f"{group.producer_names[0]}: {tuple(scale_C.shape)} scales for "
            f"{group.num_channels} channels; give one per producer channel (ScaleGroup.pool)"
        )
    if not bool((scale_C.isfinite() & (scale_C > 0)).all()):
        raise NumericsError(f"{group.producer_names[0]}: a scale is not finite and positive")
    with torch.no_grad():
        scale_C = scale_C.float().to(block.get_parameter(group.producer).device)
        applied_C = _divide_producer_(block, group, scale_C, stored)
        scale_I = group.expand(applied_C)
        for reader in group.readers:
            w_OI = weight_view(block, reader)
            w_OI.copy_(in_dtype(reader.name, w_OI.float() * scale_I, w_OI.dtype))
    names = dict.fromkeys((*group.producer_names, *(reader.name for reader in group.readers)))
    return Folded(group=group, scale_I=scale_I.cpu(), names=tuple(names))


def in_dtype(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A rescaled tensor in the dtype that keeps it.

    Raises NumericsError naming it if that overflows, or costs more than rounding does: float16
    has few bits below 2^-14, and none below 2^-24.
    """
    kept = value.to(dtype)
    short = str(dtype).removeprefix("torch.")
    if kept.numel() and not all(bool(edge.isfinite()) for edge in torch.aminmax(kept)):
        raise NumericsError(
            f"{name}: rescaled to {float(value.abs().max()):.3g} it overflows {short}; {_OTHERWISE}"
        )
    if dtype == torch.float16:
        largest = value.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        lost = torch.linalg.vector_norm((kept.to(value.dtype) - value).div_(largest))
        if float(lost) > torch.finfo(dtype).eps * float(torch.linalg.vector_norm(value / largest)):
            raise NumericsError(
                f"{name}: rescaled to {float(largest):.3g} at most it underflows {short}; "
                + _OTHERWISE
            )
    return kept


def _divide_producer_(
    block: nn.Module, group: ScaleGroup, scale_C: torch.Tensor, stored: torch.dtype | None
) -> torch.Tensor:
    """The scales [C] that the producer was really divided by."""
    parameter = block.get_parameter(group.producer)
    rows = group.rows.to(parameter.device)
    if group.kind == "norm":
        old = parameter[rows].float() + group.offset
        rounded = (old / scale_C - group.offset).to(stored or parameter.dtype)
        new = rounded.float() + group.offset
        ratio = old / new
        fits = ratio.isfinite() & (ratio > 0)
        parameter[rows] = torch.where(fits, rounded.to(parameter.dtype), parameter[rows])
        applied_C = torch.where(fits, ratio, torch.ones_like(ratio))
    else:
        matrix = parameter if group.expert is None else parameter[group.expert]
        w_OI = matrix.t() if group.transposed else matrix
        divided = w_OI[rows].float() / scale_C[:, None]
        w_OI[rows] = in_dtype(group.producer_names[0], divided, w_OI.dtype)
        applied_C = scale_C
    if group.bias is not None:
        whole = block.get_parameter(group.bias)
        bias = whole if group.expert is None else whole[group.expert]
        divided = bias[rows].float() / applied_C
        bias[rows] = in_dtype(group.producer_names[-1], divided, bias.dtype)
    return applied_C
