"""Low-rank adapters of peft on quantized layers (Hu et al. 2021, arXiv 2106.09685).

The codes stay as they are; gradients reach the adapters, and what lies before them, through the
decoded weight (Dettmers et al. 2023, arXiv 2305.14314, QLoRA).
"""

from __future__ import annotations

from torch import nn

from quantkit.errors import ModelError
from quantkit.inference.fused import FusedLinear
from quantkit.inference.layers import QuantLinear

try:
    from peft import LoraConfig
    from peft.tuners.lora import Linear as LoraLinear
except ImportError as error:
    raise ModelError("adapters need the package peft: pip install peft") from error


def prepare_lora(config: LoraConfig) -> LoraConfig:
    """The configuration itself, which now puts adapters on quantized layers too.

    For whatever takes a LoraConfig: `peft.get_peft_model`, `model.add_adapter`, trainers.  Raises
    ModelError for "all-linear", by which peft means torch's own layers.
    """
    if config.target_modules == "all-linear":
        raise ModelError(
            'target_modules "all-linear" finds no quantized layers; name them, as in '
            '["q_proj", "v_proj"]'
        )
    config._register_custom_module({QuantLinear: QuantLora, FusedLinear: QuantLora})
    return config


class QuantLora(LoraLinear):
    """A quantized layer and its adapters, which take part in the result and never in the codes."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ModelError: what adapters add is no sum of codes."""
        raise ModelError(
            "adapters cannot be merged into quantized weights; keep them beside the checkpoint, or "
            "merge them into the unquantized model and quantize that"
        )

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, (QuantLinear, FusedLinear))
        return module.in_features, module.out_features
