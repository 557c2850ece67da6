"""The kernels on a GPU: correctness first, then speed, peers and decoding, into one JSON file.

    PYTHONPATH=.:kernels python3 kernels/bench/gpu.py --json FILE [--only correctness speed decode]
        [--schemes NAME ...] [--deadline SECONDS] [--quick]

Kernels are built first, in parallel.  Every product is checked before any is timed.  Speed is the
median of CUDA graph replays over weights that are rotated through more memory than the cache holds;
shares are of the roofline measured on the same GPU (a copy, a bfloat16 product).  What matters most
comes first, and the file is whole at any time: with a deadline the run ends before it and says
where it stopped.  Without a GPU, `--self-test` runs the same code on the CPU: kernels in Triton's
interpreter, small shapes, one replay of the clock.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import correctness
import shapes
import speed
import torch
from cpu import command
from deadline import Report
from quantkit_kernels.gpu import measure, tuning

STAGES = ("correctness", "speed", "decode")
SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096), (28672, 8192))
# Row counts that tell most, and the others.
TOKENS = ((1, 16, 64, 256), (2, 4, 8, 32, 128, 512, 2048))
EXPERTS = "w4a16_experts"


@torch.no_grad()
def main() -> None:
    """Runs what was asked for; exits 1 if a result is wrong, 2 if there is no such scheme."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--schemes", nargs="+", help="all by default")
    parser.add_argument("--deadline", type=float, help="seconds after which nothing new begins")
    parser.add_argument("--jobs", type=int, help="processes that build at once")
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two shapes, four row counts")
    chosen = parser.parse_args()
    if not chosen.self_test and not torch.cuda.is_available():
        sys.exit("no CUDA device: use --self-test to run the harness on the CPU")
    if chosen.self_test:
        # Read when Triton is first imported, which no module above does.
        os.environ["TRITON_INTERPRET"] = "1"
    device = torch.device("cpu" if chosen.self_test else "cuda:0")
    known = (*shapes.schemes(device), EXPERTS)
    wanted = chosen.schemes or known
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"--schemes: {', '.join(unknown)}; there are {', '.join(known)}")
    report = Report(chosen.json, chosen.deadline, machine=machine(device), command=command())
    if "correctness" in chosen.only:
        _check(report, wanted, device, chosen)
    if "speed" in chosen.only:
        _time(report, [name for name in wanted if name != EXPERTS], device, chosen)
    if "decode" in chosen.only:
        report.fill("decode", _decode(wanted, device, chosen.self_test))


def _check(
    report: Report, schemes: Sequence[str], device: torch.device, chosen: argparse.Namespace
) -> None:
    small = ((37, 192),) if chosen.self_test else ((4096, 4096), (4000, 1216))
    counts = (1, 17) if chosen.self_test else (1, 17, 3, 64, 129, 257, 300, 2048)
    work = correctness.cases(schemes, small, counts)
    jobs = chosen.jobs if chosen.jobs is not None else correctness.jobs_here()
    if jobs and report.left() > 0:
        correctness.build_all(work, device, jobs)
    report.fill("correctness", correctness.checked(work, device))
    found = report.fields["correctness"]
    if wrong := [row for row in found if row["wrong"]]:
        sys.exit(f"wrong results: {wrong}")
    print(f"{len(found)} of {len(work)} products were checked and are right", flush=True)
    # All rows are of use where something is wrong.
    report.fields["correctness"] = correctness.summary(found)
    report.write()


def _time(
    report: Report, schemes: Sequence[str], device: torch.device, chosen: argparse.Namespace
) -> None:
    sizes, counts = SHAPES, TOKENS
    if chosen.quick:
        sizes, counts = SHAPES[:2], TOKENS[:1]
    if chosen.self_test:
        sizes, counts = ((37, 192),), ((1,), (2,))
    clock = speed.wall_microseconds if chosen.self_test else measure.graph_times

    def rows() -> Iterator[dict[str, Any]]:
        roof = speed.roofline(device, clock)
        report.fields["roofline"] = asdict(roof)
        yield from speed.rows(schemes, sizes, counts, device, clock, roof)

    report.fill("speed", rows())


def _decode(
    schemes: Sequence[str], device: torch.device, self_test: bool
) -> Iterator[dict[str, Any]]:
    import decode

    config = decode.TINY if self_test else decode.EIGHT_BILLION
    length = decode.Length(prompt=4, new=2, repeats=1) if self_test else decode.Length()
    for row in decode.rows(device, config, length, schemes):
        print(row, flush=True)
        yield row


def machine(device: torch.device) -> dict[str, str]:
    """Hardware and versions."""
    import triton

    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_properties(device).name
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "tuned": str(device.type == "cuda" and bool(tuning.tuned(0).entries)),
    }


if __name__ == "__main__":
    main()
