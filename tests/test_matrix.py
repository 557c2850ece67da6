"""tools/matrix.py: what it calls equal, what it names where two results differ, and one run."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ROOT / "tools"


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        spec = importlib.util.spec_from_file_location("matrix", TOOLS / "matrix.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def result() -> dict[str, Any]:
    weights = {"sha256": "aa", "tensors": {"q.weight": "01", "k.weight": "02"}}
    report = {"weights": [{"error": 0.5}, {"error": 0.25}], "method": "gptq"}
    case = {
        "exit": 0,
        "files": {"model.safetensors": weights, "model.gguf": {"sha256": "bb"}},
        "told": {"quantkit/report.json": report, "README.md": ["one", "two"], "(errors)": []},
    }
    return {
        "only": "*",
        "versions": {"torch": "1"},
        "inputs": {"text.txt": "cc"},
        "problems": [],
        "cases": {"dense/gptq": case, "moe/gptq": copy.deepcopy(case)},
    }


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    after = result()
    change(after["cases"]["moe/gptq"])
    return after


def test_equal_results_are_equal(matrix: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.compare(result(), result(), everything=True) == 0
    assert capsys.readouterr().out == "2 of 2 cases are equal, with 4 files in all\n"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda case: case["files"]["model.safetensors"].update(
                sha256="ab", tensors={"q.weight": "01", "k.weight": "03"}
            ),
            "moe/gptq: model.safetensors: other bytes, at .tensors.k.weight",
        ),
        (
            lambda case: case["files"]["model.gguf"].update(sha256="bc"),
            "moe/gptq: model.gguf: other bytes",
        ),
        (lambda case: case["files"].pop("model.gguf"), "model.gguf: no longer written"),
        (lambda case: case["files"].update(new={"sha256": "dd"}), "new: newly written"),
        (
            lambda case: case.update(exit=2, told={"(errors)": ["quantkit: no"]}),
            "exit code 0 -> 2 (nothing was said -> quantkit: no)",
        ),
    ],
    ids=["weights", "container", "missing", "new", "exit"],
)
def test_what_counts_is_named(
    matrix: ModuleType,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
    named: str,
) -> None:
    assert matrix.compare(result(), changed(change), everything=False) == 1
    assert named in capsys.readouterr().out


def test_reports_are_told_apart_by_their_paths(
    matrix: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(case: dict[str, Any]) -> None:
        case["told"]["quantkit/report.json"]["weights"] = [{"error": 0.75}, {"error": 0.125}]
        case["told"]["README.md"] = ["one", "three"]

    after = changed(change)
    assert matrix.compare(result(), after, everything=False) == 0
    shown = capsys.readouterr().out
    assert "2  quantkit/report.json .weights*.error" in shown
    assert "moe/gptq at .weights[0].error: 0.5 -> 0.75" in shown
    assert "moe/gptq: two -> (no line)" in shown
    assert matrix.compare(result(), after, everything=True) == 1


def test_a_missing_case_and_a_problem_count(matrix: ModuleType) -> None:
    fewer, ailing = result(), result()
    del fewer["cases"]["moe/gptq"]
    ailing["problems"] = ["moe/gptq: began anew instead of being resumed"]
    for after in (fewer, ailing):
        assert matrix.compare(result(), after, everything=False) == 1
    assert matrix.compare(result(), {**fewer, "only": "dense/*"}, everything=False) == 0


def test_times_and_versions_are_left_out_of_what_is_told(matrix: ModuleType) -> None:
    report = {"torch version": "1", "run": {"seconds": 3}, "predicted_peak_bytes": 9, "version": 1}
    assert matrix._content("quantkit/report.json", json.dumps(report)) == {"version": 1}
    files = {"README.md": {"sha256": "aa"}, "model.gguf": {"sha256": "bb"}}
    manifest = matrix._content("quantkit/manifest.json", json.dumps({"files": files}))
    assert manifest == {"files": {"README.md": "told", "model.gguf": {"sha256": "bb"}}}


def test_what_a_case_reads_was_written_before(matrix: ModuleType) -> None:
    written: set[str] = set()
    for case in matrix.cases():
        own = matrix.out_of(case.name)
        read = {word for word in case.arguments if word.startswith("cases/") and word != own}
        assert read <= written, case.name
        assert case.same_as is None or matrix.out_of(case.same_as) in written
        written.add(own)


def test_a_case_runs_through_the_command_line(tmp_path: Path) -> None:
    case = "dense/awq/rtn-w4a16_g32_asym"
    command = [sys.executable, TOOLS / "matrix.py", "record", "--out", tmp_path, "--only", case]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["matrix.json"]
    found = json.loads((tmp_path / "matrix.json").read_bytes())
    (recorded,) = found["cases"].values()
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= recorded["files"].keys()
    assert recorded["told"]["quantkit/report.json"]["format"] == "awq"
    assert recorded["told"]["(errors)"] == []
