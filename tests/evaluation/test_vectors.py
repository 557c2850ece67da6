"""`quantkit eval` of embedding models and rerankers, against figures worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_embeddings as tiny
import tiny_jobs as jobs
import torch
from pipeline.test_embeddings import quantize, write_text
from transformers import AutoModel, AutoTokenizer

import quantkit


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with jobs.one_thread():
        yield


def report_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def pooled(kind: str, hidden_TH: torch.Tensor) -> torch.Tensor:
    how = tiny.POOLING[kind]
    found = {"cls": hidden_TH[0], "mean": hidden_TH.mean(0), "lasttoken": hidden_TH[-1]}[how]
    return found / found.norm()


@pytest.mark.parametrize("kind", tiny.POOLING)
def test_cosines_and_neighbours_are_those_of_a_plain_loop(tmp_path: Path, kind: str) -> None:
    source = tiny.sentence_model(kind, tmp_path / "source")
    assert quantize(source, tmp_path / "out", "rtn") == 0
    text = write_text(tmp_path / "text.txt")
    line = ["eval", source, tmp_path / "out", "--text", text, "--out", tmp_path / "report"]
    assert jobs.command(*line) == 0
    (candidate,) = report_of(tmp_path / "report")["candidates"]
    figures = candidate["vectors"]
    passages = text.read_text().split("\n\n")
    tokenizer = AutoTokenizer.from_pretrained(source)
    models = [
        AutoModel.from_pretrained(source, dtype=torch.float32).eval(),
        quantkit.load(tmp_path / "out", dtype=torch.float32, backend="reference"),
    ]
    vectors = []
    for model in models:
        with torch.no_grad():
            rows = [
                pooled(
                    kind,
                    model(
                        **tokenizer(p, truncation=True, max_length=100, return_tensors="pt")
                    ).last_hidden_state[0],
                )
                for p in passages
            ]
        vectors.append(torch.stack(rows).double())
    cosines = (vectors[0] * vectors[1]).sum(-1)
    assert figures["texts"] == len(passages)
    assert figures["cosine"] == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert figures["lowest"] == pytest.approx(cosines.min().item(), abs=1e-6)
    kept = 0
    for row in range(len(passages)):
        near = []
        for side in vectors:
            similar = side @ side[row]
            similar[row] = -2
            near.append(set(similar.topk(10).indices.tolist()))
        kept += len(near[0] & near[1])
    # Ties in the last bit may fall otherwise for one text or two.
    assert figures["neighbours"] == pytest.approx(kept / (10 * len(passages)), abs=0.003)


def test_a_model_keeps_all_of_itself(tmp_path: Path) -> None:
    source = tiny.sentence_model("bert", tmp_path / "source", dense=40)
    text = write_text(tmp_path / "text.txt")
    line = ["eval", source, source, "--text", text, "--out", tmp_path / "report"]
    assert jobs.command(*line, "--fail-if", "cosine<0.9999", "--fail-if", "neighbours<99%") == 0
    (candidate,) = report_of(tmp_path / "report")["candidates"]
    assert candidate["vectors"]["cosine"] == pytest.approx(1, abs=1e-6)
    assert candidate["vectors"]["neighbours"] == 1
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Nearest neighbours kept" in page and "cosine" in page


def test_scores_of_a_reranker(tmp_path: Path) -> None:
    source = tiny.reranker("bert", tmp_path / "source", labels=2)
    assert quantize(source, tmp_path / "out", "rtn") == 0
    text = write_text(tmp_path / "text.txt")
    out = tmp_path / "report"
    assert jobs.command("eval", source, tmp_path / "out", source, "--text", text, "--out", out) == 0
    worse, same = report_of(out)["candidates"]
    assert same["scores"]["order"] == same["scores"]["tau"] == same["scores"]["first"] == 1
    assert same["scores"]["difference"] == 0 < worse["scores"]["difference"]
    assert 0.5 < worse["scores"]["order"] < 1
    low, high = (worse["scores"]["order_interval"][side] for side in ("low", "high"))
    assert low < worse["scores"]["order"] < high


@pytest.mark.parametrize(
    ("limit", "code", "said"),
    [
        ("neighbours<99.9%", 1, "Nearest neighbours kept"),
        ("kl>0.1", 2, "of this model are measured cosine, neighbours"),
    ],
)
def test_limits(
    tmp_path: Path, limit: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.sentence_model("qwen3", tmp_path / "source")
    assert quantize(source, tmp_path / "out", "rtn") == 0
    text = write_text(tmp_path / "text.txt")
    line = ["eval", source, tmp_path / "out", "--text", text, "--out", tmp_path / "report"]
    assert jobs.command(*line, "--fail-if", limit) == code
    told = capsys.readouterr()
    assert said in told.out + told.err
