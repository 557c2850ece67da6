from __future__ import annotations

import importlib.util
import json
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "eval" / "bench"


@pytest.fixture(scope="module")
def common() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_common", BENCH / "common.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_common"] = module
    spec.loader.exec_module(module)
    return module


def test_peak_is_the_childs_and_the_output_is_whole(common: Any) -> None:
    program = "x = bytearray(300 << 20); x[::4096] = b'1' * len(x[::4096]); print('{\"a\": 1}')"
    command = [sys.executable, "-c", program]
    finished = common.run(command).check(command)
    # The kernel counts the moment before exec, when the child still is a copy of this process.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 300 << 20 < finished.peak_bytes < max(400 << 20, own + (1 << 20))
    assert common.last_json(finished.stdout) == {"a": 1}


def test_failure_shows_the_last_lines(common: Any) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such luck')"]
    with pytest.raises(SystemExit, match="no such luck"):
        common.run(command).check(command)


def test_recorded_commands_hold_no_paths_of_the_machine(common: Any) -> None:
    command = ["/opt/x/bin/python3", str(BENCH / "speed.py"), "/data/model", "--peer=/opt/y/python"]
    assert common.shown(command) == "python eval/bench/speed.py model --peer=python"


def test_last_json_skips_what_comes_before(common: Any) -> None:
    text = 'Loading {weights}\n{"first": 1}\nwarning\n{\n  "out": [\n    1\n  ]\n}\n'
    assert common.last_json(text) == {"out": [1]}


def test_results_carry_their_evidence(
    common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "commit", lambda: "0123abcd")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    path = common.write_result("trial", {"seconds": 1.23456789}, pythons={"peer": sys.executable})
    written = json.loads(path.read_text())
    assert written["figures"] == {"seconds": 1.23457}
    assert {"command", "commit", "hardware", "versions"} <= set(written)
    assert set(written["versions"]) == {"quantkit", "peer"}
    assert written["hardware"]["cores"] >= 1


def test_rows_measured_anew_keep_what_made_the_others(
    common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    setting = {"model": "m"}

    def write(commit: str, **new: int) -> dict[str, Any]:
        rows = {name: {"name": name, "kl": kl} for name, kl in new.items()}
        path = tmp_path / "x.json"
        if path.exists():
            figures = common.with_earlier("x", setting, "rows", "name", rows)
        else:
            figures = {"rows": list(rows.values())}
        path.write_text(json.dumps({"commit": commit, "figures": {**setting, **figures}}))
        return figures

    write("first", a=1, b=2, c=3)
    write("second", b=20, d=40)
    figures = write("third", d=400)
    assert {row["name"]: row["kl"] for row in figures["rows"]} == {
        "a": 1,
        "b": 20,
        "c": 3,
        "d": 400,
    }
    made = [(run["commit"], run["rows"]) for run in figures["earlier"]]
    assert made == [("first", ["a", "c"]), ("second", ["b"])]
    with pytest.raises(SystemExit, match="model"):
        common.with_earlier("x", {"model": "other"}, "rows", "name", {})
