"""The GPU harness runs end to end without a GPU, its kernels in the interpreter."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
SCHEMES = ("w4a16_g32", "w4a16_row", "w8a16_row", "w8a8_row", "nf4_b64", "fp8a16_row")
SCHEMES += ("fp8a8_row", "w4a16_experts")
ROOT = Path(__file__).parent.parent.parent
BENCH = ROOT / "kernels" / "bench"


def run(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    folders = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, str(BENCH / "gpu.py"), "--self-test", "--json", str(path), *options],
        env={**os.environ, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_harness_checks_every_scheme_before_it_times_any(tmp_path: Path) -> None:
    done = run(tmp_path / "gpu.json", "--jobs", "0")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["stopped"] == []
    checked = {row["scheme"] for row in report["correctness"]}
    assert checked >= set(SCHEMES)
    # Two counts of rows of dense x, one of each other layout.
    assert {row["products"] for row in report["correctness"]} == {4}
    # Two roundings to bfloat16.
    assert all(row["error"] <= 2**-7 for row in report["correctness"])
    names = [row["name"] for row in report["speed"]]
    assert set(names) >= {"w4a16_row", "w8a8_row", "fp8a8_row"}
    assert all(row["bf16_microseconds"] > 0 for row in report["speed"])
    # A weight's row counts follow each other, the important ones first; the first row comes again.
    assert [row["tokens"] for row in report["speed"]] == [1] * 4 + [2] * 4 + [1]
    assert names[-1] == names[0] and report["speed"][-1]["again"]
    assert {row["scheme"] for row in report["decode"]} >= {"bf16", "w4a16_g128", "fp8a8_row"}
    # Two tokens on a busy machine: their difference is noise, but it is a number.
    assert all(math.isfinite(row["tokens_per_second"]) for row in report["decode"])


def test_only_what_is_asked_for_is_run_and_built_before(tmp_path: Path) -> None:
    options = ("--only", "correctness", "--schemes", "w4a16_row", "w8a8_row", "--jobs", "2")
    done = run(tmp_path / "gpu.json", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["scheme"] for row in report["correctness"]} == {"w4a16_row", "w8a8_row"}
    assert not {"speed", "decode", "roofline"} & set(report)
    assert "16 of 16 products were checked and are right" in done.stdout


def test_a_deadline_ends_the_run_with_a_whole_file(tmp_path: Path) -> None:
    done = run(tmp_path / "gpu.json", "--deadline", "0")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["correctness"] == report["decode"] == []
    assert [line.split(":")[0] for line in report["stopped"]] == ["correctness", "speed", "decode"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_an_unknown_scheme_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path / "gpu.json", "--schemes", "w5a16_row")
    assert done.returncode == 2 and "there are w4a16_g128, " in done.stderr
    assert not (tmp_path / "gpu.json").exists()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Modules of kernels/bench by name."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_rows_are_taken_while_another_one_fits(
    tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadline = bench("deadline")
    clock = [0.0]
    monkeypatch.setattr(deadline.time, "monotonic", lambda: clock[0])

    def rows(*seconds: float) -> Iterator[dict[str, float]]:
        for one in seconds:
            clock[0] += one
            # Readers find what there was before.
            assert json.loads((tmp_path / "a.json").read_text())["machine"] == "m"
            yield {"seconds": one}

    report = deadline.Report(tmp_path / "a.json", 60.0, machine="m")
    assert report.fill("first", rows(5, 10))
    # 45 s are left; after two rows of 20 s a third one would not fit.
    assert not report.fill("second", rows(20, 20, 20))
    assert not report.fill("third", iter(()) if report.left() <= 0 else rows(6, 1))
    read = json.loads((tmp_path / "a.json").read_text())
    assert [len(read[name]) for name in ("first", "second", "third")] == [2, 2, 1]
    assert read["stopped"][0] == "second: after 2 rows, 5 of 60 s left"


def sample_of(bench: Any, **changes: Any) -> tuple[Any, Any, Any]:
    correctness = bench("correctness")
    case = correctness.Case(
        scheme="w8a8_row", shape=(37, 192), dtype=torch.float16, tokens=5, layout="dense"
    )
    sample = correctness.make(case, torch.device("cpu"))
    return correctness, case, dataclasses.replace(sample, **changes)


def test_results_that_are_wrong_are_said(bench: Any) -> None:
    correctness, case, sample = sample_of(bench)
    right = {"error": 2**-8, "norm": 2**-9, "same_bits_twice": True}
    assert correctness.judged(right) == []
    for change, word in (
        ({"error": float("nan")}, "largest error nan"),
        ({"error": 0.01}, "largest error"),
        ({"norm": float("nan")}, "norm of the error"),
        ({"norm": 0.01}, "norm of the error"),
        ({"same_bits_twice": False}, "other bits"),
    ):
        (found,) = correctness.judged({**right, **change})
        assert word in found
    exact = sample.exact

    def forgets(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(x), 37, dtype=x.dtype)
        out[:, :-1] = exact(x)[:, :-1]
        return out

    row = correctness.check(case, dataclasses.replace(sample, multiply=forgets), "cpu")
    assert math.isnan(row["error"]) and len(row["wrong"]) == 2
    numbers = iter((0.0, 1e-3))

    def wavers(x: torch.Tensor) -> torch.Tensor:
        return (exact(x) + next(numbers)).to(x.dtype)

    row = correctness.check(case, dataclasses.replace(sample, multiply=wavers), "cpu")
    assert row["wrong"] == ["other bits the second time"]


def test_x_lies_in_memory_as_asked(bench: Any) -> None:
    correctness, case, _ = sample_of(bench)
    made = {
        layout: correctness.activations(dataclasses.replace(case, layout=layout), "cpu")
        for layout in correctness.LAYOUTS
    }
    assert {tuple(x.shape) for x in made.values()} == {(5, 192)}
    assert [x.data_ptr() % 16 for x in made.values()] == [0, 2, 0]
    assert [x.stride() for x in made.values()] == [(192, 1), (192, 1), (200, 1)]


def test_spread_leaves_out_a_tenth_on_both_sides(bench: Any) -> None:
    speed = bench("speed")
    assert speed.spread([1.0]) == 0
    assert speed.spread([10.0] * 9 + [90.0, 10.0]) == 0
    assert speed.spread([8.0, 8.0, 10.0, 12.0, 12.0]) == pytest.approx(0.4)
