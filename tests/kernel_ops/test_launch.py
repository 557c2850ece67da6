"""A launch that was looked up hands the driver what Triton's own launch hands it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is for Linux"
)

# Kernels are compiled, for a GPU that is a stub, and every launch is recorded.
SCRIPT = """
import itertools, json
import torch
from triton.runtime import driver
from calls import StubDriver
stub = StubDriver()
driver.set_active(stub)
from quantkit_kernels.gpu.launch import Launcher
from quantkit_kernels.gpu.reduce import reduce_kernel
stub.launched = []
launcher = Launcher(reduce_kernel)
hashes = {}
for columns, rows, dtype, biased, odd in itertools.product(
    (1, 512, 513), (1, 2, 48), (torch.bfloat16, torch.float32), (False, True), (False, True)
):
    partial = torch.empty(2, rows, columns)
    # Two bytes or four behind a multiple of 16.
    out = torch.empty(rows * columns + 1, dtype=dtype)[int(odd):][: rows * columns]
    bias = torch.empty(columns, dtype=torch.float16) if biased else out
    pointers, constants = (partial, bias, out), (2, biased, 512)
    grid = (rows, -(-columns // 512), 1)
    options = dict(num_warps=4, num_stages=3, enable_fp_fusion=True)
    reduce_kernel[grid](*pointers, rows, columns, *constants, **options)
    for _ in range(2):
        launcher(grid, pointers, (rows,), (columns,), constants, 4, 3,
                 (partial, out) if bias is out else None)
    theirs, *ours = stub.launched[-3:]
    for one in ours:
        assert one[0] == theirs[0], (columns, rows, dtype, biased, odd)
        assert len(one[1]) == len(theirs[1])
        # The seventh is what a profiler's hook is told, made anew for each launch.
        assert one[1][6].data == theirs[1][6].data
        for a, b in zip(one[1][:6] + one[1][7:], theirs[1][:6] + theirs[1][7:]):
            assert a is b or a == b, (a, b)
    hashes.setdefault((dtype, biased, columns), set()).add((theirs[0], odd))
builds = {build for found in hashes.values() for build, _ in found}
print(json.dumps(
    {"launches": len(stub.launched), "builds": len(builds), "known": len(launcher._known)}
))
"""


def run(*arguments: str) -> str:
    # Kernels imported by the tests are interpreted: these are compiled by another process.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    folders = [str(ROOT / "kernels"), str(ROOT / "kernels" / "bench")]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_reaches_the_driver_is_what_triton_launches() -> None:
    found = json.loads(run("-c", SCRIPT))
    assert found["launches"] == 3 * 72
    # Specialised on the columns, the dtype, the bias and odd addresses, never on the rows.
    assert 12 <= found["builds"] <= 24
    # A grid has the rows in it.
    assert found["known"] == 72


def test_the_cost_of_a_call_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "calls.json"
    run(str(ROOT / "kernels" / "bench" / "calls.py"), "--calls", "40", "--json", str(path))
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    assert [row["split"] for row in rows] == [1, 8]
    assert all(row["median_microseconds"] > 0 for row in rows)
