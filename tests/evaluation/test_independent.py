"""`quantkit eval` on the demo model against a ten-line script that shares no code with it."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_jobs as jobs
from quantkit_eval.evaluation import evaluate
from quantkit_eval.records import to_json
from quantkit_eval.setting import EvaluationRequest

from quantkit.demo import demo_path
from quantkit.demo.corpus import heldout_text

BENCH = Path(__file__).resolve().parents[2] / "eval" / "bench"
SEQ_LEN, WINDOWS = 256, 6


@pytest.fixture(scope="module")
def plain() -> Iterator[ModuleType]:
    """eval/bench/independent.py, which also measures larger models this way."""
    sys.path.insert(0, str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_independent", BENCH / "independent.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_independent"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCH))
    for name in ("bench_independent", "common"):
        del sys.modules[name]


@pytest.mark.parametrize("scheme", ["w4a16_g128", "w4a16_g128_asym", "w8a16_row"])
def test_demo_figures_equal_a_ten_line_script(plain: Any, tmp_path: Path, scheme: str) -> None:
    model, out = demo_path(), tmp_path / "out"
    text = tmp_path / "heldout.txt"
    text.write_text("\n\n".join(heldout_text()), encoding="utf-8")
    with jobs.one_thread():
        jobs.finish(jobs.make_job(model, "rtn", scheme, text=text), out)
        request = EvaluationRequest(
            model=str(model),
            quantized=(str(out),),
            text=str(text),
            seq_len=SEQ_LEN,
            windows=WINDOWS,
            prompts=0,
            noise_floor=False,
        )
        ours = plain.reported(to_json(evaluate(request, tmp_path / "scratch", progress=False)))
        theirs = plain.plain_figures(str(model), str(out), text.read_text(), SEQ_LEN, WINDOWS)
    assert plain.difference(ours, theirs) < plain.TOLERANCE, (ours, theirs)
    # Of some thousand tokens a few have two top tokens that float32 cannot tell apart.
    assert ours.same_top_token == pytest.approx(theirs.same_top_token, abs=2e-3)
    assert ours.kl > 1e-5 and ours.perplexity_quantized != ours.perplexity_original


def test_difference_is_the_largest_of_all_figures(plain: Any) -> None:
    one = plain.Figures(
        kl=0.1, perplexity_original=10.0, perplexity_quantized=11.0, same_top_token=0.9
    )
    for name, value, expected in [
        ("kl", 0.1003, 3e-4),
        ("perplexity_original", 10.01, 1e-3),
        ("perplexity_quantized", 11.11, 1e-2),
    ]:
        other = dataclasses.replace(one, **{name: value})
        assert plain.difference(one, other) == pytest.approx(expected, rel=0.02)
