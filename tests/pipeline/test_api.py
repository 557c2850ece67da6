"""The Python API: a live model and a path are one pipeline, and give the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import tiny_models as tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.checks.verify import verify
from quantkit.errors import CalibrationError, CheckpointError, OutputError, RecipeError
from quantkit.inference.layers import QuantLinear

pytestmark = pytest.mark.usefixtures("one_thread")


def options(model: Path) -> dict[str, Any]:
    text = str(model / "calibration.txt")
    return {"calibration": text, "samples": 8, "seq_len": 32, "progress": False}


def live(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


@pytest.mark.parametrize(
    ("kind", "method", "scheme"),
    [
        ("llama", "best", "w4a16_g32_asym"),
        ("gpt2", "awq", "w4a16_g32"),
        ("qwen2", "gptq", "w3a16_g32"),
        ("mixtral", "awq", "w4a16_g32"),
        ("llama", "nf4", "nf4_b64_dq"),
    ],
)
def test_a_live_model_and_a_path_give_the_same_bytes(
    kind: str, method: str, scheme: str, tmp_path: Path
) -> None:
    source = jobs.build(kind, tmp_path / "model")
    more = {**options(source), "scheme": scheme, "allow_unreadable": True}
    by_path = quantkit.quantize(source, method, out=tmp_path / "path", **more)
    assert by_path == tmp_path / "path"
    model = live(source)
    tokenizer = tiny.tokenizer()
    returned = quantkit.quantize(model, method, out=tmp_path / "live", tokenizer=tokenizer, **more)
    assert returned is model
    assert shards(tmp_path / "live") == shards(tmp_path / "path")
    assert verify(tmp_path / "live", against=source).ok
    loaded = jobs.logits(quantkit.load(tmp_path / "path"))
    torch.testing.assert_close(jobs.logits(model), loaded, rtol=1e-5, atol=1e-5)


def test_a_live_model_is_returned_ready_to_use(llama: Path, tmp_path: Path) -> None:
    model = live(llama)
    before = jobs.logits(model)
    returned = quantkit.quantize(
        model, "gptq", scheme="w4a16_g32", tokenizer=tiny.tokenizer(), **options(llama)
    )
    layers = [module for module in returned.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 14
    assert 0 < jobs.distance(jobs.logits(returned), before) < 0.2
    tokens = returned.generate(jobs.ids(), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 52)
    returned.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    by_path = quantkit.quantize(
        llama, "gptq", scheme="w4a16_g32", out=tmp_path / "path", **options(llama)
    )
    written = load_file(by_path / "model.safetensors")
    assert set(saved) == set(written)
    assert all(torch.equal(saved[name], written[name]) for name in saved)


def test_methods_without_calibration_need_no_tokenizer(llama: Path) -> None:
    model = quantkit.quantize(live(llama), "int8", progress=False)
    assert any(isinstance(module, QuantLinear) for module in model.modules())


def test_calibration_may_be_texts_or_tokens(llama: Path, tmp_path: Path) -> None:
    text = (llama / "calibration.txt").read_text()
    tokens = tiny.tokenizer()(text, return_tensors="pt").input_ids[0, : 8 * 32].view(8, 32)
    sources: dict[str, Any] = {"texts": [text[:400], text[400:]], "tokens": tokens}
    for name, source in sources.items():
        more = {**options(llama), "calibration": source}
        out = quantkit.quantize(llama, "gptq", scheme="w4a16_g32", out=tmp_path / name, **more)
        report = json.loads((out / "quantkit/report.json").read_bytes())
        assert report["calibration"]["source"] == "python"
        assert report["calibration"]["tokens"] == 8 * 32


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    model = jobs.build("llama", tmp_path / "llama")
    for file in model.glob("tokenizer*"):
        file.unlink()
    tokens = torch.arange(3, 3 + 8 * 32).view(8, 32) % 300
    out = quantkit.quantize(
        model, "gptq", out=tmp_path / "out", calibration=tokens, samples=8, seq_len=32,
        progress=False,
    )  # fmt: skip
    assert (out / "quantkit/report.json").exists()


def test_mistakes_are_refused_before_anything_changes(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="say where with out="):
        quantkit.quantize(llama, "rtn")  # type: ignore[call-overload]
    model = live(llama)
    with pytest.raises(CalibrationError, match="tokenizer"):
        quantkit.quantize(model, "gptq", scheme="w4a16_g32", **options(llama))
    with pytest.raises(RecipeError, match="unknown"):
        quantkit.quantize(model, "magic")
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    quantkit.quantize(model, "rtn", scheme="w4a16_g32", progress=False)
    with pytest.raises(CheckpointError, match="already quantized"):
        quantkit.quantize(model, "rtn", scheme="w4a16_g32", progress=False)
