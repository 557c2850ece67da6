"""Seconds of a whole quantize command, start-up included, against llm-compressor's on one machine.

    speed.py MODEL --calib FILE --peer-python PYTHON [--methods gptq:3 awq:1]
Runs alternate between the tools, so that a machine's mood hits both.  `floor` adds what no
implementation can avoid: two forward passes over the calibration tokens and the Gram products.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import common

_PEER = Path(__file__).parent / "peers" / "llmcompressor_quantize.py"


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One tool's runs of one method: wall seconds of the command and peak RSS."""

    seconds: list[float]
    median_seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A method by both tools; ratio = the peer's median seconds over quantkit's."""

    method: str
    quantkit: Timed
    llmcompressor: Timed | None
    ratio: float | None


def main() -> None:
    options = _options()
    compared = [_compare(method, options) for method in options.methods]
    figures = {
        "model": Path(options.model).name,
        "samples": options.samples,
        "seq_len": options.seq_len,
        "threads": options.threads,
        "methods": compared,
        "floor_seconds": _floor(options) if options.floor else None,
    }
    pythons = {"llmcompressor": options.peer_python} if options.peer_python else {}
    common.write_result(options.name, figures, pythons=pythons)


def _compare(asked: str, options: argparse.Namespace) -> Compared:
    method, _, runs = asked.partition(":")
    ours: list[common.Finished] = []
    theirs: list[common.Finished] = []
    for index in range(int(runs or 3)):
        ours.append(_run_quantkit(method, options))
        print(f"{method} run {index}: quantkit {ours[-1].seconds:.1f} s", file=sys.stderr)
        if options.peer_python is not None:
            theirs.append(_run_peer(method, options))
            print(f"{method} run {index}: peer {theirs[-1].seconds:.1f} s", file=sys.stderr)
    mine = _timed(ours)
    peer = _timed(theirs) if theirs else None
    return Compared(
        method=method,
        quantkit=mine,
        llmcompressor=peer,
        ratio=peer.median_seconds / mine.median_seconds if peer else None,
    )


def _timed(finished: list[common.Finished]) -> Timed:
    seconds = [one.seconds for one in finished]
    return Timed(
        seconds=seconds,
        median_seconds=common.median(seconds),
        peak_bytes=max(one.peak_bytes for one in finished),
    )


def _run_quantkit(method: str, options: argparse.Namespace) -> common.Finished:
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        command = common.quantkit_command(
            options.model,
            Path(folder) / "out",
            *("--method", method, "--calib", options.calib),
            *("--samples", str(options.samples), "--seq-len", str(options.seq_len)),
            *options.extra,
        )
        return common.run(command, threads=options.threads).check(command)


def _run_peer(method: str, options: argparse.Namespace) -> common.Finished:
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        command = [
            *(options.peer_python, str(_PEER), options.model, str(Path(folder) / "out")),
            *("--method", method, "--calib-text", options.calib),
            *("--samples", str(options.samples), "--seq-len", str(options.seq_len)),
            *("--dtype", options.peer_dtype),
        ]
        return common.run(command, threads=options.threads).check(command)


def _floor(options: argparse.Namespace) -> dict[str, float | str]:
    command = [
        *(sys.executable, str(Path(__file__).parent / "floor.py"), options.model),
        *("--samples", str(options.samples), "--seq-len", str(options.seq_len)),
    ]
    finished = common.run(command, threads=options.threads).check(command)
    answer: dict[str, float | str] = common.last_json(finished.stdout)
    return answer


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="speed")
    parser.add_argument("model")
    parser.add_argument("--peer-python", help="an interpreter that has llmcompressor")
    parser.add_argument("--peer-dtype", default="auto", help="what the peer computes in")
    parser.add_argument("--methods", nargs="+", default=["gptq", "awq"], help="METHOD[:RUNS=3]")
    common.calibration_arguments(parser, samples=32, seq_len=512)
    parser.add_argument("--extra", nargs="*", default=[], help="more options for quantkit")
    parser.add_argument("--floor", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
