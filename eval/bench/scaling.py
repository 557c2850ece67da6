"""Several processes against one with as many threads, and what larger machines would take on paper.

    scaling.py MODEL --calib FILE [--method gptq] [--samples 32] [--seq-len 256] [--runs 3]
               [--settings 1x1 1x2 2x1]
    scaling.py --paper

The first form measures: one process of one thread, one of two threads, and two of one thread each
(or other --settings, processes x threads), in turn, whole commands.  Two processes of one thread
must write the bytes of one.  Wall seconds depend on what else the machine does; processor seconds
of rank 0 in blocks do not, and say what of a process's work the other one takes over.

`--paper` computes docs/scaling.md's model again and leaves what was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

from quantkit.calibration.batches import BATCH_TOKENS
from quantkit.calibration.processes.tree import held_by, num_leaves, sums_at_once


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole command: seconds on the clock, of blocks on it, and rank 0's processor in blocks."""

    processes: int
    threads: int
    seconds: float
    block_seconds: float
    block_cpu_seconds: float
    phases_cpu: dict[str, float]
    peak_bytes: int
    predicted_peak_bytes: int
    load_average: float
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A block of a mixture of experts; H hidden, A width of attention, E experts of width F."""

    name: str
    blocks: int
    hidden: int
    attention: int
    experts: int
    per_token: int
    width: int
    tokens: int


def main() -> None:
    options = _options()
    if options.paper:
        path = common.RESULTS / f"{options.name}.json"
        figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
        measured = figures["measured"]
    else:
        measured = _measured(options)
    common.write_result(options.name, {"measured": measured, "paper": paper()})


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    runs = []
    settings = [tuple(map(int, text.split("x"))) for text in options.settings]
    for number in range(options.runs):
        for processes, threads in settings:
            runs.append(_run(processes, threads, options))
            told = f"{processes} x {threads} thread(s): {runs[-1].seconds:.1f} s"
            print(f"run {number}: {told}", file=sys.stderr)
    medians = {
        f"{processes} x {threads}": {
            name: common.median(
                [
                    getattr(run, name)
                    for run in runs
                    if (run.processes, run.threads) == (processes, threads)
                ]
            )
            for name in ("seconds", "block_seconds", "block_cpu_seconds")
        }
        for processes, threads in settings
    }
    return {
        "model": Path(options.model).name,
        "method": options.method,
        "samples": options.samples,
        "seq_len": options.seq_len,
        "runs": runs,
        "medians": medians,
        "same_bytes": len({run.weights_sha256 for run in runs if run.threads == 1}) == 1,
    }


def _run(processes: int, threads: int, options: argparse.Namespace) -> Run:
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        out = Path(folder) / "out"
        command = common.quantkit_command(
            options.model,
            out,
            *("--method", options.method, "--device", "cpu"),
            *common.calibrated(options),
        )
        if processes > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run"]
            launcher += ["--nproc-per-node", str(processes)]
            command = [*launcher, *command[1:]]
        load = os.getloadavg()[0]
        finished = common.run(command, threads=threads).check(command)
        told = json.loads((out / "quantkit" / "run.json").read_bytes())
        blocks = [parts for step, parts in told["phases"].items() if step.startswith("block ")]
        phases: dict[str, float] = {}
        for parts in blocks:
            for name, seconds in parts.items():
                phases[name] = phases.get(name, 0.0) + seconds["cpu"]
        return Run(
            processes=processes,
            threads=threads,
            seconds=finished.seconds,
            block_seconds=sum(s["wall"] for parts in blocks for s in parts.values()),
            block_cpu_seconds=sum(phases.values()),
            phases_cpu=phases,
            peak_bytes=told["peak_rss_bytes"],
            predicted_peak_bytes=told["predicted_peak_bytes"],
            load_average=load,
            weights_sha256=_hash(out),
        )


def _hash(out: Path) -> str:
    """Of every file that the manifest names."""
    return hashlib.sha256((out / "quantkit" / "manifest.json").read_bytes()).hexdigest()


def paper() -> dict[str, Any]:
    """Seconds and bytes of a block of a mixture of 400 B parameters, by number of GPUs.

    From the 8 B model's block on an H200 (eval/results/gpu_h200.json) come the operations per
    second of forward passes and statistics, of solving, and the rate of reading and writing.
    """
    measured = json.loads((common.RESULTS / "gpu_h200.json").read_text(encoding="utf-8"))
    (row,) = [row for row in measured["speed"] if row["method"] == "gptq"]
    phases, blocks = row["phases"], row["blocks"]
    hidden, width = measured["model"]["hidden"], measured["model"]["intermediate"]
    tokens = measured["samples"] * measured["seq_len"]
    heads = measured["model"]["kv-heads"] / measured["model"]["heads"]
    weights = hidden * hidden * (2 + 2 * heads) + 3 * hidden * width
    gram = 3 * hidden**2 + width**2
    solved = _solving(
        [(hidden, hidden * (1 + 2 * heads)), (hidden, hidden), (hidden, 2 * width), (width, hidden)]
    )
    rates = {
        # GPTQ runs a block twice: for statistics, and with quantized weights.
        "forward": 2 * 2.0 * tokens * weights * blocks / phases["forward"],
        "statistics": tokens * gram * blocks / phases["statistics"],
        "solving": solved * blocks / sum(phases[p] for p in ("range", "rounding", "error")),
        "reading": 2.0 * weights * blocks / phases["reading"],
        "writing": 0.53 * weights * blocks / (phases["writing"] + phases["fsync"]),
    }
    mixture = Mixture(
        name="400 B mixture",
        blocks=60,
        hidden=6144,
        attention=6144,
        experts=128,
        per_token=4,
        width=2560,
        tokens=tokens,
    )
    rows = [
        _row(mixture, rates, gpus=8 if total >= 8 else total, machines=max(1, total // 8))
        for total in (1, 2, 4, 8, 16, 32)
    ]
    return {"rates_per_second": rates, "mixture": mixture, "block": _block(mixture), "rows": rows}


# Bytes per second into a GPU from others of its machine (half of NVLink's 450e9), and into a
# machine from others (half of 400 Gbit/s).
_INSIDE, _BETWEEN = 225e9, 25e9


def _solving(inputs: list[tuple[float, float]]) -> float:
    """Operations of a factorisation and of rounding, for (columns, rows) of each input."""
    return sum(columns**3 + 2.0 * rows * columns**2 for columns, rows in inputs)


def _block(mixture: Mixture) -> dict[str, float]:
    """A block's weights, operations and bytes."""
    hidden, width = mixture.hidden, mixture.width
    attention = 4.0 * hidden * mixture.attention
    expert = 3.0 * hidden * width
    weights = attention + mixture.experts * expert
    reached = attention + mixture.per_token * expert
    routed = mixture.tokens * mixture.per_token
    gram_operations = mixture.tokens * 2.0 * hidden**2 + routed * (hidden**2 + width**2)
    inputs = [(hidden, 3.0 * mixture.attention), (mixture.attention, hidden)]
    experts = [(hidden, 2.0 * width), (width, hidden)]
    return {
        "parameters": weights,
        "parameters_of_the_model": weights * mixture.blocks,
        "weight_bytes": 2 * weights,
        "forward_operations": 2 * 2.0 * mixture.tokens * reached,
        "statistics_operations": gram_operations,
        "solving_operations": _solving(inputs) + mixture.experts * _solving(experts),
        "gram_bytes": 4.0 * (2 * hidden**2 + mixture.experts * (hidden**2 + width**2)),
        "code_bytes": weights,
        "packed_bytes": 0.53 * weights,
        "hidden_bytes": 2.0 * mixture.tokens * hidden,
    }


