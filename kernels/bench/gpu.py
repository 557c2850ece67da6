"""The kernels on a GPU: correctness first, then speed, peers and decoding, into one JSON file.

    PYTHONPATH=.:kernels python kernels/bench/gpu.py --json FILE [--quick] [--no-decode]

Speed is the median of CUDA graph replays over weights that are rotated through more memory than the
cache holds; shares are of the roofline measured on the same GPU (a copy, a bfloat16 product).
Without a GPU, `--self-test` runs the same code on the CPU: kernels in Triton's interpreter, small
shapes, one replay of the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peers
import shapes
import torch
from cpu import command
from quantkit_kernels.gpu import measure, tuning
from torch import Tensor

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
# Errors as a share of the largest output: two roundings to bfloat16 (weights or codebook, result).
TOLERANCE = 2**-7


def main() -> None:
    """Runs what was asked for; exits 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two shapes, four row counts")
    parser.add_argument("--no-decode", action="store_true", help="no whole models")
    chosen = parser.parse_args()
    if not chosen.self_test and not torch.cuda.is_available():
        sys.exit("no CUDA device: use --self-test to run the harness on the CPU")
    if chosen.self_test:
        # Read when Triton is first imported, which no module above does.
        os.environ["TRITON_INTERPRET"] = "1"
    device = torch.device("cpu" if chosen.self_test else "cuda:0")
    clock = _wall_microseconds if chosen.self_test else measure.graph_microseconds
    report: dict[str, Any] = {"machine": machine(device), "command": command()}
    small = ((37, 192),) if chosen.self_test else ((4096, 4096), (4000, 1216))
    tried = (1, 17) if chosen.self_test else (1, 3, 17, 64, 129, 300)
    report["correctness"] = list(correctness(small, tried, device))
    wrong = [row for row in report["correctness"] if not row["error"] <= TOLERANCE]
    write(chosen.json, report)
    if wrong:
        sys.exit(f"wrong results: {wrong}")
    print(f"{len(report['correctness'])} products are right", flush=True)
    few = chosen.quick or chosen.self_test
    sizes: Sequence[tuple[int, int]] = SHAPES[1:3] if few else SHAPES
    counts = (1, 16, 64, 256) if few else TOKENS
    if chosen.self_test:
        sizes, counts = small, (1,)
    report["roofline"] = roofline(device, clock)
    report["speed"] = []
    for row in speed(sizes, counts, device, clock, report["roofline"]):
        report["speed"].append(row)
        write(chosen.json, report)
    if not chosen.no_decode:
        import decode

        report["decode"] = []
        config = decode.TINY if chosen.self_test else decode.EIGHT_BILLION
        length = decode.Length(prompt=4, new=2, repeats=1) if chosen.self_test else decode.Length()
        for row in decode.rows(device, config, length):
            report["decode"].append(row)
            write(chosen.json, report)
            print(row, flush=True)


def correctness(
    sizes: Sequence[tuple[int, int]], counts: Sequence[int], device: torch.device
) -> Iterator[dict[str, Any]]:
    """One row per scheme, shape, dtype and row count: the largest error over the largest output."""
    for scheme in (*shapes.schemes(device), "w4a16_experts"):
        for rows, columns in sizes:
            if "g128" in scheme and columns % 128:
                continue
            sample = _sample(scheme, (rows, columns), device, seed=rows)
            for dtype in (torch.bfloat16, torch.float16):
                for tokens in counts:
                    x = torch.randn(tokens, columns, device=device).to(dtype)
                    wanted = sample.exact(x)
                    found = sample.multiply(x).double()
                    yield {
                        "scheme": scheme,
                        "shape": [rows, columns],
                        "dtype": str(dtype),
                        "tokens": tokens,
                        "error": float((found - wanted).abs().max() / wanted.abs().max()),
                    }


