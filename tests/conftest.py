"""Settings that must stand before anything is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Triton decides at its first import whether kernels are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A command line that ends by an internal error shows its traceback in the test's output.
os.environ.setdefault("QUANTKIT_TRACEBACK", "1")


@pytest.fixture(autouse=True)
def _gradients_stay_on() -> Iterator[None]:
    """A test that leaves them off would fail another one."""
    yield
    left_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left_on


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread while a module's tests run: tiny products are slower with more."""
    from tiny_jobs import one_thread

    with one_thread():
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama of two blocks with calibration text beside it, one for each module."""
    from tiny_jobs import build

    return build("llama", tmp_path_factory.mktemp("llama"))
