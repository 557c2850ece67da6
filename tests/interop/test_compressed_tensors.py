"""compressed-tensors' own compressors decode and encode quantkit's weights, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
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
    assert len({path.name.split("-")[0] for path in paths}) >= 40
    for path in paths:
        tensors, scheme, layout = read(path)
        decoded = without_inputs(tensors).pop("decoded")
        found = compressor(layout).decompress(tensors, scheme)["weight"]
        # Floats of 4 bits come back in bfloat16, whatever the model's dtype.
        assert torch.equal(found, decoded.to(found.dtype)), path.name


def test_the_owner_packs_the_same_bytes(root: Path) -> None:
    for path in sorted((root / "samples").glob("*-float32.safetensors")):
        tensors, scheme, layout = read(path)
        decoded = without_inputs(tensors).pop("decoded")
        state = compressor(layout).decompress(tensors, scheme)
        state["weight"] = decoded
        again = compressor(layout).compress(state, scheme)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.uint8 and name == "weight_packed":
                tensor = with_positive_zeros(tensor)
            assert torch.equal(again[name], tensor), (path.name, name)


def test_the_owner_rounds_inputs_to_the_same_numbers(root: Path) -> None:
    seen = set()
    for path in sorted((root / "samples").glob("*-float32.safetensors")):
        tensors, scheme, _ = read(path)
        args = scheme.input_activations
        # Of integers by 127.5, unlike vLLM and quantkit (test_transformers.py).
        if args is None or args.type == "int":
            continue
        x, divisor = tensors["x"], tensors.get("input_global_scale")
        if args.dynamic:
            scale, zero = compute_dynamic_scales_and_zp(
                x[None], args, torch.nn.Identity(), global_scale=divisor
            )
        else:
            scale, zero = tensors["input_scale"], torch.zeros(1)
        found = fake_quantize(x[None], scale, zero, args, global_scale=divisor)[0]
        assert torch.equal(found, tensors["rounded"]), path.name
        seen.add(path.name.split("-")[0])
    assert len(seen) == 7


def without_inputs(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors less what test_the_owner_rounds_inputs reads."""
    for name in ("x", "rounded"):
        tensors.pop(name, None)
    return tensors


def with_positive_zeros(packed: torch.Tensor) -> torch.Tensor:
    """e2m1 codes with 0 for 8, the second zero, which no encoder writes."""
    low, high = packed & 15, packed >> 4
    low, high = low.masked_fill(low == 8, 0), high.masked_fill(high == 8, 0)
    return low | (high << 4)
