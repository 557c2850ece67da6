"""Settings that must stand before anything is imported."""

from __future__ import annotations

import os

import torch

# Triton decides at its first import whether kernels are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A command line that ends by an internal error shows its traceback in the test's output.
os.environ.setdefault("QUANTKIT_TRACEBACK", "1")
