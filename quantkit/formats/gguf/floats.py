"""ggml's blocks of 4-bit floats: MXFP4, and NVFP4 as far as it is read.

Codes are e2m1 numbers, numbered as everywhere.  Shapes: O out features, I in features, G groups
per row.

    MXFP4   32 weights in 17 bytes: the exponent of a power of two plus 127, then 16 bytes; byte k
            holds codes k (low) and k + 16
    NVFP4   64 weights in 36 bytes: four e4m3 scales, each of 16 weights, then 8 bytes for each of
            those; byte k holds codes k (low) and k + 8

value = number · scale.  ggml keeps the numbers doubled and the scales halved, which is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.errors import NumericsError
from quantkit.formats.stored import exponents_of, power_of_two
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import DividedScale, PlainScale, QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

# Type -> the scheme of its numbers, weights and bytes of a block.
FLOAT_TYPES = {"MXFP4": ("mxfp4a16", 32, 17), "NVFP4": ("nvfp4a16", 64, 36)}
MXFP4 = Scheme.parse("mxfp4a16")
_E4M3_NAN = 0x7F


def pack_mxfp4(name: str, tensor: QuantizedTensor) -> Tensor:
    """Rows of blocks, uint8 [O, 17·I/32].  NumericsError if a scale is no power of two."""
    rows, columns = tensor.shape
    exponent_OG = exponents_of(name, tensor)
    halves = tensor.codes.cpu().view(rows, columns // 32, 2, 16)
    packed = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return torch.cat([exponent_OG[..., None], packed], dim=2).reshape(rows, -1)


def unpack_floats(name: str, label: str, data: Tensor, dtype: torch.dtype) -> QuantizedTensor:
    """Codes and scales of packed rows, uint8 [O, bytes].  NumericsError if a scale is NaN."""
    scheme, size, num_bytes = FLOAT_TYPES[label]
    rows = len(data)
    blocks = data.view(rows, -1, num_bytes)
    heads = size // 32 if label == "MXFP4" else size // 16
    scales = blocks[:, :, :heads].reshape(rows, -1)
    packed = blocks[:, :, heads:].reshape(rows, scales.shape[1], -1)
    codes = torch.stack([packed & 15, packed >> 4], dim=2).reshape(rows, -1)
    if label == "MXFP4":
        scale: PlainScale | DividedScale = PlainScale(tensor=power_of_two(name, scales))
    else:
        if bool((scales & _E4M3_NAN == _E4M3_NAN).any()):
            raise NumericsError(f"{name}: there is a scale that is NaN; get the file anew")
        numbers = scales.contiguous().view(torch.float8_e4m3fn)
        scale = DividedScale(tensor=numbers, divisor=torch.tensor(1.0))
    return QuantizedTensor(
        codes=codes.contiguous(), scale=scale, zero=None, scheme=Scheme.parse(scheme), dtype=dtype
    )
