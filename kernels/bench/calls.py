"""What one call of the int4 op costs the CPU: Triton's launcher is a stub, nothing is multiplied.

    PYTHONPATH=kernels python kernels/bench/calls.py --json FILE

No GPU is needed: a driver that says it is an H100's compiles the kernels and drops the launches.
Both programs of a product whose columns are split are launched, and all arguments are looked at;
what is left out is the launch itself, some microseconds of the GPU's driver.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class StubUtils:
    """Loads nothing."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        """Module, function, registers, spills, threads."""
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Of an H100."""
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132}


class StubDriver:
    """Triton's driver of a GPU that is not there; launches go to `launched`, if that is a list."""

    utils = StubUtils()

    def __init__(self) -> None:
        self.launched: list[tuple[str, tuple[Any, ...]]] | None = None

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """sm_90."""
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What a compiled kernel is launched by."""

        def run(*arguments: Any) -> None:
            if self.launched is not None:
                self.launched.append((metadata.hash, arguments))

        return run


def main() -> None:
    """Times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--calls", type=int, default=20000)
    chosen = parser.parse_args()
    driver.set_active(StubDriver())
    rows = [{"split": split, **timed(split, chosen.calls)} for split in (1, 8)]
    report = {
        "machine": {
            "processor": _processor(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "rows": rows,
    }
    for row in rows:
        print(row)
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")


def timed(split: int, calls: int) -> dict[str, float]:
    """Microseconds of a call of the op on x [1, 4096], by the dispatcher: quartiles."""
    from quantkit_kernels.gpu import tuning
    from quantkit_kernels.ops import w4a16

    size = 4096
    tile = tuning.Tile(rows=128, tokens=16, split=split, warps=4, stages=3)
    tuning.choose.cache_clear()
    tuning.tuned = lambda device: tuning.Table((_entry(size, tile),))  # type: ignore[assignment]
    codes = torch.randint(0, 16, (size, size), dtype=torch.uint8)
    weight = w4a16.pack(codes, torch.rand(size, size // 128), None, 128, "triton")
    op = _op(f"w4a16_{split}", w4a16)
    x = torch.randn(1, size, dtype=torch.bfloat16)
    arguments = (x, weight.packed, weight.scale, weight.zero, None, weight.group_size, size)
    times = []
    for number in range(calls + 100):
        start = time.perf_counter_ns()
        op(*arguments)
        if number >= 100:
            times.append((time.perf_counter_ns() - start) / 1000)
    times.sort()
    names = ("lower_quartile", "median", "upper_quartile")
    return {
        f"{name}_microseconds": round(times[len(times) * (place + 1) // 4], 2)
        for place, name in enumerate(names)
    }


def _entry(size: int, tile: Any) -> Any:
    from quantkit_kernels.gpu.tuning import Entry, Problem

    problem = Problem(op="w4a16", dtype="bfloat16", group=128, rows=size, columns=size, tokens=1)
    return Entry(problem=problem, tile=tile, microseconds=1.0)


def _op(name: str, module: Any) -> Any:
    """The op's road on a GPU under another name, for tensors of the CPU."""
    schema = str(torch.ops.quantkit.w4a16_fixed.default._schema).partition("(")[2]
    torch.library.define(f"calls::{name}", f"({schema}")
    torch.library.impl(f"calls::{name}", "CPU", module.product._checked(module._cuda))
    return getattr(torch.ops.calls, name).default


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if "model name" in line), "")


if __name__ == "__main__":
    main()
