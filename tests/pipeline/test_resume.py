"""Killed, interrupted, repeated: the same command ends in the same bytes, or says what differs."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_jobs as jobs

from quantkit.errors import OutputError, ResumeError
from quantkit.pipeline import blocks
from quantkit.pipeline.session import Job

pytestmark = pytest.mark.usefixtures("one_thread")

METHOD, SCHEME = "best", "w4a16_g32_asym"


@pytest.fixture(scope="module")
def job(llama: Path) -> Job:
    return jobs.make_job(llama, METHOD, SCHEME)


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hashes of an uninterrupted run."""
    return jobs.hashes(jobs.finish(job, tmp_path_factory.mktemp("whole") / "out").out)


def line(model: Path, out: Path, *more: object) -> list[object]:
    text = model / "calibration.txt"
    options = ["--method", METHOD, "--scheme", SCHEME, "--calib", text]
    return ["quantize", model, "--out", out, *options, "--samples", 8, "--seq-len", 32, *more]


def steps_before_resume(out: Path) -> int:
    return int(json.loads((out / "quantkit/run.json").read_bytes())["steps_before_resume"])


class Writes:
    """Counts writes and syncs of files; before number `deadly` the process dies as by kill -9."""

    def __init__(self, patch: pytest.MonkeyPatch, deadly: int = 0) -> None:
        self.count, self.deadly = 0, deadly
        pwrite, fsync = os.pwrite, os.fsync

        def counted_pwrite(descriptor: int, data: bytes, position: int) -> int:
            self._next()
            return pwrite(descriptor, data, position)

        def counted_fsync(descriptor: int) -> None:
            self._next()
            fsync(descriptor)

        patch.setattr(os, "pwrite", counted_pwrite)
        patch.setattr(os, "fsync", counted_fsync)

    def _next(self) -> None:
        self.count += 1
        if self.count == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def num_writes(job: Job, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often a run writes or syncs."""
    with pytest.MonkeyPatch.context() as patch:
        writes = Writes(patch)
        jobs.finish(job, tmp_path_factory.mktemp("counted"))
    return writes.count


def killed(job: Job, out: Path, write: int) -> bool:
    """True if a process that ran the job died before its `write`th write."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            Writes(patch, deadly=write)
            jobs.finish(job, out)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("percent", [10, 35, 60, 85, 99])
def test_a_run_killed_at_any_write_ends_in_the_same_bytes(
    percent: int, num_writes: int, job: Job, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert killed(job, out, num_writes * percent // 100)
    assert not out.exists()
    jobs.finish(job, out)
    assert jobs.hashes(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("call", "number"),
    [("fsync", 7), ("fsync", 9), ("fsync", 30), ("mkdir", 5), ("pwrite", 60), ("replace", 4)],
)
def test_a_disk_that_fills_up_anywhere_is_named(
    call: str, number: int, job: Job, whole: dict[str, str], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        original, count = getattr(os, call), 0

        def full(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments, **options)

        patch.setattr(os, call, full)
        with pytest.raises(OutputError, match=r"disk full: .*run the same command again"):
            jobs.finish(job, tmp_path / "out")
    jobs.finish(job, tmp_path / "out")
    assert jobs.hashes(tmp_path / "out") == whole


def test_a_run_may_go_on_with_another_budget(
    num_writes: int, job: Job, whole: dict[str, str], tmp_path: Path
) -> None:
    assert killed(job, tmp_path / "out", num_writes * 55 // 100)
    smallest = dataclasses.replace(job, max_ram=job.prediction.smallest)
    jobs.finish(smallest, tmp_path / "out")
    assert jobs.hashes(tmp_path / "out") == whole


def test_a_command_killed_from_outside_is_resumed(
    llama: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "quantkit", *map(str, line(llama, out))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.partial/.scratch/journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > 2000):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert jobs.command(*line(llama, out)) == 0
    assert jobs.hashes(out) == whole


@pytest.mark.parametrize("step", ["embed", "block 0", "block 1"])
def test_ctrl_c_leaves_what_the_same_command_goes_on_with(
    step: str,
    llama: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    run = blocks.BlockWork.run

    def interrupted(self: blocks.BlockWork, name: str) -> object:
        record = run(self, name)
        if name == step:
            raise KeyboardInterrupt
        return record

    monkeypatch.setattr(blocks.BlockWork, "run", interrupted)
    assert jobs.command(*line(llama, out)) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"interrupted; what is done is kept in {out}.partial" in captured.err
    assert "Traceback" not in captured.err
    monkeypatch.undo()
    assert not out.exists()
    assert jobs.command(*line(llama, out)) == 0
    assert steps_before_resume(out) == ["outside", "embed", "block 0", "block 1"].index(step)
    assert jobs.hashes(out) == whole


def test_the_same_command_on_a_finished_output_says_so(
    llama: Path, whole: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert jobs.command(*line(llama, out)) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert jobs.command(*line(llama, out)) == 0
    assert "already complete" in capsys.readouterr().out
    assert jobs.command(*line(llama, out, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["written"] is False
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert jobs.command(*line(llama, out, "--seed", 3, "--set", "rounding=gptq")) == 2
    message = capsys.readouterr().err
    assert "recipe was" in message and "--fresh" in message
    assert jobs.hashes(out) == whole
    assert jobs.command(*line(llama, out, "--set", "rounding.name=nearest", "--fresh")) == 0
    assert jobs.hashes(out) != whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.fixture
def unfinished(num_writes: int, job: Job, tmp_path: Path) -> Path:
    """An output whose run was killed in a block."""
    assert killed(job, tmp_path / "out", num_writes * 6 // 10)
    return tmp_path / "out"


def test_another_run_does_not_resume_and_names_what_differs(
    llama: Path, job: Job, unfinished: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    other = jobs.build("llama", tmp_path / "other", seed=1)
    text = tmp_path / "other.txt"
    text.write_text((llama / "calibration.txt").read_text()[::-1])
    jobs_and_fields = [
        (jobs.make_job(llama, METHOD, "w4a16_g32"), "recipe"),
        (jobs.make_job(llama, METHOD, SCHEME, skip=("*layers.0*",)), "recipe"),
        (jobs.make_job(other, METHOD, SCHEME, text=llama / "calibration.txt"), "model"),
        (jobs.make_job(llama, METHOD, SCHEME, text=text), "calibration"),
        (jobs.make_job(llama, METHOD, SCHEME, max_shard_size=50_000), "max shard bytes"),
    ]
    for another, field in jobs_and_fields:
        with pytest.raises(ResumeError, match=f"begun by another run: {field} was"):
            jobs.finish(another, unfinished)
    newer = {**job.fingerprint, "torch version": "99.0"}
    with pytest.raises(ResumeError, match=r"torch version was .*, is 99\.0"):
        jobs.finish(dataclasses.replace(job, fingerprint=newer), unfinished)
    assert jobs.finish(job, unfinished).written
    assert jobs.hashes(unfinished) == whole


def test_fresh_starts_over(llama: Path, unfinished: Path) -> None:
    job = jobs.make_job(llama, "rtn", "w4a16_g32")
    assert jobs.finish(job, unfinished, fresh=True).written
    assert steps_before_resume(unfinished) == 0
    report = json.loads((unfinished / "quantkit/report.json").read_bytes())
    assert report["method"] == "rtn"


def test_two_runs_do_not_write_one_output(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(llama, "rtn", "w4a16_g32")
    run = blocks.BlockWork.run

    def second(self: blocks.BlockWork, name: str) -> object:
        with pytest.raises(OutputError, match="another run"):
            jobs.finish(job, tmp_path / "out")
        return run(self, name)

    monkeypatch.setattr(blocks.BlockWork, "run", second)
    jobs.finish(job, tmp_path / "out")
