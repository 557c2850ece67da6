"""The report: every decision as JSON, for people as Markdown and one page of HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs

from quantkit.pipeline.records import Record, WeightRecord
from quantkit.pipeline.report import fate_counts, render_html, render_markdown, render_model_card

pytestmark = pytest.mark.usefixtures("one_thread")

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = jobs.make_job(model, "best", "w4a16_g32_asym")
    return jobs.finish(job, tmp_path_factory.mktemp("out") / "out").out


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "quantkit/report.json").read_bytes())
    return found


def test_the_report_holds_every_decision_and_figure(report: dict[str, Any], out: Path) -> None:
    assert (report["method"], report["scheme"]) == ("best", "w4a16_g32_asym")
    assert report["recipe"]["rounding"]["name"] == "gptq"
    assert report["size"]["bytes"] == (out / "model.safetensors").stat().st_size
    assert report["calibration"]["samples"] == 8 and report["calibration"]["seq_len"] == 32
    assert re.fullmatch("[0-9a-f]{64}", report["calibration"]["tokens_sha256"])
    assert report["calibration"]["source"] == "calibration.txt", "a name, never a path"
    weights = report["weights"]
    assert len(weights) == 14
    for weight in weights:
        assert 0 < weight["error"] < 0.1 and 0 <= weight["clipped"] < 0.1
        assert weight["tokens"] == 8 * 32 and weight["degraded"] is None
    assert set(report["folded"]) <= {tensor["name"] for tensor in report["tensors"]}
    versions = {"quantkit version", "torch version", "transformers version", "python"}
    assert versions <= set(report["fingerprint"])


def test_fates_are_counted(report: dict[str, Any]) -> None:
    counts = fate_counts(report)
    assert [fate for fate, _, _ in counts] == ["quantized", "rescaled", "kept"]
    assert sum(count for _, count, _ in counts) == 21
    assert sum(size for _, _, size in counts) == sum(t["bytes"] for t in report["tensors"])


def test_no_machine_path_and_no_time_is_in_the_files(out: Path, model: Path) -> None:
    for path in out.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".md", ".html", ".yaml"):
            text = path.read_text()
            assert str(model.parent) not in text and str(out.parent) not in text
            if path.name != "run.json":
                assert "seconds" not in text


class Page(HTMLParser):
    """Collects open tags, and what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(out: Path, report: dict[str, Any]) -> None:
    text = (out / "quantkit/report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.fetched == []
    assert "http" not in text.replace(report["calibration"]["source"], "")
    for tensor in report["tensors"]:
        assert tensor["name"] in text
    assert 'class="bad"' not in text


def test_what_is_degraded_stands_out(report: dict[str, Any]) -> None:
    degraded = {**report, "degraded": {DOWN: "2 rows are all zero & <nothing> else"}}
    text = render_markdown(degraded)
    assert f"## Degraded\n- `{DOWN}`: 2 rows are all zero" in text
    assert "## Degraded" not in render_markdown(report)
    html = render_html(degraded)
    assert "&amp; &lt;nothing&gt;" in html and '<h2 class="bad">Degraded</h2>' in html


def table_rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_markdown_tables_have_as_many_cells_in_each_row(report: dict[str, Any]) -> None:
    for text in (render_markdown(report), render_model_card(report)):
        block: list[int] = []
        for line in [*text.splitlines(), ""]:
            if line.startswith("|"):
                block.append(line.count("|"))
            else:
                assert len(set(block)) <= 1, line
                block = []
    rows = table_rows(render_markdown(report))
    worst = [row for row in rows if ".weight | w4a16" in row]
    errors = [float(row.split("|")[3]) for row in worst]
    assert len(errors) == 10 and errors == sorted(errors, reverse=True)


def test_the_model_card_has_front_matter(out: Path) -> None:
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    front = text.split("---\n")[1]
    assert "- best\n" in front and "- compressed-tensors\n" in front
    assert 'quantkit.load("PATH")' in text


def test_a_record_survives_the_journal() -> None:
    weight = WeightRecord(
        name="a",
        scheme="w4a16_g32",
        error=0.125,
        expected=0.25,
        clipped=0.0,
        beyond_half=2,
        degraded=None,
        tokens=3,
    )
    other = WeightRecord(
        name="b",
        scheme="w4a16_g32",
        error=0.375,
        expected=0.375,
        clipped=0.5,
        beyond_half=0,
        degraded="x",
        tokens=None,
    )
    record = Record(step="block 0", weights=(weight, other), folded=("c",))
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record
