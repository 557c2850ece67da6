"""Blocks whose weights are refined on their outputs: whole runs, and what they need."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch

from quantkit.calibration.block_loss import BlockLoss
from quantkit.checkpoint.files import FileSource
from quantkit.formats.registry import format_of
from quantkit.methods.recipe import load_recipe
from quantkit.methods.rules import Rule
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.duration import Speeds, duration
from quantkit.pipeline.session import run

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEME = "w3a16_g32_asym"
LEARNED = ("refine=learned", "refine.iterations=24", "refine.looks=8", "heal=null")


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "quantkit" / "report.json").read_text())
    return found


def scales(out: Path) -> dict[str, torch.Tensor]:
    source = FileSource(out)
    fmt = format_of(source)
    return {n: fmt.unpack(w, source).scale.values() for n, w in fmt.weights(source).items()}


@pytest.mark.parametrize(
    ("kind", "method", "scheme", "overrides"),
    [
        ("llama", "best", SCHEME, ()),
        ("llama", "gptq", "w2a16_g32", ("propagate=false",)),
        ("llama", "rtn", "w3a16_row", ()),
        ("mixtral", "best", SCHEME, ()),
        ("gpt2", "gptq", "w3a16_g32", ()),
        ("qwen3", "best", "w2a16_g32", ()),
    ],
    ids=["llama", "not propagated", "data-free", "experts", "conv1d", "qwen3"],
)
def test_outputs_of_blocks_come_nearer(
    kind: str, method: str, scheme: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    model = jobs.build(kind, tmp_path / "model")
    job = jobs.make_job(
        model, method, scheme, overrides=(*LEARNED, *overrides), allow_unreadable=True
    )
    jobs.finish(job, tmp_path / "out")
    refined = report(tmp_path / "out")["refined"]
    assert list(refined) == ["block 0", "block 1"]
    assert all(step["after"] <= step["before"] for step in refined.values())
    assert any(step["after"] < step["before"] for step in refined.values())


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_smallest_budget_changes_no_byte(kind: str, tmp_path: Path) -> None:
    model = jobs.build(kind, tmp_path / "model")
    options: dict[str, Any] = {"overrides": LEARNED, "allow_unreadable": True}
    whole = jobs.make_job(model, "best", SCHEME, **options)
    # Planned anew it would count what the process has grown by since.
    least = dataclasses.replace(whole, max_ram=whole.prediction.smallest)
    outs = [
        jobs.hashes(jobs.finish(job, tmp_path / name).out)
        for job, name in ((whole, "whole"), (least, "least"))
    ]
    assert outs[0] == outs[1]


@pytest.mark.parametrize("step", ["block 0", "block 1"])
def test_a_run_that_stops_within_a_block_ends_in_the_same_bytes(
    step: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(llama, "best", SCHEME, overrides=LEARNED, allow_unreadable=True)
    whole = jobs.hashes(jobs.finish(job, tmp_path / "whole").out)
    kept = BlockLoss.slopes

    def fail(self: BlockLoss, batch: int) -> tuple[float, list[torch.Tensor]]:
        fail.count += 1  # type: ignore[attr-defined]
        if fail.count == (10 if step == "block 0" else 30):  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return kept(self, batch)

    fail.count = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(BlockLoss, "slopes", fail)
    with pytest.raises(KeyboardInterrupt):
        jobs.finish(job, tmp_path / "out")
    monkeypatch.setattr(BlockLoss, "slopes", kept)
    again = jobs.make_job(llama, "best", SCHEME, overrides=LEARNED, allow_unreadable=True)
    assert jobs.hashes(run(again, tmp_path / "out", progress=False).out) == whole


def test_what_a_part_does_not_take_is_as_without_it(llama: Path, tmp_path: Path) -> None:
    plain = jobs.make_job(llama, "best", "w4a16_g32")
    refined = jobs.make_job(llama, "best", "w4a16_g32", overrides=LEARNED)
    for job, name in ((plain, "plain"), (refined, "refined")):
        jobs.finish(job, tmp_path / name)
    assert "refined" not in report(tmp_path / "refined")
    one, other = scales(tmp_path / "plain"), scales(tmp_path / "refined")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_weights_of_a_block_stay(tmp_path: Path) -> None:
    model = jobs.build("llama", tmp_path / "model")
    recipe = load_recipe("gptq", scheme="w3a16_g32", samples=8, seq_len=32, overrides=LEARNED)

    rules = (Rule(match="*.mlp.*", scheme=Scheme.parse("w4a16_g32")),)
    job = jobs.make_job(
        model, recipe=dataclasses.replace(recipe, rules=rules), allow_unreadable=True
    )
    plain = jobs.make_job(
        model, recipe=dataclasses.replace(recipe, rules=rules, refine=None), allow_unreadable=True
    )
    for each, name in ((job, "refined"), (plain, "plain")):
        jobs.finish(each, tmp_path / name)
    one, other = scales(tmp_path / "refined"), scales(tmp_path / "plain")
    first = [name for name in one if "layers.0" in name]
    changed = {name for name in first if not torch.equal(one[name], other[name])}
    assert changed and all("self_attn" in name for name in changed)


def test_refining_is_predicted(llama: Path) -> None:
    jobs_ = [
        jobs.make_job(llama, "best", SCHEME, overrides=overrides, allow_unreadable=True)
        for overrides in (
            ("refine=null", "heal=null"),
            LEARNED,
            (*LEARNED, "refine.iterations=48"),
        )
    ]
    speeds = Speeds(own=1e9, wide=1e9, passes=1e9, share=1.0)
    seconds = [duration(j.model, j.plan, j.calibration, speeds) for j in jobs_]
    assert seconds[0] < seconds[1] < seconds[2]
    assert jobs_[1].prediction.solve > jobs_[0].prediction.solve
