"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.manifest import write_manifest
from quantkit.formats.registry import available_formats
from quantkit.methods.recipe import builtin_recipes, load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    return jobs.finish(jobs.make_job(llama, "gptq", "w4a16_g32"), out).out


def options(model: Path, *more: object) -> list[object]:
    text = model / "calibration.txt"
    return [model, "--calib", text, "--samples", 8, "--seq-len", 32, *more]


def test_quantize_prints_a_summary_for_people(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    line = options(llama, "--out", out, "--method", "gptq", "--scheme", "w4a16_g32")
    assert jobs.command("quantize", *line) == 0
    captured = capsys.readouterr()
    assert captured.err == "", "quiet when not a terminal"
    for part in (
        f"{out}: complete in",
        "gptq, w4a16_g32, as compressed-tensors",
        "x smaller",
        "per weight",
        "transformers         reads it",
        "vllm                 reads it",
        "calibrated on calibration.txt: 8 x 32 tokens",
        "peak RAM",
        "report.html",
    ):
        assert part in captured.out
    assert "degraded" not in captured.out


def test_json_on_stdout_is_all_there_is(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    line = options(llama, "--out", out, "--method", "best", "--scheme", "w4a16_g32", "--json")
    assert jobs.command("quantize", *line) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    summary = json.loads(captured.out)
    assert summary["out"] == str(out) and summary["written"] is True
    assert summary["method"] == "best" and summary["scheme"] == "w4a16_g32"
    assert summary["degraded"] == {} and summary["readers"]["vllm"] is None
    assert summary["run"]["peak_rss_bytes"] > 2**26
    assert summary["run"]["steps_before_resume"] == 0
    assert summary["size"]["bytes"] == (out / "model.safetensors").stat().st_size
    # 4 bits and a float32 scale for every 32 weights.
    assert 5.0 <= summary["size"]["bits_per_quantized_weight"] < 5.1


def test_a_plan_names_every_tensor_and_writes_nothing(
    llama: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = options(llama, "--method", "awq", "--scheme", "w4a16_g32_asym", "--skip", "*down_proj")
    assert jobs.command("plan", *line) == 0
    text = capsys.readouterr().out
    rows = {row[0]: row for row in map(str.split, text.splitlines()) if row}
    names = load_file(llama / "model.safetensors")
    assert set(names) <= set(rows)
    assert rows["model.layers.0.mlp.up_proj.weight"][1:3] == ["quantized", "w4a16_g32_asym"]
    assert rows["model.layers.0.mlp.down_proj.weight"][-2:] == ["rule", "'*down_proj'"]
    assert rows["model.layers.0.input_layernorm.weight"][1] == "rescaled"
    assert rows["lm_head.weight"][-2:] == ["output", "head"]
    assert "peak RAM" in text and "disk" in text and "time" in text
    assert jobs.command("plan", *line, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert {tensor["name"] for tensor in plan["tensors"]} == set(names)
    assert plan["predicted"]["smallest_max_ram_bytes"] > 2**20
    # The file's header takes a little more.
    assert 0 < plan["output_bytes"] - sum(tensor["bytes"] for tensor in plan["tensors"]) < 10_000
    assert list(tmp_path.iterdir()) == []


def test_a_plan_predicts_the_bytes_that_are_written(
    llama: Path, tmp_path: Path, capsys: Capture
) -> None:
    for method, scheme in (("nf4", "nf4_b64_dq"), ("rtn", "w2a16_g32")):
        line = options(llama, "--method", method, "--scheme", scheme, "--allow-unreadable")
        line += ["--max-shard-size", "50KB"]
        assert jobs.command("plan", *line, "--json") == 0
        plan = json.loads(capsys.readouterr().out)
        out = tmp_path / method
        assert jobs.command("quantize", *line, "--out", out) == 0
        capsys.readouterr()
        shards = list(out.glob("*.safetensors"))
        assert len(shards) > 1
        assert sum(path.stat().st_size for path in shards) == plan["output_bytes"]
        written = [load_file(path) for path in shards]
        index = json.loads((out / "model.safetensors.index.json").read_bytes())
        assert set(index["weight_map"]) == {name for file in written for name in file}
        assert jobs.command("verify", out, "--against", llama) == 0
        capsys.readouterr()


def test_a_plan_that_cannot_fit_exits_2(llama: Path, capsys: Capture) -> None:
    line = options(llama, "--method", "gptq", "--scheme", "w4a16_g32", "--max-ram", "10MiB")
    assert jobs.command("plan", *line) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "the smallest that works is --max-ram" in captured.err


def test_inspect_shows_schemes_and_provenance(finished: Path, llama: Path, capsys: Capture) -> None:
    assert jobs.command("inspect", finished) == 0
    text = capsys.readouterr().out
    assert "w4a16_g32" in text and "gptq" in text and "compressed-tensors" in text
    assert jobs.command("inspect", finished, "--json") == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert jobs.command("inspect", llama) == 0


def test_verify_exits_1_for_a_damaged_checkpoint(
    finished: Path, llama: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert jobs.command("verify", finished, "--against", llama, "--json") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    tensors = load_file(finished / "model.safetensors")
    for path in finished.rglob("*"):
        if path.is_file():
            copy = tmp_path / "damaged" / path.relative_to(finished)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name][2, 1] = float("nan")
    save_file(tensors, tmp_path / "damaged/model.safetensors", metadata={"format": "pt"})
    assert jobs.command("verify", tmp_path / "damaged") == 1
    assert "sha256" in capsys.readouterr().out
    write_manifest(tmp_path / "damaged")
    assert jobs.command("verify", tmp_path / "damaged") == 1
    assert "model.layers.0.mlp.up_proj.weight: a scale is NaN" in capsys.readouterr().out
    assert jobs.command("verify", tmp_path / "nothing") == 2


def test_generate_continues_a_prompt(finished: Path, llama: Path, capsys: Capture) -> None:
    found = []
    for path in (finished, finished, llama):
        line = ["generate", path, "--prompt", "all work and", "--max-new-tokens", 6]
        assert jobs.command(*line) == 0
        captured = capsys.readouterr()
        assert captured.out.strip()
        found.append(captured.out)
    assert found[0] == found[1]
    assert jobs.command("generate", finished, "--prompt", "x", "--max-new-tokens", 0) == 2


def test_methods_and_formats_are_listed(capsys: Capture) -> None:
    assert jobs.command("methods") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(builtin_recipes())
    for line in lines:
        name, scheme, *summary = line.split()
        assert load_recipe(name).scheme.name == scheme and len(summary) > 4
    assert jobs.command("formats") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == available_formats()
    assert all(len(line.split()) > 3 for line in lines)


DEFAULTS = {
    "awq": "w4a16_g128_asym",
    "gptq": "w4a16_g128",
    "rtn": "w4a16_g128",
    "int8": "w8a16_row",
    "smoothquant": "w8a8_row",
    "nf4": "nf4_b64_dq",
}


@pytest.mark.parametrize("method", DEFAULTS)
def test_a_method_has_the_promised_default_scheme(method: str) -> None:
    assert load_recipe(method).scheme.name == DEFAULTS[method]


def test_a_recipe_file_replaces_the_method(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: mine\nscheme: w8a16_row\nrange: mse\nrounding: nearest\n")
    line = options(llama, "--recipe", recipe, "--set", "range.steps=3", "--out", tmp_path / "out")
    assert jobs.command("quantize", *line, "--json") == 0
    assert json.loads(capsys.readouterr().out)["method"] == "mine"
    again = tmp_path / "out/quantkit/recipe.yaml"
    line = options(llama, "--recipe", again, "--out", tmp_path / "again")
    assert jobs.command("quantize", *line) == 0
    assert jobs.hashes(tmp_path / "out") == jobs.hashes(tmp_path / "again")


def test_help_names_every_command_and_option(capsys: Capture) -> None:
    assert jobs.command("--help") == 0
    text = capsys.readouterr().out
    commands = (
        "quantize",
        "plan",
        "inspect",
        "verify",
        "generate",
        "methods",
        "formats",
        "demo",
        "eval",
        "compare",
        "bench",
    )
    assert all(name in text for name in commands)
    assert jobs.command("quantize", "--help") == 0
    text = capsys.readouterr().out
    for option in (
        *("--method", "--out", "--scheme", "--format", "--calib", "--samples", "--seq-len"),
        *("--seed", "--recipe", "--set", "--skip", "--lm-head", "--max-ram", "--max-vram"),
        *("--device", "--max-shard-size", "--revision", "--trust-remote-code"),
        *("--allow-unreadable", "--fresh", "--json"),
    ):
        assert option in text


@pytest.mark.parametrize(
    "line", [[], ["nothing"], ["quantize"], ["plan"], ["quantize", "x", "--seed", "one"]], ids=str
)
def test_a_command_that_is_incomplete_exits_2(line: list[str], capsys: Capture) -> None:
    assert jobs.command(*line) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out


def test_a_process_prints_json_alone(finished: Path, llama: Path, tmp_path: Path) -> None:
    line = options(llama, "--method", "gptq", "--scheme", "w4a16_g32", "--json")
    command = [sys.executable, "-m", "quantkit", "quantize", *line, "--out", tmp_path / "out"]
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written"] is True
    assert done.stderr == ""
    assert jobs.hashes(tmp_path / "out") == jobs.hashes(finished)
