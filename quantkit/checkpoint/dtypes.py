"""dtypes by the names that safetensors gives them, without torch (see `quantkit_kernels.lazy`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from quantkit_kernels.lazy import torch

if TYPE_CHECKING:
    Dtype = torch.dtype | str

# safetensors' name -> torch's name, bytes of a number.
LABELS: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1), "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2),
    "I8": ("int8", 1), "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2),
    "U8": ("uint8", 1), "BOOL": ("bool", 1), "C64": ("complex64", 8),
}  # fmt: skip
_LABEL_OF: Mapping[str, str] = {
    **{name: label for label, (name, _) in LABELS.items()},
    **{"half": "F16", "float": "F32", "double": "F64", "int": "I32", "long": "I64", "short": "I16"},
}


def label_of(dtype: Dtype) -> str:
    """The name of a dtype, given as torch's or by name; torch's own for what safetensors lacks."""
    if isinstance(dtype, str) and dtype in LABELS:
        return dtype
    name = str(dtype).removeprefix("torch.")
    return _LABEL_OF.get(name, name)


def dtype_of(label: str) -> torch.dtype:
    """torch's dtype of this name."""
    return cast("torch.dtype", getattr(torch, name_of(label)))


def name_of(label: str) -> str:
    """torch's name of it, without "torch."."""
    return LABELS[label][0] if label in LABELS else label


def bytes_of(label: str) -> int:
    """Bytes of one number."""
    return LABELS[label][1] if label in LABELS else dtype_of(label).itemsize
