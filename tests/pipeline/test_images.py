"""Runs that calibrate on images: the same bytes whatever happens on the way, and what is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_images as images
import tiny_jobs as jobs
import torch
from many import run_ranks
from transformers import AutoModelForImageTextToText, AutoProcessor

import quantkit
from quantkit.calibration.processes.ranks import World
from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.processor import load_processor
from quantkit.checks.verify import verify
from quantkit.errors import ResumeError
from quantkit.methods.recipe import load_recipe
from quantkit.model.towers.loaded import Towers
from quantkit.pipeline import blocks
from quantkit.pipeline.budget.choose import Choice
from quantkit.pipeline.duration import Speeds, duration
from quantkit.pipeline.session import Job

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, SEQ_LEN = 4, 256
# A target needs a second stream; deepstack adds features of images between blocks.
KINDS = ("gemma3", "qwen3_vl")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = images.build(kind, tmp_path_factory.mktemp(kind))
    images.write_dataset(directory / "data", COUNT)
    return directory


def make_job(
    model: Path, kind: str, method: str = "best", scheme: str = "w4a16_g32_asym", **options: Any
) -> Job:
    recipe = load_recipe(method, scheme=scheme, samples=COUNT, seq_len=SEQ_LEN)
    processor = images.processor(kind) if kind in images.WITH_VIDEO else None
    options.setdefault("calibration", str(model / "data/talks.jsonl"))
    return jobs.make_job(model, recipe=recipe, tokenizer=processor, **options)


@pytest.fixture(scope="module")
def job(model: Path, kind: str) -> Job:
    return make_job(model, kind)


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.finish(job, tmp_path_factory.mktemp("whole") / "out").out


def test_two_processes_write_the_same_bytes(job: Job, whole: Path, tmp_path: Path) -> None:
    def work(world: World) -> None:
        jobs.finish(dataclasses.replace(job, world=world), tmp_path / "out")

    assert run_ranks(2, work, tmp_path / "told") == [(0, ""), (0, "")]
    assert jobs.hashes(tmp_path / "out") == jobs.hashes(whole)


@pytest.mark.parametrize("step", ["outside", "embed", "block 0", "block 1"])
def test_an_interrupted_run_goes_on_without_the_towers(
    step: str, job: Job, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = blocks.BlockWork.run

    def interrupted(self: blocks.BlockWork, name: str) -> object:
        record = run(self, name)
        if name == step:
            raise KeyboardInterrupt
        return record

    with monkeypatch.context() as patch:
        patch.setattr(blocks.BlockWork, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            jobs.finish(job, tmp_path / "out")
    loaded, count = Towers.loaded, 0

    def counted(self: Towers) -> Any:
        nonlocal count
        count += 1
        return loaded(self)

    monkeypatch.setattr(Towers, "loaded", counted)
    jobs.finish(job, tmp_path / "out")
    # A step that was done is not in the journal before the next one begins.
    assert count == (step in ("outside", "embed"))
    assert jobs.hashes(tmp_path / "out") == jobs.hashes(whole)


def test_the_smallest_budget_gives_the_same_bytes(job: Job, whole: Path, tmp_path: Path) -> None:
    assert job.prediction.towers > job.model.towers.num_bytes
    small = dataclasses.replace(job, max_ram=job.prediction.smallest)
    assert jobs.hashes(jobs.finish(small, tmp_path / "out").out) == jobs.hashes(whole)


def test_what_came_of_it_is_told_and_works(
    model: Path, kind: str, whole: Path, tmp_path: Path
) -> None:
    record = json.loads((whole / "quantkit/report.json").read_bytes())["calibration"]
    assert record["images"] == COUNT and record["source"] == "talks.jsonl"
    assert record["chat_template"] and record["file_sha256"]
    assert verify(whole, against=str(model)).ok
    given = images.inputs(kind, 2)
    dense = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        found = quantkit.load(whole, dtype=torch.float32)(**given).logits
        wanted = dense(**given).logits
    assert 0 < jobs.distance(found, wanted) < 0.2


def test_images_are_another_run_than_text(
    model: Path, kind: str, whole: Path, job: Job, tmp_path: Path
) -> None:
    text = jobs.write_text(tmp_path)
    recipe = load_recipe("best", scheme="w4a16_g32_asym", samples=COUNT, seq_len=32)
    alone = jobs.make_job(model, recipe=recipe, text=text)
    assert alone.calibration is not None and alone.calibration.pictured is None
    assert alone.fingerprint["calibration"] != job.fingerprint["calibration"]
    images.write_dataset(tmp_path / "data", COUNT)
    images.picture(1).rotate(180).save(tmp_path / "data/1.png")
    other = make_job(model, kind, calibration=str(tmp_path / "data/talks.jsonl"))
    assert other.calibration is not None and job.calibration is not None
    assert torch.equal(other.calibration.mask, job.calibration.mask)
    with pytest.raises(ResumeError, match="calibration was"):
        jobs.finish(other, whole)


@pytest.mark.parametrize("kind", ["qwen3_vl"], indirect=True)
def test_bits_are_weighed_on_images(model: Path, kind: str, tmp_path: Path) -> None:
    def chosen(folder: Path) -> Choice:
        recipe = load_recipe("rtn", samples=2, seq_len=SEQ_LEN)
        text = str(folder / "talks.jsonl")
        job = jobs.make_job(
            model, recipe=recipe, tokenizer=images.processor(kind), calibration=text, bits=5
        )
        assert job.budget is not None
        return job.budget

    first = chosen(model / "data")
    assert len({group.scheme for group in first.groups}) > 1
    # Other pictures of the same sizes, the same texts: what groups lose is another number.
    images.write_dataset(tmp_path, COUNT)
    for number in range(COUNT):
        size = images.picture(number).size
        images.picture(number + 20).resize(size).save(tmp_path / f"{number}.png")
    assert chosen(tmp_path).kl != first.kl


def test_time_is_that_of_the_conversations_and_their_towers(model: Path, kind: str) -> None:
    job = make_job(model, kind, "gptq", "w4a16_g32")
    assert job.calibration is not None and job.calibration.pictured is not None
    pictured = job.calibration.pictured
    speeds = Speeds(own=1e6, wide=1e6, passes=1e6, share=1.0)

    def seconds(**changed: Any) -> float:
        other = dataclasses.replace(pictured, **changed)
        calibration = dataclasses.replace(job.calibration, pictured=other)
        return duration(job.model, job.plan, calibration, speeds)

    whole = seconds()
    # Padding up to the longest conversation takes no time; longer ones do, and larger pictures.
    padded = dataclasses.replace(job.calibration, pictured=None)
    assert whole < seconds(lengths=(max(pictured.lengths),) * COUNT)
    assert seconds(largest=0) < duration(job.model, job.plan, padded, speeds)
    towers = 2 * COUNT * pictured.largest / 4 / 588 * job.model.towers.num_bytes / 4 / speeds.own
    assert whole - seconds(largest=0) == pytest.approx(towers)


def test_a_python_list_of_conversations_is_a_source(model: Path, kind: str, tmp_path: Path) -> None:
    processor = images.processor(kind) if kind in images.WITH_VIDEO else None
    out = quantkit.quantize(
        str(model),
        method="gptq",
        scheme="w4a16_g32",
        out=str(tmp_path / "out"),
        calibration=[images.talk(number) for number in range(COUNT)],
        samples=COUNT,
        seq_len=SEQ_LEN,
        tokenizer=processor,
        progress=False,
    )
    del out
    assert FileSource(tmp_path / "out").config["quantization_config"]


def test_the_processor_travels_along(tmp_path: Path) -> None:
    model = images.build("gemma3", tmp_path / "model")
    job = jobs.make_job(model, "rtn", "w4a16_g32")
    out = jobs.finish(job, tmp_path / "out").out
    for loaded in (AutoProcessor.from_pretrained(out), load_processor(FileSource(out))):
        made, own = (
            p.apply_chat_template(
                images.talk(1)[:1], tokenize=True, return_dict=True, return_tensors="pt"
            )
            for p in (loaded, images.processor("gemma3"))
        )
        assert all(torch.equal(made[name], own[name]) for name in own)


def test_scales_are_learned_and_healed_on_images(model: Path, kind: str, tmp_path: Path) -> None:
    job = make_job(model, kind, scheme="w3a16_g32")
    out = jobs.finish(job, tmp_path / "out").out
    refined = json.loads((out / "quantkit/report.json").read_bytes())["refined"]
    assert {"block 0", "heal"} <= set(refined)
    assert all(0 <= loss["after"] <= loss["before"] for loss in refined.values())
    assert verify(out, against=model).ok
    # Held in memory or read block by block, and with the least memory, the bytes are the same.
    tight = dataclasses.replace(job, max_ram=job.prediction.smallest)
    assert jobs.hashes(jobs.finish(tight, tmp_path / "tight").out) == jobs.hashes(out)
