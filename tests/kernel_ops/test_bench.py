"""The GPU harness runs end to end without a GPU, its kernels in the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCHEMES = ("w4a16_g32", "w4a16_row", "w8a16_row", "w8a8_row", "nf4_b64_dq", "fp8a16_row")
SCHEMES += ("fp8a8_row", "w4a16_experts")
ROOT = Path(__file__).parent.parent.parent


def test_the_harness_checks_every_scheme_before_it_times_any(tmp_path: Path) -> None:
    script = ROOT / "kernels" / "bench" / "gpu.py"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, str(script), "--self-test", "--json", str(tmp_path / "gpu.json")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    checked = {row["scheme"] for row in report["correctness"]}
    assert checked >= set(SCHEMES)
    # Two roundings to bfloat16.
    assert all(row["error"] <= 2**-7 for row in report["correctness"])
    assert {row["name"] for row in report["speed"]} >= {
        "bf16",
        "w4a16_row",
        "w8a8_row",
        "fp8a8_row",
    }
    assert {row["scheme"] for row in report["decode"]} >= {"bf16", "w4a16_g128", "fp8a8_row"}
    assert all(row["tokens_per_second"] > 0 for row in report["decode"])