def _sample(scheme: str, shape: tuple[int, int], device: torch.device, seed: int) -> shapes.Sample:
    if scheme == "w4a16_experts":
        return shapes.experts(shape, device, seed)
    return shapes.make(scheme, shape, device, seed)


def roofline(device: torch.device, clock: measure.Measure) -> dict[str, float]:
    """Bytes and bfloat16 operations per second of this machine."""
    size = 1 << (20 if device.type == "cpu" else 30)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    copied = clock([lambda: target.copy_(source)])
    side = 128 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = clock([lambda: a @ b])
    return {
        "bytes_per_second": 2 * size / copied * 1e6,
        "operations_per_second": 2 * side**3 / product * 1e6,
    }


def speed(
    sizes: Sequence[tuple[int, int]],
    counts: Sequence[int],
    device: torch.device,
    clock: measure.Measure,
    roof: dict[str, float],
) -> Iterator[dict[str, Any]]:
    """One row per shape, row count and implementation."""
    for rows, columns in sizes:
        for tokens in counts:
            x = torch.randn(tokens, columns, device=device).bfloat16()
            plain = [
                torch.randn(rows, columns, device=device).bfloat16()
                for _ in range(_copies(2 * rows * columns, device))
            ]
            bf16 = clock([_linear(x, weight) for weight in plain])
            yield _row("bf16", rows, columns, tokens, bf16, 2 * rows * columns, bf16, roof)
            del plain
            for scheme in shapes.schemes(device):
                if columns % 128 and not scheme.startswith(("nf4", "w8a8", "fp8a8", "w4a16_row")):
                    continue
                first = shapes.make(scheme, (rows, columns), device, seed=0)
                count = _copies(first.nbytes, device)
                samples = [first] + [
                    shapes.make(scheme, (rows, columns), device, seed=seed)
                    for seed in range(1, count)
                ]
                found = clock([_call(sample, x) for sample in samples])
                yield _row(scheme, rows, columns, tokens, found, first.nbytes, bf16, roof)
                del samples
            for name, make in peers.available().items():
                try:
                    called = [
                        make(rows, columns, device) for _ in range(_copies(rows * columns, device))
                    ]
                    found = clock([_peer(call, x) for call in called])
                except Exception as error:  # a peer's own failure is a result, not ours to hide
                    print(f"{name} failed on {rows}x{columns}, {tokens} rows: {error}")
                    continue
                yield _row(name, rows, columns, tokens, found, rows * columns // 2, bf16, roof)


def _row(
    name: str,
    rows: int,
    columns: int,
    tokens: int,
    microseconds: float,
    nbytes: int,
    bf16: float,
    roof: dict[str, float],
) -> dict[str, Any]:
    moved = nbytes + 2 * tokens * (rows + columns)
    operations = 2 * tokens * rows * columns
    floor = max(moved / roof["bytes_per_second"], operations / roof["operations_per_second"])
    row = {
        "name": name,
        "rows": rows,
        "columns": columns,
        "tokens": tokens,
        "microseconds": round(microseconds, 2),
        "gigabytes_per_second": round(moved / microseconds / 1e3, 1),
        "teraflops": round(operations / microseconds / 1e6, 2),
        "roofline_share": round(floor * 1e6 / microseconds, 3),
        "times_bf16": round(bf16 / microseconds, 3),
    }
    print(row, flush=True)
    return row


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


def write(path: Path, report: dict[str, Any]) -> None:
    """Writes what there is, so that a run cut short leaves its results."""
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _copies(nbytes: int, device: torch.device) -> int:
    return 1 if device.type == "cpu" else measure.copies(nbytes)


def _wall_microseconds(calls: Sequence[Callable[[], object]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) * 1e6 / len(calls)


def _linear(x: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: torch.nn.functional.linear(x, weight)


def _call(sample: shapes.Sample, x: Tensor) -> Callable[[], object]:
    return lambda: sample.multiply(x)


def _peer(call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    return lambda: call(x)


if __name__ == "__main__":
    main()
