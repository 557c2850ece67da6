"""The time a run will take, and what is told of busy cores."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch

from quantkit.methods.parts import Estimated, PartKind, Work, make_part
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.duration import Speeds, duration

QUIET = Speeds(own=1e9, wide=1e9, passes=1e9, share=1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build("llama", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("range", "clip"),
        ("range", "mse"),
        ("range", "weighted_mse"),
        ("rounding", "gptq"),
        ("target", "qronos"),
        ("transform", "awq"),
        ("transform", "smoothquant"),
    ],
)
def test_every_part_that_searches_says_how_much_it_does(kind: PartKind, name: str) -> None:
    part, scheme = make_part(kind, name, {}), Scheme.parse("w4a16_g32")
    assert isinstance(part, Estimated)
    small, large = part.work(64, 64, scheme), part.work(128, 256, scheme)
    assert large.passes > small.passes > 0 and large.products >= small.products


def test_work_adds_up() -> None:
    assert Work(products=1, passes=2) + Work(products=3) == Work(products=4, passes=2)


def test_each_part_of_a_recipe_takes_its_time(model: Path) -> None:
    with jobs.one_thread():
        found = {m: jobs.make_job(model, m, "w4a16_g32") for m in ("rtn", "awq", "gptq")}
    taken = {m: duration(j.model, j.plan, j.calibration, QUIET) for m, j in found.items()}
    # A search, or a factorisation, comes on top of what both read and write.
    assert taken["rtn"] < min(taken["awq"], taken["gptq"])
    job, slow = found["awq"], Speeds(own=1e7, wide=1e7, passes=1e7, share=1.0)
    assert duration(job.model, job.plan, job.calibration, slow) > 2 * taken["awq"]


def test_busy_cores_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert QUIET.note is None
    busy = Speeds(own=1.0, wide=1.0, passes=1.0, share=0.5).note
    assert busy is not None and "4 threads got 50%" in busy and "OMP_NUM_THREADS=2" in busy
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = Speeds(own=1.0, wide=1.0, passes=1.0, share=0.5).note
    assert alone is not None and "quiet machine" in alone and "OMP" not in alone


def test_speeds_are_measured() -> None:
    found = Speeds.measure(torch.float32)
    assert min(found.own, found.wide, found.passes) > 1e6 and 0 < found.share <= 1