def _row(
    mixture: Mixture, rates: dict[str, float], *, gpus: int, machines: int
) -> dict[str, float]:
    """Seconds of a block's parts on so many GPUs; each works through its share, then waits."""
    block, ranks = _block(mixture), gpus * machines
    leaves = num_leaves(mixture.tokens // BATCH_TOKENS["cuda"])
    calibrating = min(ranks, leaves)
    # Each sum that its owner does not have itself is moved.
    held = sum(len(held_by(leaves, rank, ranks)) for rank in range(ranks))
    moved = block["gram_bytes"] * held * (ranks - 1) / ranks
    told = block["code_bytes"] * (ranks - 1)
    # Every rank takes in its part of the sums and all other ranks' codes.
    into_one = (moved + told) / ranks
    link = _INSIDE if machines == 1 else _BETWEEN / gpus
    seconds = {
        # The ranks of a machine read the same bytes at the same time: once from the disk.
        "reading": block["weight_bytes"] / rates["reading"],
        "forward": block["forward_operations"] / rates["forward"] / calibrating,
        "statistics": block["statistics_operations"] / rates["statistics"] / calibrating,
        "moving": into_one / link if ranks > 1 else 0.0,
        "solving": block["solving_operations"] / rates["solving"] / ranks,
        "writing": block["packed_bytes"] / rates["writing"],
    }
    total = sum(seconds.values())
    return {
        "ranks": ranks,
        "machines": machines,
        "bytes_of_sums": moved,
        "bytes_of_codes": told,
        "resident_bytes": block["weight_bytes"] + block["gram_bytes"] * sums_at_once(leaves, ranks),
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "block_seconds": total,
        "hours": total * mixture.blocks / 3600,
    }


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="scaling")
    parser.add_argument("model", nargs="?")
    common.calibration_arguments(parser, samples=32, seq_len=256, default="demo")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--settings", nargs="+", default=["1x1", "1x2", "2x1"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--paper", action="store_true", help="only the model on paper anew")
    options = parser.parse_args()
    if options.model is None and not options.paper:
        parser.error("name a model, or --paper")
    return options


if __name__ == "__main__":
    main()
