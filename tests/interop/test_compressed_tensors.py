"""compressed-tensors' own compressors decode and encode quantkit's weights, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors import safe_open

DTYPES = ["float32", "bfloat16"]


def read(path: Path) -> tuple[dict[str, torch.Tensor], QuantizationScheme, str]:
    """The packed tensors, their scheme and the name of the layout."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        group = json.loads(file.metadata()["group"])
    return tensors, QuantizationScheme(**group), group["format"]


def compressor(layout: str) -> type[BaseCompressor]:
    found: type[BaseCompressor] = BaseCompressor.get_value_from_registry(layout)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_owner_decodes_to_quantkits_numbers(root: Path, dtype: str) -> None:
    paths = sorted((root / "samples").glob(f"*-{dtype}.safetensors"))
    assert len({path.name.split("-")[0] for path in paths}) >= 28
    for path in paths:
        tensors, scheme, layout = read(path)
        decoded = tensors.pop("decoded")
        found = compressor(layout).decompress(tensors, scheme)["weight"]
        assert torch.equal(found.to(decoded.dtype), decoded), path.name


def test_the_owner_packs_the_same_bytes(root: Path) -> None:
    for path in sorted((root / "samples").glob("*-float32.safetensors")):
        tensors, scheme, layout = read(path)
        decoded = tensors.pop("decoded")
        state = compressor(layout).decompress(tensors, scheme)
        state["weight"] = decoded
        again = compressor(layout).compress(state, scheme)
        for name, tensor in tensors.items():
            assert torch.equal(again[name], tensor), (path.name, name)
