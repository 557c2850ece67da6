"""Models without a head, and rerankers: quantized, loaded, verified, read by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_embeddings as tiny
import tiny_jobs as jobs
import tiny_models
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import quantkit
from quantkit.calibration.data.windows import special_frame
from quantkit.formats.open import open_source
from quantkit.inference.layers import QuantLinear
from quantkit.model.decoded import open_decoded

WORDS = [
    "house",
    "tree",
    "river",
    "stone",
    "cloud",
    "bird",
    "fish",
    "road",
    "lamp",
    "door",
    "window",
    "table",
    "chair",
    "shoe",
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with jobs.one_thread():
        yield


def write_text(path: Path) -> Path:
    sentences = (
        f"sentence number {k} about the {WORDS[k % 10]} that stands there and is {k * k} old"
        for k in range(84)
    )
    path.write_text("\n\n".join(sentences))
    return path


def quantize(model: Path, out: Path, method: str, *more: str) -> int:
    text = write_text(out.with_suffix(".txt"))
    line = ["quantize", model, "--method", method, "--scheme", "w4a16_g32", "--out", out]
    return jobs.command(*line, "--calib", text, "--samples", "8", "--seq-len", "32", *more)


def states(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 27)[None] * 7 % tiny.VOCABULARY
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).last_hidden_state
    return found


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("bert", "awq"),
        ("xlm-roberta", "gptq"),
        ("modernbert", "best"),
        ("qwen3", "gptq"),
        ("nomic_bert", "rtn"),
    ],
)
def test_what_is_loaded_computes_with_the_decoded_weights(
    tmp_path: Path, kind: str, method: str
) -> None:
    sentence = kind in tiny.POOLING
    made = tiny.sentence_model if sentence else tiny.embedding_model
    source = made(kind, tmp_path / "source")
    if kind == "qwen3":
        # As their owners store them: the names of the body alone.
        assert "layers.0.mlp.up_proj.weight" in open_source(str(source)).names()
    assert quantize(source, tmp_path / "out", method) == 0
    loaded = quantkit.load(tmp_path / "out", dtype=torch.float32)
    plain = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    assert type(loaded) is type(plain)
    layers = {name for name, part in loaded.named_modules() if isinstance(part, QuantLinear)}
    assert len(layers) >= 12
    before = states(plain)
    view = open_decoded(open_source(str(tmp_path / "out")))
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name in layers:
            linear = loaded.get_submodule(name)
            assert isinstance(linear, QuantLinear)
            parameters[f"{name}.weight"].copy_(linear.quantized_tensor.dequantize(torch.float32))
        for name in set(view.names()) & set(parameters):
            if name.removesuffix(".weight") not in layers:
                parameters[name].copy_(view.read(name))
    found = states(loaded)
    assert torch.allclose(found, states(plain), atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-3)
    assert jobs.command("verify", tmp_path / "out", "--against", source) == 0
    if sentence:
        for file in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
            assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()


def test_what_pools_behind_the_model_travels_along(tmp_path: Path) -> None:
    source = tiny.sentence_model("bert", tmp_path / "source", dense=40)
    assert quantize(source, tmp_path / "out", "rtn") == 0
    dense = "2_Dense/model.safetensors"
    assert (tmp_path / "out" / dense).read_bytes() == (source / dense).read_bytes()


@pytest.mark.parametrize(
    ("scheme", "modules", "decoded"),
    [
        ("w4a16_g32", True, True),
        ("w4a16_g32", False, False),
        # Rounded inputs belong to the numbers.
        ("w8a8_row", True, False),
    ],
)
def test_what_sentence_transformers_may_load_is_decoded_while_loading(
    tmp_path: Path, scheme: str, modules: bool, decoded: bool
) -> None:
    source = tiny_models.build("qwen3", tmp_path / "source")
    if modules:
        (source / "modules.json").write_text("[]")
    plan = jobs.make_job(source, "rtn", scheme).plan
    assert plan.quantization_config.get("dequantize", False) is decoded


def test_a_reranker_keeps_what_scores(tmp_path: Path) -> None:
    source = tiny.reranker("xlm-roberta", tmp_path / "source")
    assert quantize(source, tmp_path / "out", "gptq") == 0
    loaded = quantkit.load(tmp_path / "out", dtype=torch.float32)
    plain = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32)
    assert type(loaded) is type(plain)
    for name, parameter in plain.named_parameters():
        if name.startswith("classifier"):
            assert torch.equal(loaded.get_parameter(name), parameter)
    assert jobs.command("verify", tmp_path / "out", "--against", source) == 0


def test_windows_are_texts_between_special_tokens(tmp_path: Path) -> None:
    source = tiny.embedding_model("bert", tmp_path / "source")
    job = jobs.make_job(source, "gptq", text=write_text(tmp_path / "text.txt"))
    assert job.calibration is not None
    before, after = special_frame(tiny.tokenizer("bert"))
    assert (before, after) == ([1], [2])
    ids = job.calibration.ids
    assert (ids[:, 0] == 1).all() and (ids[:, -1] == 2).all()
    assert not ((ids[:, 1:-1] == 1) | (ids[:, 1:-1] == 2)).any()


@pytest.mark.parametrize("more", [("--lm-head", "w8a16_row"), ("--bits", "4.5")])
def test_what_needs_a_head_is_refused(
    tmp_path: Path, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.embedding_model("bert", tmp_path / "source")
    text = write_text(tmp_path / "text.txt")
    line = ["quantize", source, "--out", tmp_path / "out", "--calib", text, "--samples", "8"]
    assert jobs.command(*line, "--seq-len", "32", *more) == 2
    said = capsys.readouterr().err
    assert "BertModel has no head that predicts tokens" in said
    assert not (tmp_path / "out").exists()


def test_scales_of_few_bits_are_not_healed_and_it_is_said(tmp_path: Path) -> None:
    source = tiny.embedding_model("bert", tmp_path / "source")
    text = write_text(tmp_path / "text.txt")
    job = jobs.make_job(source, "best", "w3a16_g32", text=text, allow_unreadable=True)
    assert not job.plan.recipe.heals
    assert "scales are not healed, as the model has no head that predicts tokens" in job.plan.notes
