"""Models quantized straight into GGUF files: types, quality, resuming, refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch
from typer.testing import CliRunner

import quantkit
import quantkit.calibration.gather
import quantkit.pipeline.gguf_quantize
from quantkit.checks.inspection import inspect
from quantkit.checks.verify import verify
from quantkit.demo.files import demo_path
from quantkit.errors import CheckpointError, QuantkitError, RecipeError, SchemeError
from quantkit.formats.gguf.file import read_gguf
from quantkit.formats.open import open_source
from quantkit.pipeline.gguf_export import MODEL_FILE
from quantkit.pipeline.gguf_job import GgufRequest, prepare_gguf
from quantkit.pipeline.gguf_quantize import quantize_gguf, run_gguf

pytest.importorskip("gguf")
from formats.gguf.test_export import save_model


def token_rows(count: int = 8, length: int = 64) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    rows: list[list[int]] = torch.randint(1, 2048, (count, length), generator=generator).tolist()
    return rows


def quantize(out: Path, **options: Any) -> Any:
    chosen: dict[str, Any] = {"calibration": token_rows(), "samples": 8, "seq_len": 64}
    model = str(options.pop("model", demo_path()))
    return quantize_gguf(model, out, progress=False, **(chosen | options))


def divergence(path: Path) -> float:
    """KL of a file's model from the demo model, in nats per token."""
    ids = torch.tensor(token_rows(4))
    with torch.no_grad():
        found, expected = (
            torch.log_softmax(quantkit.load(p, dtype=torch.float32)(ids).logits, -1)
            for p in (path, demo_path())
        )
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def test_a_mixed_recipe_is_resumed_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = quantize(tmp_path / "whole", scheme="q4_k_m")
    header = read_gguf(done.out / MODEL_FILE)
    assert header.tensors["token_embd.weight"].type == "Q6_K"
    assert header.tensors["blk.0.attn_q.weight"].type == "Q4_K"
    assert header.count("general.file_type") == 15
    assert done.notes == ()
    report = json.loads((done.out / "quantkit" / "report.json").read_text())
    assert len(report["weights"]) == 29
    assert all(entry["error"] < 0.02 for entry in report["weights"])
    original = quantkit.pipeline.gguf_quantize._Work.run

    def interrupted(work: Any, step: str) -> Any:
        if step == "block 2":
            raise KeyboardInterrupt
        return original(work, step)

    monkeypatch.setattr(quantkit.pipeline.gguf_quantize._Work, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "again", scheme="q4_k_m")
    assert not (tmp_path / "again").exists()
    steps: list[str] = []

    def counted(work: Any, step: str) -> Any:
        steps.append(step)
        return original(work, step)

    monkeypatch.setattr(quantkit.pipeline.gguf_quantize._Work, "run", counted)
    resumed = quantize(tmp_path / "again", scheme="q4_k_m")
    assert steps == ["block 2", "block 3", "head"]
    assert (resumed.out / MODEL_FILE).read_bytes().replace(b"again", b"whole") == (
        done.out / MODEL_FILE
    ).read_bytes()
    # A finished output is left as it is.
    assert quantize(tmp_path / "again", scheme="q4_k_m").out == resumed.out
    assert len(steps) == 3
    # 4.5 bits and more: seen .009 on random tokens, 10 times that with nearest 4-bit codes swapped.
    assert divergence(done.out / MODEL_FILE) < 0.05


def test_without_calibration_codes_are_nearest(tmp_path: Path) -> None:
    done = quantize(tmp_path / "q8", scheme="q8_0", method="rtn", calibration="nowhere.txt")
    assert done.types == {"Q8_0": 29}
    assert divergence(done.out / MODEL_FILE) < 1e-3


def test_rows_that_256_does_not_divide_are_told(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "mixtral", intermediate_size=96)
    done = quantize_gguf(
        str(source), tmp_path / "out", scheme="q4_k_m", method="rtn", progress=False
    )
    # 64 and 96 columns: blocks of 32 only.
    assert set(done.types) == {"Q5_0", "Q8_0"}
    assert any("blk.0.ffn_up_exps.weight: Q4_K does not divide" in note for note in done.notes)
    loaded = quantkit.load(done.out / MODEL_FILE)
    assert type(loaded).__name__ == "MixtralForCausalLM"
    header = read_gguf(done.out / MODEL_FILE)
    assert header.tensors["blk.0.ffn_up_exps.weight"].shape == (3, 96, 64)
    assert header.tensors["blk.0.ffn_gate_inp.weight"].type == "F32"


