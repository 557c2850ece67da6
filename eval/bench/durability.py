"""Kills a quantize command at random instants, resumes it, and compares every byte of the result.

    durability.py [MODEL] [--kills 50] [--method gptq]
MODEL defaults to the embedded demo model.  Kills come while the output is being written, which an
uninterrupted run is timed for.  Every file must equal that run's, except quantkit/run.json, which
holds times.  Exits with 1 if any differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import common

_TIMES = Path("quantkit") / "run.json"


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill and resume.  `stage`: what lay on disk: nothing, an unfinished output, all of it."""

    after_seconds: float
    stage: str
    resumed_steps: int
    identical: bool
    loadable_before_resume: bool


def main() -> None:
    options = _options()
    if options.model is None:
        from quantkit.demo.files import demo_path

        options.model = str(demo_path())
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        reference = Path(folder) / "whole" / "out"
        reference.parent.mkdir()
        command = _command(reference, options)
        seconds, writing = _timed(command, reference, options.threads)
        expected = _hashes(reference)
        rng = random.Random(options.seed)
        kills = []
        for index in range(options.kills):
            delay = rng.uniform(0.0, writing)
            kills.append(_kill_and_resume(Path(folder), delay, expected, options))
            last = kills[-1]
            print(
                f"kill {index + 1}: after {last.after_seconds:.2f} s, {last.stage}, "
                f"{last.resumed_steps} steps kept, identical: {last.identical}",
                file=sys.stderr,
            )
    identical = sum(kill.identical for kill in kills)
    figures = {
        "model": Path(options.model).name,
        "method": options.method,
        "uninterrupted_seconds": seconds,
        "writing_seconds": writing,
        "kills": len(kills),
        "interrupted_while_unfinished": sum(kill.stage == "unfinished" for kill in kills),
        "identical_outputs": identical,
        "loadable_before_resume": sum(kill.loadable_before_resume for kill in kills),
        "each": kills,
    }
    common.write_result(options.name, figures)
    if identical != len(kills):
        sys.exit(1)


def _kill_and_resume(
    folder: Path,
    delay: float,
    expected: dict[str, str],
    options: argparse.Namespace,
) -> Kill:
    with tempfile.TemporaryDirectory(dir=folder) as own:
        out = Path(own) / "out"
        partial = out.with_name("out.partial")
        command = _command(out, options)
        process = _start(command, options.threads)
        _wait_for(partial, out, process)
        started = time.perf_counter()
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        after = time.perf_counter() - started
        stage = "finished" if out.exists() else "unfinished" if partial.exists() else "nothing"
        loadable = (partial / "config.json").exists() or (
            out.exists() and not (out / "quantkit" / "manifest.json").exists()
        )
        resumed = common.run(command, threads=options.threads).check(command)
        summary = common.last_json(resumed.stdout)
        return Kill(
            after_seconds=after,
            stage=stage,
            resumed_steps=(summary.get("run") or {}).get("steps_before_resume", 0),
            identical=_hashes(out) == expected and not partial.exists(),
            loadable_before_resume=loadable,
        )


def _timed(command: list[str], out: Path, threads: int) -> tuple[float, float]:
    """Seconds of a run, and those of them in which its output was unfinished."""
    began = time.perf_counter()
    process = _start(command, threads)
    _wait_for(out.with_name("out.partial"), out, process)
    appeared = time.perf_counter()
    _wait_for(out, out, process)
    finished = time.perf_counter()
    if process.wait() != 0:
        raise SystemExit(f"{common.shown(command)} exited with {process.returncode}")
    return time.perf_counter() - began, finished - appeared


def _start(command: list[str], threads: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=common.child_environment(threads),
        start_new_session=True,
    )


def _wait_for(path: Path, or_path: Path, process: subprocess.Popen[bytes]) -> None:
    """Returns once either path exists or the process has ended."""
    while not path.exists() and not or_path.exists() and process.poll() is None:
        time.sleep(0.002)


def _command(out: Path, options: argparse.Namespace) -> list[str]:
    return common.quantkit_command(
        options.model,
        out,
        *("--method", options.method),
        *common.calibrated(options),
        *options.extra,
    )


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder) != _TIMES
    }


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="durability", threads=1)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--method", default="gptq")
    common.calibration_arguments(parser, samples=32, seq_len=256, default="demo")
    parser.add_argument("--seed", type=int, default=0, help="of the kill points")
    parser.add_argument("--extra", nargs="*", default=[], help="more options for quantkit")
    return parser.parse_args()


if __name__ == "__main__":
    main()
