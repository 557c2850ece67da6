"""transformers with GPTQModel's layers computes with the numbers of GPTQ and AWQ files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense import dense_model, loaded, logits, quantized_weights

GPTQ = ["gptq_v1", "gptq_v2", "gptq_v1_asym", "w2", "w3"]
AWQ = ["awq_gemm", "awq_gemm_sym"]
# Float32 sums in another order, and sums of AWQ's zeros times scales; a wrong code moves more.
TOLERANCE = 1e-3


@pytest.mark.parametrize("name", [*GPTQ, *AWQ])
def test_logits_are_those_of_quantkits_dequantization(root: Path, name: str) -> None:
    expected = logits(dense_model(root, name), root, name)
    actual = logits(loaded(root, name), root, name)
    difference = (actual - expected).abs().max().item()
    print(f"{name}: logits differ by at most {difference:.4f}")
    assert difference < TOLERANCE


@pytest.mark.parametrize("name", GPTQ)
def test_layers_decode_to_quantkits_weights(root: Path, name: str) -> None:
    model = loaded(root, name)
    for weight, expected in quantized_weights(root, name).items():
        module = model.get_submodule(weight.removesuffix(".weight"))
        actual = module.dequantize_weight().T.float()
        assert torch.equal(actual, expected.half().float()), weight