def test_recipes_and_methods_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="q4_k_m"):
        quantize(tmp_path / "out", scheme="w4a16_g128")
    with pytest.raises(RecipeError, match="gptq"):
        quantize(tmp_path / "out", scheme="q4_0", method="awq")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs a --scheme"),
        (["--scheme", "q4_0", "--recipe", "mine.yaml"], "--recipe is not taken"),
        (["--scheme", "q4_0", "--set", "rounding.damp=1"], "--set is not taken"),
        (["--scheme", "q4_0", "--max-vram", "1GB"], "--max-vram is not taken"),
        (["--scheme", "q4_0", "--max-shard-size", "1GB"], "--max-shard-size is not taken"),
        (["--scheme", "q4_0", "--trust-remote-code"], "--trust-remote-code is not taken"),
        (["--scheme", "q4_0", "--allow-unreadable"], "--allow-unreadable is not taken"),
        (["--scheme", "q4_0", "--device", "cuda"], "quantized on the CPU"),
        (["--scheme", "q4_0", "--eval"], "llama-perplexity"),
        (["--scheme", "q4_0", "--fail-if", "kl>1"], "llama-perplexity"),
        (["--scheme", "q4_0", "--skip", "*nothing*"], "matches no tensor"),
        (["--scheme", "q4_0", "--lm-head", "w8a16_row"], "q8_0, .* or f16"),
        (["--scheme", "q4_0", "--max-ram", "100MB"], "the smallest that works is --max-ram"),
    ],
)
def test_the_command_refuses_what_it_does_not_take(
    tmp_path: Path, options: list[str], message: str
) -> None:
    from quantkit.cli.app import app

    line = [str(demo_path()), "--format", "gguf", *options, "--method", "rtn"]
    for command in (["quantize", *line, "--out", str(tmp_path / "o")], ["plan", *line]):
        if command[0] == "plan" and {"--eval", "--fail-if"} & set(options):
            continue
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, QuantkitError), result.output
        assert re.search(message, str(result.exception))
    assert not list(tmp_path.iterdir())


def test_what_is_skipped_stays_and_the_head_gets_its_own_type(tmp_path: Path) -> None:
    skip = ("*.layers.1.*", "model.layers.0.mlp.down_proj")
    done = quantize(tmp_path / "out", scheme="q4_k_m", method="rtn", skip=skip, head="q8_0")
    types = {name: t.type for name, t in read_gguf(done.out / MODEL_FILE).tensors.items()}
    assert types["blk.1.attn_q.weight"] == types["blk.0.ffn_down.weight"] == "BF16"
    assert types["blk.0.ffn_up.weight"] == "Q4_K"
    # The demo's head is its embedding.
    assert types["token_embd.weight"] == "Q8_0"
    source, file = open_source(demo_path()), open_source(done.out)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(source.read(name), file.read(name))
    assert verify(done.out, against=demo_path()).ok


def test_some_experts_of_a_layer_cannot_be_skipped(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "mixtral")
    with pytest.raises(RecipeError, match="not all of its layer's experts"):
        prepare_gguf(
            str(source), GgufRequest(scheme="q8_0", method="rtn", skip=("*experts.0.w1*",))
        )


def test_the_plan_is_what_the_file_holds(tmp_path: Path) -> None:
    request = GgufRequest(scheme="q3_k_m", method="rtn", skip=("*.layers.1.*",))
    job = prepare_gguf(str(demo_path()), request)
    done = run_gguf(job, tmp_path / "out", "demo", progress=False)
    header = read_gguf(done.out / MODEL_FILE)
    planned = {fate.name: (fate.type, fate.shape, fate.num_bytes) for fate in job.fates}
    assert planned == {t.name: (t.type, t.shape, t.num_bytes) for t in header.tensors.values()}
    assert job.bits_per_weight() == pytest.approx(inspect(done.out).bits_per_weight)
    run = json.loads((done.out / "quantkit/run.json").read_text())
    assert run["predicted_peak_bytes"] == job.prediction.largest
    assert 0 < run["peak_rss_bytes"] == done.peak_bytes


def test_plan_prints_every_tensors_fate_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.cli.app import app

    monkeypatch.chdir(tmp_path)
    line = ["plan", str(demo_path()), "--format", "gguf", "--scheme", "q4_k_m", "--method", "rtn"]
    text = CliRunner().invoke(app, line).output
    assert re.search(r"blk.0.attn_norm.weight +kept +F32 .* norm, bias or table", text)
    assert re.search(r"blk.0.attn_q.weight +quantized +Q4_K .* recipe", text)
    assert "peak RAM" in text and "bits       5.131 per weight" in text
    data = json.loads(CliRunner().invoke(app, [*line, "--json"]).output)
    assert len(data["tensors"]) == 38 and data["predicted"]["disk_bytes"] > data["output_bytes"]
    assert not list(tmp_path.iterdir())


def test_a_memory_limit_means_more_passes_and_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    original = quantkit.calibration.gather.split_passes

    def counted(sizes: Any, budget: int | None) -> Any:
        found = original(sizes, budget)
        passes.append(len(found))
        return found

    monkeypatch.setattr(quantkit.calibration.gather, "split_passes", counted)
    options = {"calibration": token_rows(2, 32), "samples": 2, "seq_len": 32}
    request = GgufRequest(scheme="q4_0", **options)
    job = prepare_gguf(str(demo_path()), request)
    run_gguf(job, tmp_path / "free", "demo", progress=False)
    assert set(passes) == {1}
    passes.clear()
    tight = replace(job, request=replace(request, max_ram=job.prediction.smallest))
    run_gguf(tight, tmp_path / "tight", "demo", progress=False)
    assert min(passes) > 1
    first, second = ((tmp_path / name / MODEL_FILE).read_bytes() for name in ("free", "tight"))
    assert first == second


def test_a_quantized_model_is_taken_if_asked_for(tmp_path: Path) -> None:
    checkpoint = jobs.finish(jobs.make_job(demo_path(), "rtn", "w8a16_row"), tmp_path / "q").out
    with pytest.raises(CheckpointError, match="--requantize"):
        quantize(tmp_path / "out", model=checkpoint, scheme="q8_0", method="rtn")
    done = quantize(
        tmp_path / "out", model=checkpoint, scheme="q8_0", method="rtn", requantize=True
    )
    assert divergence(done.out / MODEL_FILE) < 1e-3
