"""Tiny models with a layer that predicts further tokens, as its authors publish them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.sweep.one import _build

# type -> (block that the layer is like, its prefix, what stands beside it)
LAYOUTS = {
    "glm4_moe": (3, "model.layers.4.", "model.layers.4.", ("eh_proj", "shared_head.head")),
    "qwen3_next": (3, "mtp.layers.0.", "mtp.", ("fc",)),
}


def build(kind: str, directory: Path) -> Path:
    """The model in float32 with such a layer, whose values are its own."""
    directory.mkdir(parents=True, exist_ok=True)
    block, prefix, root, beside = LAYOUTS[kind]
    with torch.no_grad():
        _build("causal", kind, directory, torch.arange(3, 51).view(2, 24))
    file = directory / "model.safetensors"
    tensors = load_file(file)
    stem = f"model.layers.{block}."
    generator = torch.Generator().manual_seed(5)
    made: dict[str, Tensor] = {
        prefix + name.removeprefix(stem): torch.randn(value.shape, generator=generator) * 0.1
        for name, value in tensors.items()
        if name.startswith(stem)
    }
    for name in beside:
        made[f"{root}{name}.weight"] = torch.randn(64, 128, generator=generator)
    made[f"{root}norm_of_its_own.weight"] = torch.ones(64)
    save_file(tensors | made, file, metadata={"format": "pt"})
    return directory
