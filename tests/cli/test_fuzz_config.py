"""Hostile files and command lines are refused with a sentence or done, whatever is in them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parent.parent.parent / "tools" / "fuzz_config.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_config", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_150_hostile_cases_end_as_they_should(tool: ModuleType) -> None:
    outcome = tool.fuzz(150, seed=1)
    assert sum(outcome.codes.values()) == 150
    # Every kind of damage is there, most of it is refused, some is harmless.
    assert len(outcome.kinds) == 8
    assert outcome.codes[2] > 60 and outcome.codes[0] > 10 and outcome.codes[1] > 5


def test_a_case_is_the_same_every_time(tool: ModuleType, tmp_path: Path) -> None:
    stage = tool.Stage(tmp_path)
    found = []
    for _ in range(2):
        lines = []
        for number in range(40):
            case = tool.make_case(stage, 3, number)
            content = None
            if case.file is not None and case.file.is_file() and not case.file.is_symlink():
                content = case.file.read_bytes() if case.file.stat().st_size < 2**20 else b""
            lines.append((case.kind, case.line, content))
            stage.mend()
        found.append(lines)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "code,told,seconds,peak,named",
    [
        (70, "quantkit: internal error", 0.1, 0, "exit code 70"),
        (0, "Traceback (most recent call last):", 0.1, 0, "exit code 0"),
        (2, "x", 0.1, 0, "without a sentence"),
        (-1, "", 0.1, 0, "took"),
        (0, "", 21.0, 0, "took 21.0 s"),
        (0, "", 0.1, 2**31, "2048 MiB"),
        (2, "quantkit: no", 0.1, 0, None),
        (1, "", 0.1, 0, None),
    ],
)
def test_a_defect_is_seen(
    tool: ModuleType, code: int, told: str, seconds: float, peak: int, named: str | None
) -> None:
    case = tool.Case(number=7, kind="line", line=("plan", "x"))
    found = tool.defect_of(case, code, told, seconds, peak)
    assert (found is None) if named is None else (named in found and "case 7" in found)
