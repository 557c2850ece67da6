"""Models quantized straight into GGUF files: types, quality, resuming, refusals."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf as files
import tiny_jobs as jobs
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import quantkit
import quantkit.calibration.gather
from quantkit.checks.inspection import inspect
from quantkit.checks.verify import verify
from quantkit.demo.files import demo_path
from quantkit.errors import CheckpointError, FormatError, QuantkitError
from quantkit.formats.gguf.container import MODEL_FILE
from quantkit.formats.gguf.file import read_gguf
from quantkit.formats.gguf.source import GgufSource
from quantkit.formats.open import open_source
from quantkit.pipeline.blocks import BlockWork
from quantkit.pipeline.session import Job

pytest.importorskip("gguf")
from formats.gguf.test_export import save_model


def token_rows(count: int = 8, length: int = 64) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    rows: list[list[int]] = torch.randint(1, 2048, (count, length), generator=generator).tolist()
    return rows


def quantize(out: Path, scheme: str, method: str = "gptq", **options: Any) -> Path:
    chosen: dict[str, Any] = {"calibration": token_rows(), "samples": 8, "seq_len": 64}
    model = options.pop("model", demo_path())
    return files.quantize(model, out, scheme, method, **(chosen | options))


def job_of(model: Path, scheme: str, method: str = "rtn", **options: Any) -> Job:
    return jobs.make_job(model, method, scheme, format="gguf", **options)


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
    whole = quantize(tmp_path / "whole", "q4_k_m")
    header = read_gguf(whole / MODEL_FILE)
    assert header.tensors["token_embd.weight"].type == "Q6_K"
    assert header.tensors["blk.0.attn_q.weight"].type == "Q4_K"
    assert header.count("general.file_type") == 15
    report = json.loads((whole / "quantkit" / "report.json").read_text())
    assert len(report["weights"]) == 29
    assert all(0 < entry["error"] < 0.02 for entry in report["weights"])
    original = BlockWork.run

    def interrupted(work: Any, step: str) -> Any:
        if step == "block 2":
            raise KeyboardInterrupt
        return original(work, step)

    monkeypatch.setattr(BlockWork, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "again", "q4_k_m")
    assert not (tmp_path / "again").exists()
    steps: list[str] = []

    def counted(work: Any, step: str) -> Any:
        steps.append(step)
        return original(work, step)

    monkeypatch.setattr(BlockWork, "run", counted)
    resumed = quantize(tmp_path / "again", "q4_k_m")
    assert steps == ["block 2", "block 3", "head"]
    assert jobs.hashes(resumed) == jobs.hashes(whole)
    # A finished output is left as it is.
    assert quantize(tmp_path / "again", "q4_k_m") == resumed
    assert len(steps) == 3
    # 4.5 bits and more: seen .009 on random tokens, 10 times that with nearest 4-bit codes swapped.
    assert divergence(whole / MODEL_FILE) < 0.05


@pytest.mark.parametrize("method", ["awq", "best"])
def test_every_method_writes_a_file_that_is_its_source(tmp_path: Path, method: str) -> None:
    out = quantize(tmp_path / "out", "q4_k_m", method)
    assert files.types(out) == {"F32": 9, "Q4_K": 24, "Q6_K": 5}
    result = verify(out, against=demo_path())
    assert result.ok, result.text()
    # Seen .006 to .02 on random tokens.
    assert divergence(out / MODEL_FILE) < 0.05


def test_a_scheme_of_ggml_is_a_file_of_gguf_by_itself(tmp_path: Path) -> None:
    job = jobs.make_job(demo_path(), "rtn", "q5_k_m")
    assert job.plan.format.name == "gguf"
    assert job.plan.readers == {"llama.cpp": None, "ollama": None}


def test_without_calibration_codes_are_nearest(tmp_path: Path) -> None:
    out = quantize(tmp_path / "q8", "q8_0", "rtn", calibration="nowhere.txt")
    assert files.types(out) == {"F32": 9, "Q8_0": 29}
    assert divergence(out / MODEL_FILE) < 1e-3


def test_rows_that_256_does_not_divide_are_told(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "mixtral", intermediate_size=96)
    job = job_of(source, "q4_k_m")
    told = "blk.0.ffn_up_exps.weight: Q4_K does not divide its rows, Q5_0 is written"
    assert told in job.plan.notes
    out = jobs.finish(job, tmp_path / "out").out
    # 64 and 96 columns: blocks of 32 only.
    assert set(files.types(out)) == {"F32", "Q5_0", "Q8_0"}
    loaded = quantkit.load(out / MODEL_FILE)
    assert type(loaded).__name__ == "MixtralForCausalLM"
    header = read_gguf(out / MODEL_FILE)
    assert header.tensors["blk.0.ffn_up_exps.weight"].shape == (3, 96, 64)
    assert header.tensors["blk.0.ffn_gate_inp.weight"].type == "F32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "w4a16_g128"], "in blocks of ggml: --scheme q8_0, q4_0"),
        (["--scheme", "q4_k"], "with --format gguf it is one of"),
        (["--scheme", "q4_0", "--max-shard-size", "1GB"], "gguf is one file"),
        (["--scheme", "q4_0", "--device", "cuda"], "quantized on the CPU"),
        (["--scheme", "q4_0", "--skip", "*nothing*"], "matches no tensor"),
        (["--scheme", "q4_0", "--lm-head", "w8a16_row"], "in blocks of ggml"),
        (["--scheme", "q4_0", "--lm-head", "q4_k_m"], "a mix for a whole model"),
        (["--scheme", "q4_0", "--max-ram", "100MB"], "the smallest that works is --max-ram"),
    ],
)
def test_the_command_refuses_what_cannot_be(
    tmp_path: Path, options: list[str], message: str
) -> None:
    from quantkit.cli.app import app

    line = [str(demo_path()), "--format", "gguf", *options, "--method", "rtn"]
    for command in (["quantize", *line, "--out", str(tmp_path / "o")], ["plan", *line]):
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, QuantkitError), result.output
        assert re.search(message, str(result.exception))
    assert not list(tmp_path.iterdir())


def test_what_is_skipped_stays_and_the_head_gets_its_own_type(tmp_path: Path) -> None:
    skip = ("*.layers.1.*", "model.layers.0.mlp.down_proj")
    out = quantize(tmp_path / "out", "q4_k_m", "rtn", skip=skip, lm_head="q8_0")
    types = {name: t.type for name, t in read_gguf(out / MODEL_FILE).tensors.items()}
    assert types["blk.1.attn_q.weight"] == types["blk.0.ffn_down.weight"] == "BF16"
    assert types["blk.0.ffn_up.weight"] == "Q4_K"
    # The demo's head is its embedding.
    assert types["token_embd.weight"] == "Q8_0"
    source, file = open_source(demo_path()), open_source(out)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(source.read(name), file.read(name))
    assert verify(out, against=demo_path()).ok


def test_some_experts_of_a_layer_cannot_be_skipped(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "mixtral")
    with pytest.raises(FormatError, match="gguf keeps all experts of a layer in one tensor"):
        job_of(source, "q8_0", skip=("*experts.0.w1*",))


def test_the_plan_is_what_the_file_holds(tmp_path: Path) -> None:
    job = job_of(demo_path(), "q3_k_m", skip=("*.layers.1.*",))
    out = jobs.finish(job, tmp_path / "out").out
    header, plan = read_gguf(out / MODEL_FILE), job.plan
    stored = sum(tensor.num_bytes for tensor in header.tensors.values())
    assert stored == plan.layout.num_bytes == sum(fate.num_bytes for fate in plan.fates)
    file = GgufSource(out / MODEL_FILE)
    for fate in plan.fates:
        if fate.scheme is not None:
            assert file.type_of(fate.name) == fate.scheme.name.upper()
    assert plan.bits_per_weight == pytest.approx(inspect(out).bits_per_weight)
    run = json.loads((out / "quantkit/run.json").read_text())
    assert run["predicted_peak_bytes"] == job.prediction.largest


def test_plan_prints_every_tensors_fate_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.cli.app import app

    monkeypatch.chdir(tmp_path)
    line = ["plan", str(demo_path()), "--format", "gguf", "--scheme", "q4_k_m", "--method", "rtn"]
    text = CliRunner().invoke(app, line).output
    assert re.search(r"layers.0.input_layernorm.weight +kept .* norm or bias", text)
    assert re.search(r"layers.0.self_attn.q_proj.weight +quantized +q4_k .* mix q4_k_m", text)
    assert "peak RAM" in text and "bits       5.131 per weight" in text
    data = json.loads(CliRunner().invoke(app, [*line, "--json"]).output)
    assert len(data["tensors"]) == 38 and data["predicted"]["disk_bytes"] >= data["output_bytes"]
    assert not list(tmp_path.iterdir())


def test_a_memory_limit_means_more_passes_and_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    original = quantkit.calibration.gather.split_passes

    def counted(sizes: Any, budget: int | None) -> Any:
        found = original(sizes, budget)
        # The head reads one input, which is never divided.
        if len(sizes) > 1:
            passes.append(len(found))
        return found

    monkeypatch.setattr(quantkit.calibration.gather, "split_passes", counted)
    job = job_of(demo_path(), "q4_0", "gptq", calibration=token_rows(jobs.SAMPLES, jobs.SEQ_LEN))
    jobs.finish(job, tmp_path / "free")
    assert set(passes) == {1}
    passes.clear()
    tight = replace(job, max_ram=job.prediction.smallest)
    jobs.finish(tight, tmp_path / "tight")
    assert min(passes) > 1
    assert jobs.hashes(tmp_path / "free") == jobs.hashes(tmp_path / "tight")


def test_a_quantized_model_is_taken_if_asked_for(tmp_path: Path) -> None:
    checkpoint = jobs.finish(jobs.make_job(demo_path(), "rtn", "w8a16_row"), tmp_path / "q").out
    with pytest.raises(CheckpointError, match="--requantize"):
        quantize(tmp_path / "out", "q8_0", "rtn", model=checkpoint)
    out = quantize(tmp_path / "out", "q8_0", "rtn", model=checkpoint, requantize=True)
    assert divergence(out / MODEL_FILE) < 1e-3


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("scheme", ["q8_0", "q4_k_m"])
def test_what_float16_blocks_lose_is_told(method: str, scheme: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_path(), model)
    tensors = load_file(model / "model.safetensors")
    small = "model.layers.1.mlp.up_proj.weight"
    tensors[small] = tensors[small] * 2.0**-18
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    out = quantize(tmp_path / "out", scheme, method, model=model)
    report = json.loads((out / "quantkit/report.json").read_bytes())
    for weight in report["weights"]:
        # No weight is held exactly by its blocks.
        assert weight["error"] > 0
        lost = "float16 does not hold" in (weight["degraded"] or "")
        assert lost == (weight["name"] == small)
