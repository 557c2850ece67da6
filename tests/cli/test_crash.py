"""An error of quantkit's own: one line, a saved traceback, exit code 70."""

from __future__ import annotations

import errno
import re
import tempfile
from pathlib import Path

import pytest
import tiny_jobs as jobs

import quantkit.checks.inspection


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The directory for temporary files, in a quantkit whose `inspect` has a fault."""

    def fail(path: Path) -> None:
        raise KeyError(f"nothing about {path}\nsecond line")

    monkeypatch.setattr(quantkit.checks.inspection, "inspect", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("QUANTKIT_TRACEBACK", raising=False)
    return tmp_path


def test_an_internal_error_ends_with_one_line_and_a_saved_traceback(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jobs.command("inspect", "some where") == 70
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    found = re.search(r"internal error: KeyError: .*; its traceback is in (\S+);", line)
    assert found is not None, line
    saved = Path(found[1])
    assert saved.parent == broken and saved.stat().st_mode & 0o777 == 0o600
    text = saved.read_text()
    assert "Traceback (most recent call last)" in text and "second line" in text
    assert "quantkit 'inspect' 'some where'" in text


@pytest.mark.parametrize(
    "error,named",
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/config.json"), "/x/config.json"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (MemoryError(), "--max-ram"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to"), "--max-ram"),
    ],
    ids=["permission", "space", "memory", "memory of tensors"],
)
def test_an_error_of_the_machine_is_a_sentence(
    error: Exception,
    named: str,
    broken: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr(quantkit.checks.inspection, "inspect", fail)
    assert jobs.command("inspect", "x") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("quantkit: ") and named in line
    assert not list(broken.iterdir())


def test_the_traceback_is_shown_where_it_is_asked_for(
    broken: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_TRACEBACK", "1")
    assert jobs.command("inspect", "x") == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_traceback_that_cannot_be_saved_is_shown(
    broken: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(broken / "no such directory"))
    assert jobs.command("inspect", "x") == 70
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told
    assert told.splitlines()[-1].startswith("quantkit: internal error: KeyError")
