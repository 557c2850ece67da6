"""What formats share: scales in the dtype that a file stores, and the model's own dtype.

Letters: O out features, G groups per row.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.dtypes import label_of
from quantkit.checkpoint.source import Source
from quantkit.errors import NumericsError
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import DividedScale, PlainScale, QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

# What models compute in; the first is what the layouts were made for.
_MODEL_DTYPES = ("F16", "BF16", "F32")
# Ends of the names of scales, in all layouts.
_SCALES = ("scales", "scale", "scale_inv", "absmax", "quant_map", "SCB")
# The exponent that E8M0 keeps for NaN.
_NAN = 255


def stored_scale(name: str, tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Contiguous CPU scales [O, G] in the dtype of a file.  NumericsError if one is not exact."""
    assert isinstance(tensor.scale, PlainScale)
    scale = tensor.scale.tensor.cpu()
    stored = scale.to(dtype).contiguous()
    if not torch.equal(stored.float(), scale.float()):
        raise NumericsError(
            f"{name}: a scale is not exact in {dtype}; scales are rounded with store_scale first"
        )
    return stored


def round_scale(tensor: QuantizedTensor, dtype: torch.dtype) -> tuple[QuantizedTensor, str | None]:
    """The tensor with scales that are exact in a dtype, and what was rounded, or None."""
    assert isinstance(tensor.scale, PlainScale)
    scale = tensor.scale.tensor
    wide, finfo = scale.float(), torch.finfo(dtype)
    rounded = wide.clamp(-finfo.max, finfo.max).to(dtype)
    lost = (rounded == 0) & (wide != 0)
    change = ((rounded.float() - wide) / wide).abs().nan_to_num_(0.0)
    changed = int((change > 0).sum())
    if not changed:
        return tensor, None
    told = (
        f"{changed} of {scale.numel()} scales rounded from {_name(scale.dtype)} to {_name(dtype)}, "
        f"by up to {float(change.max()):.2g} of themselves"
    )
    if bool(lost.any()):
        tensor, rounded = _emptied(tensor, rounded, lost)
    return dataclasses.replace(tensor, scale=PlainScale(tensor=rounded)), told


def round_divisor(tensor: QuantizedTensor, *, inverted: bool) -> tuple[QuantizedTensor, str | None]:
    """The tensor with NVFP4's divisors in one form, and what was rounded; itself if exact in it.

    A file that is `inverted` has reciprocals, also of the divisor that its input's scales have.
    """
    scale, given = tensor.scale, tensor.input_scale
    assert isinstance(scale, DividedScale)
    turned, told = scale.turned(inverted=inverted), []
    if not torch.equal(turned.values(), scale.values()):
        told.append("the divisor of its scales")
        tensor = dataclasses.replace(tensor, scale=turned)
    if inverted and given is not None and not torch.equal(1 / (1 / given), given):
        told.append("that of its input's scales")
        tensor = dataclasses.replace(tensor, input_scale=1 / (1 / given))
    if not told:
        return tensor, None
    return tensor, f"{' and '.join(told)}: the file has the nearest float32 of a reciprocal"


def stored_divisor(name: str, tensor: QuantizedTensor, *, inverted: bool) -> DividedScale:
    """The scales in the form of a file.  NumericsError if they are not exact in it."""
    assert isinstance(tensor.scale, DividedScale)
    turned = tensor.scale.turned(inverted=inverted)
    if not torch.equal(turned.values(), tensor.scale.values()):
        raise NumericsError(
            f"{name}: the reciprocal of its scales' divisor is not exact; round_divisor first"
        )
    return turned


def _emptied(
    tensor: QuantizedTensor, scale_OG: Tensor, lost_OG: Tensor
) -> tuple[QuantizedTensor, Tensor]:
    """The tensor with zeros in groups whose scale the dtype has no number for, and its scales.

    No runtime wants a scale of zero: such a group gets the dtype's smallest and codes of zero.
    """
    finfo, scheme = torch.finfo(scale_OG.dtype), tensor.scheme
    least = torch.full_like(scale_OG, finfo.smallest_normal * finfo.eps).copysign(scale_OG)
    rows, columns = tensor.shape
    none: Tensor | int = 2 ** (scheme.bits - 1) if tensor.zero is None else tensor.zero[..., None]
    codes = tensor.codes.view(rows, scale_OG.shape[1], columns // scale_OG.shape[1])
    codes = torch.where(lost_OG[..., None], none, codes).to(torch.uint8).view(rows, columns)
    return dataclasses.replace(tensor, codes=codes), torch.where(lost_OG, least, scale_OG)


def exponents_of(name: str, tensor: QuantizedTensor) -> Tensor:
    """uint8 [O, G]: exponents plus 127 of scales that are powers of two; NumericsError if not."""
    scale = tensor.scale.values().cpu()
    bits = scale.view(torch.int32)
    # 2^-127 is half of the smallest normal number.
    exponent = torch.where(bits == 1 << 22, 0, bits >> 23).to(torch.uint8)
    if not torch.equal(_power_of_two(exponent), scale):
        raise NumericsError(f"{name}: a scale is no power of two, which {tensor.scheme.name} wants")
    return exponent


def power_of_two(name: str, exponent: Tensor) -> Tensor:
    """2^(e - 127) in float32 for uint8 exponents of 0..254; NumericsError for 255, which is NaN."""
    exponent = exponent.view(torch.uint8)
    if bool((exponent == _NAN).any()):
        raise NumericsError(
            f"{name}: there is a scale of {_NAN}, which is NaN; the checkpoint is damaged, get it "
            "anew"
        )
    return _power_of_two(exponent)


def by_block(name: str, scale_OG: Tensor, scheme: Scheme) -> Tensor:
    """One scale for all rows that share it: [ceil(O/R), G], or [1] for a whole weight.

    NumericsError if rows of a block differ.  Scales of groups come back as they are.
    """
    if scheme.share == "group":
        return scale_OG
    rows = scheme.group_size if scheme.share == "block" else len(scale_OG)
    stored = scale_OG[::rows].contiguous()
    stored = stored if scheme.share == "block" else stored.reshape(1)
    if not torch.equal(by_row(stored, scheme, len(scale_OG)), scale_OG):
        raise NumericsError(f"{name}: rows that share a scale under {scheme.name} have others")
    return stored


def by_row(stored: Tensor, scheme: Scheme, rows: int) -> Tensor:
    """Scales [O, G] of all rows: the inverse of `by_block`."""
    if scheme.share == "group":
        return stored
    if scheme.share == "tensor":
        return stored.reshape(1, 1).expand(rows, 1).contiguous()
    return stored.repeat_interleave(scheme.group_size or rows, dim=0)[:rows].contiguous()


def model_dtype(source: Source) -> str:
    """The label of the model's dtype, which layouts with scales of their own dtype do not keep.

    What config.json says, else that of most bytes of tensors that are no scales; else float16.
    """
    config = source.config
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if (label := label_of(str(part.get(key)))) in _MODEL_DTYPES:
                return label
    sizes = dict.fromkeys(_MODEL_DTYPES, 0)
    for name in source.names():
        if (info := source.info(name)).label in sizes and not name.endswith(_SCALES):
            sizes[info.label] += info.nbytes
    return max(sizes, key=lambda label: sizes[label])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _power_of_two(exponent: Tensor) -> Tensor:
    """The bits of the numbers, 2^-127 being subnormal."""
    bits = exponent.to(torch.int32) << 23
    bits[exponent == 0] = 1 << 22
    return bits.view(torch.float32)
