"""quantkit: post-training quantization for Hugging Face language models."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quantkit.checkpoint.version import __version__
from quantkit.errors import QuantkitError
from quantkit.extend import MovedModules

if TYPE_CHECKING:
    from quantkit.inference.adapters import prepare_lora
    from quantkit.inference.hf import hf_config
    from quantkit.inference.load import load
    from quantkit.pipeline.api import quantize

__all__ = ["QuantkitError", "__version__", "hf_config", "load", "prepare_lora", "quantize"]


def __getattr__(name: str) -> object:
    # torch and transformers take seconds to import; `quantkit methods` needs neither.
    if name == "quantize":
        from quantkit.pipeline.api import quantize

        return quantize
    if name == "load":
        from quantkit.inference.load import load

        return load
    if name == "hf_config":
        from quantkit.inference.hf import hf_config

        return hf_config
    if name == "prepare_lora":
        from quantkit.inference.adapters import prepare_lora

        return prepare_lora
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")


if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
    # Before the finder of files, which would load a part below a moved folder a second time.
    sys.meta_path.insert(0, MovedModules())
