"""Damaged checkpoints are refused with a reason or read whole, whatever is damaged."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parent.parent.parent / "tools" / "fuzz_formats.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_formats", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_2000_damaged_checkpoints_are_refused_or_read_whole(tool: ModuleType) -> None:
    outcome = tool.fuzz(2000, seed=1)
    # Some damage is harmless, such as another threshold; most is not.
    assert outcome.refused + outcome.read == 2000
    assert 800 < outcome.refused < 1800


def test_a_sample_that_is_not_damaged_is_read(tool: ModuleType) -> None:
    samples = tool.samples()
    assert len(samples) > 20
    assert all(tool.survives(sample) for sample in samples)
