"""--until ends a run in time; --profile and run.json say what the time went to."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import tiny_jobs as jobs

from quantkit.calibration.processes.ranks import ALONE
from quantkit.cli import app
from quantkit.errors import RecipeError, StoppedError
from quantkit.pipeline.options import format_duration, parse_duration
from quantkit.pipeline.session import Job

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def job(llama: Path) -> Job:
    return jobs.make_job(llama, "gptq", "w4a16_g32")


def test_a_run_stopped_after_every_step_ends_with_the_same_bytes(job: Job, tmp_path: Path) -> None:
    whole = jobs.hashes(jobs.finish(job, tmp_path / "whole").out)
    out = tmp_path / "parts"
    stops = 0
    while not out.exists():
        try:
            jobs.finish(job, out, deadline=time.monotonic())
        except StoppedError as stop:
            stops += 1
            assert stop.exit_code == 3
            assert f"{stops} of 4 steps done" in str(stop) and "the same command" in str(stop)
    # outside, embed, and two blocks: each run does one step at least.
    assert stops == 3
    assert jobs.hashes(out) == whole


def test_a_deadline_that_holds_changes_nothing(job: Job, tmp_path: Path) -> None:
    outcome = jobs.finish(job, tmp_path / "out", deadline=time.monotonic() + 3600)
    assert outcome.written


def test_the_command_ends_with_code_3_and_says_how_to_go_on(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = llama / "calibration.txt", tmp_path / "out"
    line = ["quantize", llama, "--out", out, "--method", "rtn", "--scheme", "w4a16_g32"]
    line += ["--calib", text]
    assert jobs.command(*line, "--until", "0s") == 3
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and told[0].startswith("quantkit: ") and "block 0 being next" in told[0]
    assert jobs.command(*line) == 0


@pytest.mark.parametrize(("size", "code"), [("1", 3), ("2", 0)])
def test_json_says_it_and_a_launcher_sees_no_failure(
    size: str,
    code: int,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", "0")
    # The other process is not there.
    monkeypatch.setattr(app, "joined_world", lambda *_: ALONE)
    line = ["quantize", llama, "--out", tmp_path / "out", "--method", "rtn", "--json"]
    line += ["--scheme", "w4a16_g32", "--calib", llama / "calibration.txt", "--until", "0s"]
    assert jobs.command(*line) == code
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert not told["written"] and "the same command goes on there" in told["stopped"]
    assert printed.err.strip().splitlines()[-1] == f"quantkit: {told['stopped']}"


@pytest.mark.parametrize("text", ["", "h", "3x", "3h50", "-1h", "50m3h"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--until"):
        parse_duration(text)


def test_durations_are_read_and_told() -> None:
    assert parse_duration("3h50m") == 13_800
    assert parse_duration("1.5h") == 5400 and parse_duration("90m") == 5400
    assert parse_duration("1h 2m 3s") == 3723
    told = [format_duration(seconds) for seconds in (45, 720, 13_800)]
    assert told == ["45 s", "12 min", "3 h 50 min"]


def test_a_profile_and_run_json_tell_each_blocks_phases(job: Job, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    out = jobs.finish(job, tmp_path / "out", profile=trace).out
    phases = json.loads((out / "quantkit" / "run.json").read_bytes())["phases"]
    assert list(phases) == ["outside", "embed", "block 0", "block 1"]
    expected = {"reading", "forward", "statistics", "range", "rounding", "error"}
    assert set(phases["block 0"]) == expected | {"writing", "fsync", "transform", "other"}
    events = json.loads(trace.read_bytes())["traceEvents"]
    assert {"block 1", "rounding"} <= {event["name"] for event in events}
