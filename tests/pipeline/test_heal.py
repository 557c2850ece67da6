"""Scales trained on the original's logits once all blocks are quantized: whole runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_extra
import tiny_jobs as jobs
import torch
from transformers import AutoModelForCausalLM

from quantkit.calibration import healing, kept_training
from quantkit.calibration.healing import Healing
from quantkit.calibration.held_blocks import HeldBlocks, _others
from quantkit.checkpoint.files import FileSource
from quantkit.errors import StoppedError
from quantkit.formats.registry import format_of
from quantkit.methods.recipe import load_recipe
from quantkit.model.causal import CausalModel
from quantkit.numbers.tensor import QuantizedTensor
from quantkit.pipeline.duration import Speeds, duration
from quantkit.pipeline.predict import Prediction
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


@pytest.mark.parametrize("kind", ["llama", "glm4_moe"])
def test_the_source_is_read_once(kind: str, tmp_path: Path) -> None:
    """Of the second, blocks hold a buffer too, which is no weight; a reference reads all anew."""
    model = (jobs if kind == "llama" else tiny_extra).build(kind, tmp_path / "model")
    options = {**OPTIONS, "overrides": (*HEALED[:1], "heal.iterations=3", "refine=null")}
    draw = torch.Generator().manual_seed(0)
    options["calibration"] = torch.randint(3, 51, (8, 32), generator=draw)
    outs, loaded = [], []
    load = CausalModel.load_block

    def note(self: CausalModel, index: int) -> torch.nn.Module:
        loaded.append(index)
        return load(self, index)

    def anew(self: HeldBlocks, index: int) -> torch.nn.Module:
        block = load(self._model, index)
        with torch.no_grad():
            for path in _others(block, self._held[index]):
                block.state_dict()[path].copy_(self._read(f"{index}:{path}"))
        return block

    for name, read in (("once", HeldBlocks.load), ("anew", anew)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Prediction, "heals_in_memory", lambda *_: False)
            patch.setattr(CausalModel, "load_block", note)
            patch.setattr(HeldBlocks, "load", read)
            job = jobs.make_job(model, "best", "w3a16_g16", **options)
            loaded.clear()
            outs.append(jobs.hashes(jobs.finish(job, tmp_path / name).out))
            assert loaded == list(range(job.model.num_blocks))
            assert job.model.num_blocks == (2 if kind == "llama" else 4)
    assert outs[0] == outs[1]


def killed_at(number: int) -> pytest.MonkeyPatch:
    """A run ends as training comes to a step for the so-many-th time."""
    patch, kept, count = pytest.MonkeyPatch(), Healing._step, 0

    def fail(self: Healing, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise KeyboardInterrupt
        kept(self, *arguments)

    patch.setattr(Healing, "_step", fail)
    return patch


def counted() -> tuple[pytest.MonkeyPatch, list[int]]:
    """Numbers of the steps that training takes from now on."""
    patch, kept, steps = pytest.MonkeyPatch(), Healing._step, []

    def note(self: Healing, batch: int, number: int, rate: float) -> None:
        steps.append(number)
        kept(self, batch, number, rate)

    patch.setattr(Healing, "_step", note)
    return patch, steps


@pytest.mark.parametrize("number", [1, 7, 18])
def test_a_run_that_is_killed_while_healing_goes_on_there(
    number: int, llama: Path, tmp_path: Path
) -> None:
    """It looks at what is held out after steps 7, 14 and 20, and keeps each step."""
    job = jobs.make_job(llama, "best", SCHEME, **OPTIONS)
    whole = jobs.hashes(jobs.finish(job, tmp_path / "whole").out)
    with pytest.MonkeyPatch.context() as always:
        always.setattr(healing, "TIMES_SAVING", 0)
        patch = killed_at(number)
        with pytest.raises(KeyboardInterrupt):
            jobs.finish(job, tmp_path / "out")
        patch.undo()
        again = jobs.make_job(llama, "best", SCHEME, **OPTIONS)
        patch, steps = counted()
        assert jobs.hashes(run(again, tmp_path / "out", progress=False).out) == whole
        patch.undo()
    assert steps == list(range(number, 21))


@pytest.mark.parametrize("name", ["training-0.safetensors", "training.json"])
def test_a_kill_while_a_step_is_kept_leaves_the_one_before(
    name: str, llama: Path, tmp_path: Path
) -> None:
    job = jobs.make_job(llama, "best", SCHEME, **OPTIONS)
    whole = jobs.hashes(jobs.finish(job, tmp_path / "whole").out)
    places = {
        "training-0.safetensors": (kept_training.ShardWriter, "close"),
        "training.json": (kept_training, "write_file"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(healing, "TIMES_SAVING", 0)
        where, what = places[name]
        plain, count = getattr(where, what), 0

        def fail(*arguments: Any) -> None:
            nonlocal count
            path = arguments[0]
            count += "training" in str(getattr(path, "directory", path))
            if count == 3:
                raise KeyboardInterrupt
            plain(*arguments)

        patch.setattr(where, what, fail)
        with pytest.raises(KeyboardInterrupt):
            jobs.finish(job, tmp_path / "out")
    patch, steps = counted()
    again = jobs.make_job(llama, "best", SCHEME, **OPTIONS)
    assert jobs.hashes(run(again, tmp_path / "out", progress=False).out) == whole
    patch.undo()
    assert steps == list(range(3, 21))


def test_until_stops_training_after_a_step(llama: Path, tmp_path: Path) -> None:
    """Each run does a step at least, and of training too."""
    short = {**OPTIONS, "overrides": (*HEALED, "heal.iterations=6")}
    job = jobs.make_job(llama, "best", SCHEME, **short)
    whole = jobs.hashes(jobs.finish(job, tmp_path / "whole").out)
    out, told = tmp_path / "out", []
    while not out.exists():
        try:
            jobs.finish(job, out, deadline=time.monotonic())
        except StoppedError as stop:
            told.append(str(stop))
    # outside, embed and two blocks; five stops between six steps of training.
    assert len(told) == 4 + 5
    assert "4 of 5 steps done, heal being next; the same" in told[3]
    assert "heal being next (2 of 6 training steps are kept); the same command" in told[5]
    assert jobs.hashes(out) == whole


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
