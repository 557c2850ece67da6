"""quantkit's layers by way of transformers' own `from_pretrained`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from inference.test_load import (
    IDS_BT,
    assert_same_tensors,
    count,
    make_model,
    tensors_of,
    write_quantized,
)
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.checkpoint.files import FileSource
from quantkit.errors import BackendError, ModelError
from quantkit.inference.layers import QuantLinear
from quantkit.inference.load import load

CASES = [
    ("llama", "w4a16_g32", "compressed-tensors"),
    ("llama", "nf4_b64_dq", "bitsandbytes"),
    ("llama", "w4a16_g32_asym", "gptq_v2"),
    ("llama-tied", "w8a8_row", "compressed-tensors"),
    ("gpt2", "w8a16_row", "compressed-tensors"),
    ("mixtral", "w4a16_g32", "compressed-tensors"),
]


@pytest.mark.parametrize(
    ("kind", "scheme", "fmt"), CASES, ids=[f"{kind}-{scheme}" for kind, scheme, _ in CASES]
)
def test_from_pretrained_gives_the_model_that_load_gives(
    kind: str, scheme: str, fmt: str, tmp_path: Path
) -> None:
    write_quantized(make_model(kind), tmp_path / "out", scheme, fmt)
    config = quantkit.hf_config(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", config=config)
    wanted = load(tmp_path / "out")
    assert count(model, QuantLinear) == count(wanted, QuantLinear) > 0
    with torch.no_grad():
        assert torch.equal(model(IDS_BT).logits, wanted(IDS_BT).logits)
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "out"))
    saved, original = (FileSource(tmp_path / name).config for name in ("again", "out"))
    assert saved["quantization_config"] == original["quantization_config"]


def test_an_unquantized_checkpoint_keeps_its_config(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "plain")
    assert not hasattr(quantkit.hf_config(tmp_path / "plain"), "quantization_config")


def test_mistakes_are_refused(tmp_path: Path) -> None:
    write_quantized(make_model("llama"), tmp_path / "out", "w4a16_g32", "compressed-tensors")
    with pytest.raises(BackendError, match="allowed"):
        quantkit.hf_config(tmp_path / "out", backend="fast")
    config = quantkit.hf_config(tmp_path / "out")
    places = {"model.embed_tokens": "cpu", "": "disk"}
    with pytest.raises(ModelError, match="one device"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", config=config, device_map=places)
