"""The CPU paths against bfloat16 `linear`: medians and ratios, into one JSON file.

    PYTHONPATH=.:kernels python kernels/bench/cpu.py --json FILE [--shape 11008x4096] [--threads N]

Each round times every implementation once, in turn, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from quantkit_kernels.cpu import isa
from quantkit_kernels.ops import fp8a8, fp8a16, int8_dot, nf4, w4a16, w8a8, w8a16
from quantkit_kernels.ops.codebook import NF4
from torch import Tensor

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
Product = Callable[[Tensor], Tensor]


def main() -> None:
    """Times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", default="11008x4096", help="rows x columns of the weight")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows, columns = (int(part) for part in chosen.shape.split("x"))
    made = products(rows, columns)
    report = {
        "machine": {
            "processor": processor(),
            "level": isa.level(),
            "bfloat16_instructions": isa.fast_bfloat16(),
            "int8_instructions": isa.fast_int8(),
            "threads": chosen.threads,
            "torch": torch.__version__,
        },
        "command": command(),
        "shape": [rows, columns],
        "rounds": chosen.rounds,
        "rows": [],
    }
    for tokens in chosen.tokens:
        x = torch.randn(tokens, columns).bfloat16()
        seconds = timed(made, x, chosen.rounds)
        plain = statistics.median(seconds["bf16"])
        for name, times in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(seconds["bf16"], times, strict=True))
            row = {
                "name": name,
                "tokens": tokens,
                "milliseconds": round(statistics.median(times) * 1e3, 3),
                "times_bf16": round(ratio, 2),
            }
            report["rows"].append(row)
        print(tokens, f"bf16 {plain * 1e3:.2f} ms", report["rows"][-len(seconds) :], flush=True)
        chosen.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def products(rows: int, columns: int) -> dict[str, Product]:
    """Name -> product with a random weight; bfloat16 and float32 `linear` first."""
    draw = torch.Generator().manual_seed(0)
    plain = torch.randn(rows, columns, generator=draw).bfloat16()
    wide = plain.float()
    four = torch.randint(0, 16, (rows, columns), generator=draw, dtype=torch.uint8)
    eight = torch.randint(1, 256, (rows, columns), generator=draw, dtype=torch.uint8)
    scale = torch.rand(rows, columns // 128, generator=draw).bfloat16().float()
    int4 = w4a16.pack(four, scale, None, 128, "cpu")
    int8 = w8a16.pack(eight, scale[:, :1], None, "cpu")
    both = w8a8.pack(eight, scale[:, 0])
    normal = nf4.pack(four, torch.rand(rows, columns // nf4.BLOCK, generator=draw), "cpu")
    floats = torch.where((eight & 0x7F) == 0x7F, eight - 1, eight)
    float8 = fp8a16.pack(floats, scale[:, :1], None, "cpu")
    floats8 = fp8a8.pack(floats, scale[:, 0])
    nothing = (None, None, None)
    made: dict[str, Product] = {
        "bf16": lambda x: torch.nn.functional.linear(x, plain),
        "fp32": lambda x: torch.nn.functional.linear(x.float(), wide),
        "w4a16": lambda x: w4a16.product(x, int4.packed, int4.scale, None, None, 128, rows),
        "w8a16": lambda x: w8a16.product(x, int8.packed, int8.scale, None, 0, rows),
        "w8a8": lambda x: w8a8.product(x, *both, None, rows),
        "fp8a16": lambda x: fp8a16.product(x, float8.packed, float8.scale, None, 0, rows),
        "fp8a8": lambda x: fp8a8.product(x, *floats8, None, rows),
        "nf4": lambda x: nf4.product(x, normal.packed, normal.scale, *nothing, None, rows),
    }
    if reason := int8_dot.unavailable():
        print(f"int8_dot: {reason}", flush=True)
        return made
    dot4 = int8_dot.pack(four, scale, None, 128, 4)
    dot8 = int8_dot.pack(eight, scale[:, :1], None, None, 8)
    scales = torch.rand(rows, columns // nf4.BLOCK, generator=draw)
    dotn = int8_dot.pack_codebook(four, scales, NF4, nf4.BLOCK)
    dotf = int8_dot.pack_floats(floats, scale[:, :1], None)
    for name, dot in (("w4", dot4), ("w8", dot8), ("nf4", dotn), ("fp8", dotf)):
        made[f"int8_dot, {name}"] = functools.partial(_rounded, dot, rows)
    return made


def _rounded(dot: int8_dot.Packed, rows: int, x: Tensor) -> Tensor:
    parts = (dot.packed, dot.scale, dot.zero, dot.table, None)
    numbers = (dot.bits, dot.floats, dot.group_size, rows)
    return int8_dot.product(x, *parts, *numbers)


def timed(made: dict[str, Product], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of every product in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds + 1):
        for name, product in made.items():
            start = time.perf_counter()
            product(x)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def command() -> str:
    """The command line; paths by their last part only."""
    return " ".join(Path(part).name if "/" in part else part for part in sys.argv)


def processor() -> str:
    """The processor's name, as the system gives it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
