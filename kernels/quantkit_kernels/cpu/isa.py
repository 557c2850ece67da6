"""What the CPU at hand is good at."""

from __future__ import annotations

import functools
from typing import Literal

import torch

Level = Literal["avx512", "avx2", "default"]


@functools.cache
def level() -> Level:
    """The vector width torch's own CPU kernels were chosen for."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        return "avx512"
    return "avx2" if capability == "AVX2" else "default"


@functools.cache
def fast_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices here; without it torch uses scalar loops."""
    check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(check is not None and check())


@functools.cache
def fast_int8() -> bool:
    """Whether torch._int_mm uses dot-product instructions here; without VNNI it is a plain loop."""
    return level() == "avx512" and bool(torch.cpu._is_vnni_supported())
