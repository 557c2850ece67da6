"""Two, three and four processes that share a run write the bytes of one."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
from many import run_ranks

from quantkit.calibration import batches, healing
from quantkit.calibration.healing import Healing
from quantkit.calibration.processes import watch
from quantkit.calibration.processes.ranks import World
from quantkit.calibration.stream import CalibrationStream
from quantkit.errors import NumericsError, RanksError
from quantkit.model.causal import CausalModel
from quantkit.pipeline import predict, session
from quantkit.pipeline.budget import sensitivity
from quantkit.pipeline.budget.candidates import Group
from quantkit.pipeline.session import Job

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def small_and_fast() -> Iterator[None]:
    """A sequence in a batch: eight leaves, which take two levels of the tree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(batches.BATCH_TOKENS, "cpu", jobs.SEQ_LEN)
        # What is gone is noticed in seconds.
        patch.setattr(watch, "_BEAT", 0.2)
        yield


def shared(job: Job, out: Path, **options: Any) -> Callable[[World], object]:
    """What a rank does: its part of the job."""
    return lambda world: jobs.finish(dataclasses.replace(job, world=world), out, **options)


LEARNED = {
    "overrides": ("refine.iterations=6", "heal.iterations=6", "heal.rate=0.002"),
    "head": "w4a16_g32",
    "allow_unreadable": True,
}
CASES = {
    "gptq and a cache": ("llama", "gptq", "w4a16_g32", {"kv": "fp8", "head": "w8a16_row"}),
    "awq": ("qwen2", "awq", "w4a16_g32_asym", {}),
    "a second stream": ("llama", "best", "w4a16_g32_asym", {}),
    "experts": ("qwen3_moe", "awq", "w4a16_g32", {"overrides": ("rounding.name=gptq",)}),
    "no statistics": ("llama", "rtn", "w4a16_g32", {}),
    "all tokens for all experts": ("qwen3_moe", "gptq", "w4a16_g32", {"experts": "all"}),
    "learned scales": ("llama", "best", "w3a16_g32_asym", LEARNED),
}


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("gptq and a cache", (2, 4)),
        ("awq", (3,)),
        ("a second stream", (2,)),
        ("experts", (4,)),
        ("no statistics", (2,)),
        ("all tokens for all experts", (2,)),
        ("learned scales", (2, 3)),
    ],
)
def test_the_bytes_are_those_of_one_process(
    case: str, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    kind, method, scheme, options = CASES[case]
    job = jobs.make_job(jobs.build(kind, tmp_path / "model"), method, scheme, **options)
    alone = jobs.hashes(jobs.finish(job, tmp_path / "alone").out)
    for size in sizes:
        out = tmp_path / f"by-{size}"
        told = run_ranks(size, shared(job, out), tmp_path / "told")
        assert told == [(0, "")] * size
        assert jobs.hashes(out) == alone
        assert json.loads((out / "quantkit/run.json").read_bytes())["processes"] == size


def test_groups_of_a_budget_are_measured_by_one_rank_each(llama: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"bits": 4.3}
    job = jobs.make_job(llama, "gptq", None, **asked)
    assert job.budget is not None
    quantized = sensitivity._quantized
    told = tmp_path / "measured"

    def work(world: World) -> None:
        patch = pytest.MonkeyPatch()

        def note(model: CausalModel, block: Any, group: Group, *rest: Any) -> Any:
            with told.open("a") as file:
                file.write(f"{world.rank} {group.refs[0].name} {rest[-1].name}\n")
            return quantized(model, block, group, *rest)

        patch.setattr(sensitivity, "_quantized", note)
        found = jobs.make_job(llama, "gptq", None, world=world, **asked)
        assert found.budget == job.budget and found.fingerprint == job.fingerprint

    assert run_ranks(2, work, tmp_path / "told") == [(0, ""), (0, "")]
    lines = [line.split() for line in told.read_text().splitlines()]
    assert {rank for rank, *_ in lines} == {"0", "1"}
    assert len({tuple(rest) for _, *rest in lines}) == len(lines)


@pytest.fixture(scope="module")
def job(llama: Path) -> Job:
    return jobs.make_job(llama, "gptq", "w4a16_g32")


@pytest.fixture(scope="module")
def alone(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return jobs.hashes(jobs.finish(job, tmp_path_factory.mktemp("alone") / "out").out)


def at_block(number: int, rank: int, act: Callable[[], object]) -> pytest.MonkeyPatch:
    """A rank does something in the middle of a block, with part of its statistics gathered."""
    patch = pytest.MonkeyPatch()
    plain = CalibrationStream.forward

    def forward(self: CalibrationStream, index: int, *rest: Any, **options: Any) -> None:
        plain(self, index, *rest, **options)
        if index == number and self.world.rank == rank:
            act()

    patch.setattr(CalibrationStream, "forward", forward)
    return patch


def acting(job: Job, out: Path, rank: int, act: Callable[[], object]) -> Callable[[World], object]:
    def work(world: World) -> None:
        patch = at_block(1, rank, lambda: (patch.undo(), act()))
        shared(job, out)(world)

    return work


@pytest.mark.parametrize(("size", "killed", "then"), [(2, 1, 4), (3, 0, 1)])
def test_one_that_is_killed_ends_all_and_any_number_goes_on(
    size: int, killed: int, then: int, job: Job, alone: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    began = time.monotonic()
    die = acting(job, out, killed, lambda: os.kill(os.getpid(), signal.SIGKILL))
    told = run_ranks(size, die, tmp_path / "told")
    assert time.monotonic() - began < 60
    assert told.pop(killed) == (-signal.SIGKILL, "")
    for code, sentence in told:
        assert code == 3
        assert "the same command goes on there, with any number of processes" in sentence
    assert not out.exists()
    if then == 1:
        jobs.finish(job, out)
    else:
        assert run_ranks(then, shared(job, out), tmp_path / "told") == [(0, "")] * then
    # outside, embed and block 0.
    assert json.loads((out / "quantkit/run.json").read_bytes())["steps_before_resume"] == 3
    assert jobs.hashes(out) == alone


def test_one_that_is_killed_while_scales_learn_ends_all_and_one_goes_on(
    llama: Path, tmp_path: Path
) -> None:
    job = jobs.make_job(llama, "best", "w3a16_g32_asym", **LEARNED)
    alone = jobs.hashes(jobs.finish(job, tmp_path / "alone").out)
    step = Healing._step

    def work(world: World) -> None:
        patch = pytest.MonkeyPatch()
        patch.setattr(healing, "TIMES_SAVING", 0)

        def die(self: Healing, batch: int, number: int, rate: float) -> None:
            if number == 4 and world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self, batch, number, rate)

        patch.setattr(Healing, "_step", die)
        shared(job, tmp_path / "out")(world)

    told = run_ranks(2, work, tmp_path / "told")
    assert [code for code, _ in told] == [3, -signal.SIGKILL]
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Healing, "_step", lambda self, *rest: (taken.append(rest[1]), step(self, *rest))
        )
        jobs.finish(job, tmp_path / "out")
    assert taken == [4, 5, 6]
    assert jobs.hashes(tmp_path / "out") == alone


def test_one_that_stands_still_is_noticed(job: Job, tmp_path: Path) -> None:
    """Its connections stay open, so nothing but the missing beat tells."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "_LOST", 1.0)

        def stop() -> None:
            me = os.getpid()
            if os.fork() == 0:
                # The parent waits for it, so somebody has to let it go on in the end.
                time.sleep(2.5)
                os.kill(me, signal.SIGCONT)
                os._exit(0)
            os.kill(me, signal.SIGSTOP)

        told = run_ranks(2, acting(job, tmp_path / "out", 1, stop), tmp_path / "told")
    assert [code for code, _ in told] == [3, 3]
    assert told[0][1].startswith("quantkit: rank 1 of this run was lost or ended; what is done")


def test_an_error_of_one_is_what_all_end_with(job: Job, tmp_path: Path) -> None:
    def fail() -> None:
        raise NumericsError("layers.1: an activation is NaN")

    told = run_ranks(3, acting(job, tmp_path / "out", 2, fail), tmp_path / "told")
    assert [code for code, _ in told] == [2, 2, 2]
    assert told[0][1] == "quantkit: rank 2: layers.1: an activation is NaN"


def test_processes_that_do_not_go_together_are_refused(job: Job, tmp_path: Path) -> None:
    def work(world: World) -> None:
        mine = dict(job.fingerprint)
        if world.rank == 1:
            mine["torch version"] = "99.0"
        different = dataclasses.replace(job, fingerprint=mine, world=world)
        jobs.finish(different, tmp_path / "out")

    for code, sentence in run_ranks(2, work, tmp_path / "told"):
        assert code == RanksError.exit_code == 2
        assert "torch version is " in sentence and "99.0 on rank 1; start all" in sentence
    assert not (tmp_path / "out.partial").exists()


def test_an_output_that_one_does_not_see_is_refused(job: Job, tmp_path: Path) -> None:
    def work(world: World) -> None:
        if world.rank == 1:
            # As if another disk were mounted there.
            session._SIGN = "nowhere"  # type: ignore[misc]
        shared(job, tmp_path / "out")(world)

    for code, sentence in run_ranks(2, work, tmp_path / "told"):
        assert code == 2 and "rank 1 does not see what rank 0 writes" in sentence


def planned(capsys: pytest.CaptureFixture[str], model: Path, *more: object) -> dict[str, Any]:
    line = ("plan", model, "--calib", model / "calibration.txt", "--samples", 8, "--seq-len", 32)
    assert jobs.command(*line, "--method", "gptq", "--scheme", "w4a16_g32", "--json", *more) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["predicted"]
    return found


def test_a_plan_adds_up_what_the_processes_of_a_machine_need(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = planned(capsys, llama)
    assert alone["machine"]["processes"] == alone["machine"]["of"] == 1
    assert alone["machine"]["peak_ram_bytes"] == alone["peak_ram_bytes"]
    asked = planned(capsys, llama, "--processes", 3, "--max-ram", "4GiB")
    assert asked["machine"]["processes"] == asked["machine"]["of"] == 3
    assert asked["machine"]["peak_ram_bytes"] == 3 * asked["peak_ram_bytes"]
    assert asked["machine"]["max_ram_bytes"] == 3 * 4 * 2**30
    # Two on each of two machines.
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    launched = planned(capsys, llama)
    assert launched["machine"]["processes"] == 2 and launched["machine"]["of"] == 4
    line = ("plan", llama, "--method", "rtn", "--scheme", "w4a16_g32")
    assert jobs.command(*line) == 0
    told = capsys.readouterr().out
    assert "for each of 4 processes" in told and "for the 2 of a machine" in told


def test_more_than_the_machine_has_is_said(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predict, "machine_bytes", lambda: 2**40)
    assert planned(capsys, llama)["machine"]["note"] is None
    monkeypatch.setattr(predict, "machine_bytes", lambda: 2**31)
    told = planned(capsys, llama, "--processes", 64)["machine"]["note"]
    assert "64 processes may take" in told and "this machine has 2.00 GiB" in told


def test_what_does_not_share_its_work_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert jobs.command("methods") == 2
    assert "quantkit methods runs in one process, and 2 were started" in capsys.readouterr().err
