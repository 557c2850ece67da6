"""Models with small weights: powers of two moved from one matrix to the next change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import FormatError
from quantkit.pipeline.export import export
from quantkit.pipeline.report import render_html, render_markdown

METHODS = [
    ("int8", "w8a16_row"),
    ("rtn", "w4a16_g32"),
    ("rtn", "w4a16_g32_asym"),
    ("awq", "w4a16_g32_asym"),
    ("gptq", "w3a16_g32"),
    ("best", "w4a16_g32"),
    ("smoothquant", "w8a8_row"),
    ("fp8", "fp8a8_row"),
    ("nf4", "nf4_b64_dq"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Factor -> a model whose up_proj is divided, and down_proj multiplied, by it."""
    found = {}
    for factor in (1.0, 2.0**20):
        directory = tmp_path_factory.mktemp("small") / "model"
        jobs.build("llama", directory)
        tensors = load_file(directory / "model.safetensors")
        for name in tensors:
            if "up_proj" in name:
                tensors[name] = tensors[name] / factor
            if "down_proj" in name:
                tensors[name] = tensors[name] * factor
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        found[factor] = directory
    return found


def run(model: Path, method: str, scheme: str, **options: str) -> tuple[float, dict[str, object]]:
    """The relative difference of logits, and the report."""
    out = model.parent / f"{method}-{scheme}{''.join(options.values())}"
    jobs.finish(jobs.make_job(model, method, scheme, **options), out)
    original = jobs.logits(jobs.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    report = json.loads((out / "quantkit" / "report.json").read_text())
    return jobs.distance(jobs.logits(jobs.dequantized(model, out)), original), report


@pytest.mark.parametrize(("method", "scheme"), METHODS)
def test_small_weights_cost_what_large_ones_do(
    models: dict[float, Path], method: str, scheme: str
) -> None:
    with jobs.one_thread():
        (whole, told), (small, _) = (run(model, method, scheme) for model in models.values())
    assert small == pytest.approx(whole, rel=0.2)
    assert told["notes"] == []


def test_a_format_with_float16_scales_says_what_it_cannot_hold(models: dict[float, Path]) -> None:
    with jobs.one_thread():
        (_, fine), (_, report) = (
            run(model, "rtn", "w4a16_g32", format="gptq") for model in models.values()
        )
    assert not any("float16" in note for note in fine["degraded"].values())
    lost = {name for name, note in report["degraded"].items() if "float16 does not hold" in note}
    assert lost == {f"model.layers.{index}.mlp.up_proj.weight" for index in (0, 1)}


def test_scales_beyond_float16_are_told(models: dict[float, Path]) -> None:
    with jobs.one_thread():
        _, report = run(models[2.0**20], "rtn", "w4a16_g32")
    (note,) = report["notes"]
    assert "in 2 weights are too small or too large for float16" in note
    for page in (render_markdown(report), render_html(report)):
        assert note in page


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_an_export_says_what_float16_scales_lose(
    models: dict[float, Path], target: str, tmp_path: Path
) -> None:
    with jobs.one_thread():
        run(models[2.0**20], "rtn", "w4a16_g32")
    source = models[2.0**20].parent / "rtn-w4a16_g32"
    with pytest.raises(FormatError, match=r"2 of 14 weights exactly .*up_proj.weight: .* rounded"):
        export(source, tmp_path / "out", format_name=target, progress=False)
    done = export(source, tmp_path / "out", format_name=target, allow_rounding=True, progress=False)
    report = json.loads((done.out / "quantkit" / "report.json").read_text())
    told = {name: note for name, note in report["degraded"].items() if "of themselves" in note}
    assert set(told) == {f"model.layers.{index}.mlp.up_proj.weight" for index in (0, 1)}
    # The scales are float16 now: nothing is left for a cast to round.
    assert report["notes"] == []
