"""What the formats of float16 scales, GPTQ and AWQ, share.

Letters: O out features, G groups per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.tensor import PlainScale, QuantizedTensor


def float16_scales(name: str, tensor: QuantizedTensor) -> Tensor:
    """Contiguous float16 [G, O] scales.  NumericsError if one is not exact."""
    assert isinstance(tensor.scale, PlainScale)
    scale_OG = tensor.scale.tensor.cpu()
    scales = scale_OG.to(torch.float16)
    if not torch.equal(scales.float(), scale_OG.float()):
        raise NumericsError(
            f"{name}: a scale is not exact in float16, the format's dtype; scales are rounded with "
            "store_scale first"
        )
    return scales.T.contiguous()


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that config.json gives the model: layouts with float16 scales do not keep it."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            found = getattr(torch, str(part.get(key)).removeprefix("torch."), None)
            if isinstance(found, torch.dtype):
                return found
    return torch.float16
