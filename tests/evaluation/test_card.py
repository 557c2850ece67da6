"""Figures for the Hub: what its own library reads back of a card and of `.eval_results`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_eval as eval_tiny
import tiny_jobs as jobs
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from quantkit_eval.card import parse_card_names
from quantkit_eval.errors import EvaluationError

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = "someone/some-text:perplexity,kl"


@pytest.mark.parametrize("names", [NAMES, NAMES.removesuffix(",kl")])
def test_figures_are_read_back_by_the_hubs_library(names: str, tmp_path: Path) -> None:
    model = eval_tiny.loud("llama", tmp_path / "model")
    text, out = eval_tiny.write_heldout(tmp_path), tmp_path / "out"
    asked = ["quantize", model, "--method", "rtn", "--out", out, "--text", text]
    assert jobs.command(*asked, "--card-results", names) == 0
    report = json.loads((out / "quantkit/evaluation/report.json").read_text())
    measured = report["candidates"][0]["divergence"]
    card = ModelCard.load(out / "README.md")
    assert card.data.model_name == "out" and "quantkit" in card.data.tags
    assert card.data.eval_results is not None
    found = {each.metric_type: each for each in card.data.eval_results}
    assert found["perplexity"].metric_value == measured["perplexity"]["value"]
    assert found["kl_divergence"].metric_value == measured["mean"]
    assert found["kl_divergence"].metric_args["interval_95"] == measured["mean_interval"]
    assert found["perplexity"].dataset_type == "someone/some-text"
    listed = parse_eval_result_entries(
        yaml.safe_load((out / ".eval_results/quantkit.yaml").read_text())
    )
    assert [entry.task_id for entry in listed] == names.partition(":")[2].split(",")
    assert listed[0].value == measured["perplexity"]["value"]
    assert listed[0].notes is not None and "95 % interval" in listed[0].notes
    assert f"{report['text']['protocol']['scored_tokens']:,} tokens" in listed[0].notes
    assert all("KL divergence" in (entry.notes or "") for entry in listed[1:] or listed)
    assert jobs.command("verify", out) == 0
    before = jobs.hashes(out)
    assert jobs.command(*asked, "--card-results", names) == 0
    again = jobs.hashes(out)
    assert {name for name in again if again[name] != before.get(name)} <= {
        name for name in again if name.startswith("quantkit/evaluation/")
    }
    assert "# Quantized with quantkit" in (out / "README.md").read_text()


def test_names_are_checked_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for names in ("wikitext", "wikitext:ppl", "a/b", "a/b:c d", "a/b:c,d,e"):
        with pytest.raises(EvaluationError, match="name a dataset of the Hub and its task"):
            parse_card_names(names)
    line = ["quantize", tmp_path / "none", "--out", tmp_path / "out", "--card-results", "a"]
    assert jobs.command(*line) == 2
    assert "--card-results 'a'" in capsys.readouterr().err
