"""quantkit: post-training quantization for Hugging Face language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError
from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.api import quantize
    from quantkit.hf import hf_config
    from quantkit.loading import load

__all__ = ["QuantkitError", "__version__", "hf_config", "load", "quantize"]


def __getattr__(name: str) -> object:
    # torch and transformers take seconds to import; `quantkit methods` needs neither.
    if name == "quantize":
        from quantkit.api import quantize

        return quantize
    if name == "load":
        from quantkit.loading import load

        return load
    if name == "hf_config":
        from quantkit.hf import hf_config

        return hf_config
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
