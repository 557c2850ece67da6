"""torchrun and accelerate start the processes; the bytes are those of one."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from quantkit.demo import demo_path

# A free port: others may run torchrun on this machine.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
# Without a GPU too it hands over to torchrun then.
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
# Four batches of 2048 tokens.
OPTIONS = ("--method", "gptq", "--samples", "32", "--seq-len", "256", "--device", "cpu")


def start(launcher: Sequence[str], out: Path, *more: str) -> subprocess.Popen[str]:
    line = [sys.executable, *launcher, "-m", "quantkit", "quantize", str(demo_path())]
    return subprocess.Popen(
        [*line, "--out", str(out), *OPTIONS, *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def manifest(out: Path) -> str:
    return hashlib.sha256((out / "quantkit/manifest.json").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("alone") / "out"
    assert start((), out).wait() == 0
    return manifest(out)


def test_torchrun(alone: str, tmp_path: Path) -> None:
    process = start((*TORCHRUN, "2"), tmp_path / "out")
    printed, _ = process.communicate()
    assert process.returncode == 0
    # Rank 0 alone tells.
    assert printed.count("complete in") == 1
    assert manifest(tmp_path / "out") == alone


def test_a_process_that_is_killed_ends_torchrun_with_one_sentence(
    alone: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start((*TORCHRUN, "3"), out)
    journal = tmp_path / "out.partial/.scratch/journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > 2000):
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    began = time.monotonic()
    _, told = process.communicate()
    assert time.monotonic() - began < 60 and process.returncode == 1
    assert told.count("quantkit: ") == 1 and "the same command goes on there" in told
    # With another number.
    assert start((*TORCHRUN, "2"), out).wait() == 0
    assert manifest(out) == alone


def test_a_run_that_stops_in_time_is_no_failure(alone: str, tmp_path: Path) -> None:
    process = start((*TORCHRUN, "2"), tmp_path / "out", "--until", "0s")
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert told.strip().splitlines()[-1].endswith("the same command goes on there")
    assert start((*TORCHRUN, "2"), tmp_path / "out").wait() == 0
    assert manifest(tmp_path / "out") == alone


def test_a_plan_adds_up_what_processes_need() -> None:
    line = ["-m", "quantkit", "plan", str(demo_path()), *OPTIONS, "--max-ram", "2GiB", "--json"]
    found = []
    for launcher in ((), (*TORCHRUN, "2")):
        more = () if launcher else ("--processes", "2")
        told = subprocess.run(
            [sys.executable, *launcher, *line, *more], stdout=subprocess.PIPE, check=True
        )
        found.append(json.loads(told.stdout)["predicted"]["machine"])
    assert found[0]["max_ram_bytes"] == found[1]["max_ram_bytes"] == 2 * 2 * 2**30
    assert found[0]["processes"] == found[1]["processes"] == 2


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    process = start((*TORCHRUN, "2"), tmp_path / "out", "--scheme", "w4a16_g7")
    _, told = process.communicate()
    assert process.returncode == 1 and told.count("quantkit: ") == 1


def test_accelerate(alone: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    process = start((*ACCELERATE, "--num_processes", "2"), tmp_path / "out")
    assert process.wait() == 0
    assert manifest(tmp_path / "out") == alone
