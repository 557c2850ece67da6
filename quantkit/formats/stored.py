"""What formats share: scales in the dtype that a file stores, and the model's own dtype.

Letters: O out features, G groups per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numbers.tensor import PlainScale, QuantizedTensor


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
    wide, largest = scale.float(), torch.finfo(dtype).max
    rounded = wide.clamp(-largest, largest).to(dtype)
    change = ((rounded.float() - wide) / wide).abs().nan_to_num_(0.0)
    changed = int((change > 0).sum())
    if not changed:
        return tensor, None
    told = (
        f"{changed} of {scale.numel()} scales rounded from {_name(scale.dtype)} to {_name(dtype)}, "
        f"by up to {float(change.max()):.2g} of themselves"
    )
    return dataclasses.replace(tensor, scale=PlainScale(tensor=rounded)), told


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that config.json gives the model: layouts with float16 scales do not keep it."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            found = getattr(torch, str(part.get(key)).removeprefix("torch."), None)
            if isinstance(found, torch.dtype):
                return found
    return torch.float16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
