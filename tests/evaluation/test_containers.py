"""Files of their own kind measured as directories are: evaluated, compared, continued."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_gguf as files
import tiny_jobs as jobs

from quantkit.demo.files import demo_path
from quantkit.formats.gguf.container import MODEL_FILE
from quantkit.inference.generate import generate_text

pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with jobs.one_thread():
        yield


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.quantize(demo_path(), tmp_path_factory.mktemp("gguf") / "q4_0", "q4_0")


@pytest.mark.parametrize("inner", ["", MODEL_FILE], ids=["directory", "file"])
def test_a_gguf_is_evaluated_as_a_directory_is(quantized: Path, tmp_path: Path, inner: str) -> None:
    report = tmp_path / "report"
    sizes = ("--windows", "2", "--seq-len", "64", "--prompts", "0")
    assert jobs.command("eval", demo_path(), quantized / inner, "--out", report, *sizes) == 0
    told = (report / "report.json").read_text()
    (model,) = json.loads(told)["candidates"]
    assert model["identity"]["format"].startswith("gguf")
    assert model["identity"]["scheme"] == "q4_0 + q6_k"


def test_a_gguf_continues_a_text_with_its_own_vocabulary(quantized: Path) -> None:
    text = generate_text(quantized, "The model", 4)
    assert text.startswith("The model") and len(text) > len("The model")


def test_methods_are_compared_as_files_of_gguf(tmp_path: Path) -> None:
    sizes = ("--samples", "4", "--seq-len", "64", "--windows", "2", "--prompts", "0")
    found = jobs.command(
        "compare", demo_path(), "--methods", "rtn,awq", "--format", "gguf",
        "--out", tmp_path / "out", *sizes,
    )  # fmt: skip
    assert found == 0
    for method in ("rtn", "awq"):
        assert (tmp_path / "out" / f"{method}-q4_k_m" / MODEL_FILE).is_file()


def test_a_gguf_is_evaluated_as_it_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A short text of a few words that both models have read before.\n" * 400)
    line = ["quantize", demo_path(), "--out", tmp_path / "out", "--format", "gguf"]
    line += ["--method", "rtn", "--eval", "--text", text, "--fail-if", "kl>9", "--json"]
    assert jobs.command(*line) == 0
    assert json.loads(capsys.readouterr().out)["evaluation"]["violated"] is False


def test_the_size_of_a_file_is_measured_too(
    quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--batches", "1", "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1")
    for path in (quantized, quantized / MODEL_FILE):
        capsys.readouterr()
        assert jobs.command("bench", path, *sizes, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["weights_on_disk"] == (quantized / MODEL_FILE).stat().st_size
