"""An evaluation stays within its --max-ram, which may be less than one of the models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_eval
import tiny_jobs as jobs

ROOT = Path(__file__).parent.parent.parent


# A child of the test's own process would count that one's peak as its own.
_LAUNCH = """
import os, sys
pid = os.posix_spawn(sys.executable, [sys.executable, "-m", "quantkit", *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)
"""


def run(*arguments: object) -> tuple[int, int, str]:
    """(exit code, peak resident bytes, stderr) of the command line in a process of its own."""
    folders = os.pathsep.join(str(ROOT / name) for name in (".", "eval", "kernels"))
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCH, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    code, peak = done.stdout.splitlines()[-1].split()
    return int(code), int(peak), done.stderr


@pytest.mark.long
def test_smallest_budget_that_is_named_is_kept(tmp_path: Path) -> None:
    with jobs.one_thread():
        model = tiny_eval.loud(
            "llama", tmp_path / "model", num_hidden_layers=24, hidden_size=512,
            intermediate_size=1408, num_attention_heads=8, num_key_value_heads=8,
        )  # fmt: skip
        out = tiny_eval.quantized(model, tmp_path / "out", "rtn", "w4a16_g128")
    line = ["eval", model, out, "--text", tiny_eval.write_heldout(model), "--seq-len", 48]
    line += ["--windows", 2, "--no-noise-floor", "--out", tmp_path / "report", "--max-ram"]
    code, idle, text = run(*line, "1MiB")
    named = re.search(r"the smallest that works is --max-ram (\d+)MiB", text)
    assert code == 2 and named is not None, text
    code, peak, text = run(*line, f"{named[1]}MiB")
    assert code == 0, text
    assert peak <= int(named[1]) * 2**20
    weights = (model / "model.safetensors").stat().st_size
    # Neither model was in memory: less was added to an idle process than the original weighs.
    assert peak - idle < weights / 2
