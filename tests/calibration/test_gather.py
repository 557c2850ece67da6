"""Passes over a block: what goes into each, and that a block that nothing is asked of runs too."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_jobs as jobs

from quantkit.calibration.gather import split_passes
from quantkit.pipeline.predict import Prediction

pytestmark = pytest.mark.usefixtures("one_thread")


def test_passes_fill_the_budget_in_order() -> None:
    sizes = {"a": 3, "b": 3, "c": 5, "d": 1}
    assert split_passes(sizes, None) == [["a", "b", "c", "d"]]
    assert split_passes(sizes, 6) == [["a", "b"], ["c", "d"]]
    # What is larger than the budget comes alone.
    assert split_passes(sizes, 2) == [["a"], ["b"], ["c"], ["d"]]
    assert split_passes({}, 6) == [[]]


@pytest.mark.parametrize("skipped", [0, 1])
def test_a_block_that_stays_hands_its_output_on_under_a_budget_too(
    skipped: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(
        llama, "gptq", "w4a16_g32", skip=(f"*layers.{skipped}.*",), overrides=("propagate=false",)
    )
    free = jobs.hashes(jobs.finish(job, tmp_path / "free").out)
    monkeypatch.setattr(Prediction, "gram_budget", lambda *_: 1)
    assert jobs.hashes(jobs.finish(job, tmp_path / "tight").out) == free
