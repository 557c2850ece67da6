"""Where a packed weight runs: with Triton on a GPU, or with torch's ops on a CPU."""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal

import torch

Device = Literal["triton", "cpu"]


@functools.cache
def needs_triton() -> str | None:
    """Why Triton kernels cannot run on this machine's GPU, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        # Its devices are called cuda too, but the kernels decode with NVIDIA's instructions.
        return "torch is built for ROCm: the kernels need an NVIDIA GPU"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}: the kernels need 8.0 or newer"
    return None
