"""Tables of docs/scaling.md from eval/results/scaling.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def measured(figures: dict[str, Any]) -> str:
    """What one process of one and of two threads and two processes of one thread took."""
    told = figures["measured"]
    medians, runs = told["medians"], told["runs"]
    loads = [run["load_average"] for run in runs]
    one = medians["1 x 1"]["block_cpu_seconds"]
    lines = [
        f"{told['model']}, {told['method']}, {told['samples']} x {told['seq_len']} tokens, "
        f"{len(runs) // len(medians)} run(s) of each, on 2 cores that others used too (load "
        f"{min(loads):.0f} to {max(loads):.0f}; [scaling.json](../eval/results/scaling.json)). "
        "Processor seconds are rank 0's: what its part of the work takes, whatever else runs. "
        "Seconds on the clock include waiting for the cores.",
        "",
        *_head("processes x threads", "processor seconds in blocks", "of one process's",
               "seconds of blocks", "seconds of the command"),
    ]  # fmt: skip
    for name, row in medians.items():
        used = row["block_cpu_seconds"]
        lines.append(_row(name, used, f"{used / one:.2f}", row["block_seconds"], row["seconds"]))
    same = "the same" if told["same_bytes"] else "**not** the same"
    return "\n".join([*lines, "", f"Files of one and of two processes of one thread: {same}."])


def paper(figures: dict[str, Any]) -> str:
    """What a mixture of 400 B parameters would take, by number of GPUs."""
    block, rows = figures["paper"]["block"], figures["paper"]["rows"]
    lines = [
        f"A block has {block['parameters'] / 1e9:.1f} B parameters "
        f"({block['parameters_of_the_model'] / 1e9:.0f} B in all) in "
        f"{block['weight_bytes'] / 1e9:.1f} GB; its Gram matrices take "
        f"{block['gram_bytes'] / 1e9:.1f} GB once. Seconds are those of a block.",
        "",
        *_head("GPUs", "machines", "GB of sums moved", "GB of codes moved",
               "GB on each, in one pass", "reading", "forward and statistics", "moving",
               "solving", "writing", "all", "hours for the model"),
    ]  # fmt: skip
    for row in rows:
        lines.append(
            _row(
                f"{row['ranks']:.0f}",
                f"{row['machines']:.0f}",
                f"{row['bytes_of_sums'] / 1e9:.0f}",
                f"{row['bytes_of_codes'] / 1e9:.0f}",
                f"{row['resident_bytes'] / 1e9:.0f}",
                row["reading_seconds"],
                row["forward_seconds"] + row["statistics_seconds"],
                row["moving_seconds"],
                row["solving_seconds"],
                row["writing_seconds"],
                row["block_seconds"],
                f"{row['hours']:.2f}",
            )
        )
    return "\n".join(lines)


def _head(*names: str) -> Sequence[str]:
    return f"| {' | '.join(names)} |", "|" + "---|" * len(names)


def _row(*cells: str | float) -> str:
    shown = [cell if isinstance(cell, str) else f"{cell:.1f}" for cell in cells]
    return f"| {' | '.join(shown)} |"
