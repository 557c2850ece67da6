"""`quantkit demo`, what a newcomer sees first, with less of everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.cli import demo as showcase


def test_the_demo_compares_writes_and_reports_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"_SAMPLES": 4, "_SEQ_LEN": 64, "_QUESTIONS": 8, "_WINDOWS": 4}.items():
        assert name in vars(showcase)
        monkeypatch.setattr(showcase, name, value)
    monkeypatch.setattr(showcase, "DEFAULT_METHODS", "nf4")
    said: list[str] = []
    showcase.run_demo(tmp_path / "out", "rtn", said.append)
    text = "\n".join(said)
    assert text.startswith("rtn writes: The with statement")
    for row in ("| nf4 ", "| rtn ", "| noise floor", "verdict ", "report "):
        assert row in text
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    # NF4 decodes slowly on CPUs, which is no newcomer's business.
    assert [one.message for one in caplog.records if one.name.startswith("quantkit")] == []
