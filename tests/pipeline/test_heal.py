"""Scales trained on the original's logits once all blocks are quantized: whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch
from transformers import AutoModelForCausalLM

from quantkit.calibration.healing import Healing
from quantkit.checkpoint.files import FileSource
from quantkit.formats.registry import format_of
from quantkit.methods.recipe import load_recipe
from quantkit.numbers.tensor import QuantizedTensor
from quantkit.pipeline.duration import Speeds, duration
from quantkit.pipeline.session import run

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEME = "w3a16_g32_asym"
HEALED = ("heal=scales", "heal.iterations=20", "heal.rate=0.002", "refine=null")
PLAIN = ("refine=null", "heal=null")
OPTIONS: dict[str, Any] = {"overrides": HEALED, "allow_unreadable": True}


def healed(out: Path) -> dict[str, float]:
    report = json.loads((out / "quantkit" / "report.json").read_text())
    found: dict[str, float] = report["refined"]["heal"]
    return found


def tensors(out: Path) -> dict[str, QuantizedTensor]:
    source = FileSource(out)
    fmt = format_of(source)
    return {n: fmt.unpack(w, source) for n, w in fmt.weights(source).items()}


@pytest.mark.parametrize(
    ("kind", "scheme", "more"),
    [
        ("llama", SCHEME, {}),
        ("llama", "w2a16_g32", {"head": "w4a16_g32"}),
        ("mixtral", SCHEME, {}),
        ("gpt2", "w3a16_g32", {}),
        ("gemma3_text", "w3a16_row", {}),
    ],
    ids=["llama", "head", "experts", "conv1d", "gemma3"],
)
def test_the_divergence_falls_and_codes_stay(
    kind: str, scheme: str, more: dict[str, Any], tmp_path: Path
) -> None:
    model = jobs.build(kind, tmp_path / "model")
    job = jobs.make_job(model, "best", scheme, **OPTIONS, **more)
    jobs.finish(job, tmp_path / "out")
    plain = jobs.make_job(model, "best", scheme, overrides=PLAIN, allow_unreadable=True, **more)
    jobs.finish(plain, tmp_path / "plain")
    loss = healed(tmp_path / "out")
    assert loss["after"] < loss["before"]
    one, other = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    assert set(one) == set(other)
    for name in one:
        if name != "lm_head.weight":
            assert torch.equal(one[name].codes, other[name].codes)
    assert any(not torch.equal(one[n].scale.values(), other[n].scale.values()) for n in one)


def test_the_divergence_is_that_of_the_model_written(llama: Path, tmp_path: Path) -> None:
    """On the sequences that judge, by transformers' own forward."""
    job = jobs.make_job(llama, "best", SCHEME, **OPTIONS)
    jobs.finish(job, tmp_path / "out")
    assert job.calibration is not None
    # One batch holds all sequences of these runs, so that it judges too.
    ids = job.calibration.ids

    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    written = jobs.dequantized(llama, tmp_path / "out")
    with torch.no_grad():
        p, q = (m(ids).logits.log_softmax(-1) for m in (original, written))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert healed(tmp_path / "out")["after"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_blocks_in_memory_or_not_give_the_same_bytes(kind: str, tmp_path: Path) -> None:
    model = jobs.build(kind, tmp_path / "model")
    whole = jobs.make_job(model, "best", SCHEME, **OPTIONS)
    least = jobs.make_job(
        model, "best", SCHEME, max_ram=whole.prediction.smallest + 2**26, **OPTIONS
    )
    assert whole.prediction.heals_in_memory(None, None, "cpu")
    smaller = whole.prediction.base + whole.prediction.block + whole.prediction.heal
    assert not whole.prediction.heals_in_memory(smaller, None, "cpu")
    outs = [jobs.hashes(jobs.finish(whole, tmp_path / "whole").out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(least.prediction), "heals_in_memory", lambda *_: False)
        outs.append(jobs.hashes(jobs.finish(least, tmp_path / "least").out))
    assert outs[0] == outs[1]


@pytest.mark.parametrize("number", [1, 7])
def test_a_run_that_stops_while_healing_ends_in_the_same_bytes(
    number: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(llama, "best", SCHEME, **OPTIONS)
    whole = jobs.hashes(jobs.finish(job, tmp_path / "whole").out)
    kept, count = Healing._step, 0

    def fail(self: Healing, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise KeyboardInterrupt
        kept(self, *arguments)

    monkeypatch.setattr(Healing, "_step", fail)
    with pytest.raises(KeyboardInterrupt):
        jobs.finish(job, tmp_path / "out")
    monkeypatch.setattr(Healing, "_step", kept)
    again = jobs.make_job(llama, "best", SCHEME, **OPTIONS)
    assert jobs.hashes(run(again, tmp_path / "out", progress=False).out) == whole


def test_more_bits_are_as_without_it(llama: Path, tmp_path: Path) -> None:
    for name, overrides in (("plain", PLAIN), ("healed", HEALED)):
        jobs.finish(jobs.make_job(llama, "best", "w4a16_g32", overrides=overrides), tmp_path / name)
    one, other = tensors(tmp_path / "plain"), tensors(tmp_path / "healed")
    assert all(torch.equal(one[n].scale.values(), other[n].scale.values()) for n in one)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("gptq", ()),
        ("gptq", ("propagate=false",)),
        ("gptq", ("refine=learned",)),
        # No statistics, but text all the same.
        ("rtn", ()),
    ],
)
def test_any_recipe_is_healed(
    method: str, overrides: tuple[str, ...], llama: Path, tmp_path: Path
) -> None:
    more = ("heal=scales", "heal.iterations=20", "heal.rate=0.002", *overrides)
    job = jobs.make_job(llama, method, SCHEME, overrides=more, allow_unreadable=True)
    jobs.finish(job, tmp_path / "out")
    loss = healed(tmp_path / "out")
    assert loss["after"] < loss["before"]


def test_a_head_of_few_bits_alone_learns_nothing() -> None:
    recipe = load_recipe("best", scheme="w4a16_g32", head="w3a16_g32")
    assert not recipe.heals and not recipe.refines and recipe.calibrated
    rounded = load_recipe("best", scheme="w3a16_g32", head="w8a8_row")
    assert rounded.heals and rounded.refines


def test_healing_is_predicted(llama: Path) -> None:
    jobs_ = [
        jobs.make_job(llama, "best", SCHEME, overrides=overrides, allow_unreadable=True)
        for overrides in (PLAIN, HEALED, (*HEALED, "heal.iterations=48"))
    ]
    speeds = Speeds(own=1e9, wide=1e9, passes=1e9, share=1.0)
    seconds = [duration(j.model, j.plan, j.calibration, speeds) for j in jobs_]
    assert seconds[0] < seconds[1] < seconds[2]
    assert jobs_[1].prediction.disk > jobs_[0].prediction.disk
    assert jobs_[0].prediction.heal == 0 < jobs_[1].prediction.heal
    found = jobs_[1].prediction
    assert found.peak(None) >= found.base + found.block + found.heal + found.resident
    assert found.peak(found.smallest) <= found.smallest
