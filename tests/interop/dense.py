"""The dequantized model as a reference: quantkit's own numbers in plain transformers layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

Activation = Callable[[torch.Tensor], torch.Tensor]


def quantized_names(root: Path, name: str) -> list[str]:
    """Checkpoint names of the weights that are quantized in ROOT/NAME."""
    text = (root / f"{name}-dense" / "names.json").read_text(encoding="utf-8")
    return list(json.loads(text))


def quantized_weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    """Those weights as quantkit dequantizes them, float32."""
    tensors = load_file(root / f"{name}-dense" / "model.safetensors")
    return {weight: tensors[weight] for weight in quantized_names(root, name)}


def dense_model(
    root: Path,
    name: str,
    *,
    weight_dtype: torch.dtype = torch.float32,
    expert_dtype: torch.dtype = torch.float32,
    activation: Activation | None = None,
) -> PreTrainedModel:
    """The float32 model; quantized weights are rounded once to weight_dtype or expert_dtype.

    `activation` is applied to the input of every quantized weight outside experts.
    """
    model = AutoModelForCausalLM.from_pretrained(root / f"{name}-dense", dtype=torch.float32)
    modules = dict(model.named_modules())
    for weight in quantized_names(root, name):
        module = modules.get(weight.removesuffix(".weight"))
        if module is None:
            # An expert: transformers keeps it inside a fused parameter, seen to below.
            continue
        module.weight.data = module.weight.data.to(weight_dtype).float()
        if activation is not None:
            module.register_forward_pre_hook(_on_first_argument(activation))
    for path, parameter in model.named_parameters():
        if path.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parameter.data = parameter.data.to(expert_dtype).float()
    return model.eval()


def loaded(root: Path, name: str) -> PreTrainedModel:
    """The checkpoint ROOT/NAME as transformers reads it, computing in float32."""
    return AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32).eval()


def logits(model: PreTrainedModel, root: Path, name: str) -> torch.Tensor:
    """Float32 logits [1, T, vocabulary] on the tokens that quantkit was given."""
    input_ids = load_file(root / f"{name}-logits.safetensors")["input_ids"]
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits.float()


class Float8Cache(DynamicCache):
    """transformers' own cache, but for keys and values: rounded to e4m3 with the file's scales."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self.scales = load_file(checkpoint / "model.safetensors")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention reads, all tokens so far."""
        found = []
        for leaf, x in (("k", key_states), ("v", value_states)):
            scale = self.scales[f"model.layers.{layer_idx}.self_attn.{leaf}_scale"]
            found.append((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
        return super().update(*found, layer_idx, *rest)


def int8_tokens(levels: float, lowest: int) -> Activation:
    """Fake quantization to int8 per token with the scale absmax / levels, codes in lowest..127."""

    def fake_quantize(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / levels
        return torch.round(x / scale).clamp(lowest, 127) * scale

    return fake_quantize


def float8_tokens(x: torch.Tensor) -> torch.Tensor:
    """Fake quantization to e4m3 per token with the scale absmax / 448."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _on_first_argument(activation: Activation) -> Callable[..., tuple[torch.Tensor, ...]]:
    def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (activation(args[0]), *args[1:])

    return hook
