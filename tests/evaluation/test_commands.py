"""`quantize --eval` and `bench`: what they write, and with which exit code they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_eval
import tiny_jobs as jobs
from quantkit_eval.timing.speed import cache_formula
from transformers import LlamaConfig

from quantkit.checks.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_eval.loud("llama", tmp_path_factory.mktemp("model"))
    tiny_eval.write_heldout(path)
    return path


def test_quantize_measures_what_it_cost(model: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    line = ["quantize", model, "--out", out, "--method", "int8", "--text", model / "heldout.txt"]
    assert jobs.command(*line, "--fail-if", "kl>1e-9", "--json") == 1
    summary = json.loads(capsys.readouterr().out)
    assert summary["written"] is True
    assert summary["evaluation"]["violated"] is True
    report = out / "quantkit" / "evaluation"
    assert sorted(p.name for p in report.iterdir()) == [
        f"report.{e}" for e in ("html", "json", "md")
    ]
    # The report came after the manifest: the checkpoint is as whole as before.
    assert verify(out).ok
    assert jobs.command(*line, "--fail-if", "kl>9") == 0
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--fail-if", "bleu>1", "write METRIC>VALUE"),
        ("--fail-if", "task:sort<-2pt", "there is no task 'sort'; asked for with --tasks: none"),
        ("--text", "missing.txt", "does not exist"),
        ("--text", "short.txt", "short.txt has 5 tokens, one window needs 128"),
    ],
)
def test_wishes_that_cannot_be_met_show_before_the_work(
    model: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.chdir(model)
    (model / "short.txt").write_text("short")
    for line in (["quantize", model, "--method", "int8", "--eval"], ["compare", model]):
        assert jobs.command(*line, "--out", tmp_path / "out", option, value) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_bench_measures_speed_and_memory(model: Path, capsys: Capture) -> None:
    line = ["bench", model, "--batches", "1,3", "--prompt-tokens", 16, "--new-tokens", 4]
    assert jobs.command(*line, "--repeats", 2, "--device", "cpu", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "quantkit.speed/2"
    assert found["weights_on_disk"] == (model / "model.safetensors").stat().st_size
    for batch, size in zip(found["batches"], (1, 3), strict=True):
        assert batch["batch"] == size
        assert 0 < batch["next_token"]["low"] <= batch["next_token"]["median"]
        assert batch["tokens_per_second"] == pytest.approx(size / batch["next_token"]["median"])
        # Two layers, two key-value heads of 16, 19 tokens, float32: formula and tensors agree.
        assert (
            batch["cache_bytes"] == batch["cache_bytes_formula"] == size * 2 * 2 * 2 * 16 * 19 * 4
        )
    assert jobs.command("bench", model, "--prompt-tokens", 500) == 2
    assert "do not fit the model's 128 positions" in capsys.readouterr().err


def test_cache_formula_is_that_of_llama_2_7b() -> None:
    # 0.5 MB a token in float16, as is well known: 2 · 32 layers · 4096 numbers · 2 bytes.
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
    )
    assert cache_formula(config, 1, 2) == 524_288
