"""`quantkit verify --runtime llama.cpp`: run by quantkit's own environment, asking llama.cpp's.

The environment variable QUANTKIT_LLAMA_PYTHON names the interpreter that has llama-cpp-python.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gguf_cases import EXPORTED, QUANTIZED

from quantkit.checks.verify import verify


@pytest.mark.parametrize("name", [*EXPORTED, *QUANTIZED])
def test_llama_cpp_chooses_quantkits_tokens(root: Path, name: str) -> None:
    result = verify(
        root / "gguf" / name / "model.gguf",
        runtime="llama.cpp",
        runtime_python=Path(os.environ["QUANTKIT_LLAMA_PYTHON"]),
    )
    print(f"{name}: {result.checks[-1].detail}")
    assert result.ok, result.text()
    assert result.checks[-1].name == "runtime"
