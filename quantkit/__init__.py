"""quantkit: post-training quantization for Hugging Face language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.checkpoint.version import __version__
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.inference.hf import hf_config
    from quantkit.inference.load import load
    from quantkit.pipeline.api import quantize

__all__ = ["QuantkitError", "__version__", "hf_config", "load", "quantize"]


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
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
