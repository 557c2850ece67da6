"""Verifying with the program that will serve a checkpoint."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_images
import tiny_jobs as jobs
import torch
from tiny_gguf import export_gguf
from transformers import AutoConfig

import quantkit
from quantkit.checks import runtime_script, runtimes
from quantkit.checks.verify import verify
from quantkit.demo.files import demo_path
from quantkit.errors import CheckpointError
from quantkit.model.towers.loaded import placeholders_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = jobs.build("llama", tmp_path_factory.mktemp("llama"))
    return jobs.finish(jobs.make_job(model), tmp_path_factory.mktemp("out") / "out").out


def continuations(
    path: Path, runtime: str, prompts: Sequence[Sequence[int]], python: Path, trust: bool
) -> list[list[int]]:
    """What quantkit's own model would say: a runtime that reads the checkpoint right."""
    model = quantkit.load(path, dtype=torch.float32)
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
        found.append(tokens[0, len(prompt) :].tolist())
    return found


def test_a_runtime_that_reads_it_right_passes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "_ask", lambda *given: ("1.0", continuations(*given)))
    result = verify(out, runtime="transformers")
    assert result.ok
    assert result.checks[-1].detail.startswith("transformers 1.0: 32 of 32 greedy tokens")


def test_a_runtime_that_misreads_it_fails(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def misread(*given: object) -> tuple[str, list[list[int]]]:
        return "1.0", [[7] * 8 for _ in range(4)]

    monkeypatch.setattr(runtimes, "_ask", misread)
    result = verify(out, runtime="transformers")
    assert not result.ok
    assert "misreads the checkpoint" in result.checks[-1].problems[0]


@pytest.mark.parametrize("answered", [[], [[], [], [], []], [[7], [7], [7], []]])
def test_a_runtime_that_says_nothing_has_not_passed(
    answered: list[list[int]], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "_ask", lambda *given: ("1.0", answered))
    with pytest.raises(CheckpointError, match=r"1\.0 continued \d of 4 prompts"):
        verify(out, runtime="transformers")


def test_an_image_text_model_is_asked_of_its_own_class_about_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_images.build("llava", tmp_path)
    config = AutoConfig.from_pretrained(model)
    (mark,) = placeholders_of(config)

    def ask(path: Path, runtime: str, prompts: Any, python: Path, trust: bool) -> Any:
        assert all(mark not in prompt for prompt in prompts)
        version, told = runtime_script.READERS[runtime](str(path), prompts, 8, trust)
        # As if an image were to come: what follows cannot be judged.
        return version, [[*told[0][:3], mark, *told[0][4:]], *told[1:]]

    monkeypatch.setattr(runtimes, "_ask", ask)
    drawn = runtimes._prompts(config.text_config.vocab_size)
    drawn[0, 3] = mark
    monkeypatch.setattr(runtimes, "_prompts", lambda _vocabulary: drawn)
    found = runtimes.compare_runtime(model, "transformers")
    assert (found.tokens, found.agreed) == (3 + 3 * 8, 3 + 3 * 8)


def test_unknown_and_missing_runtimes_are_named(out: Path) -> None:
    known = r"'tgi': known are transformers, vllm, llama.cpp, onnxruntime"
    with pytest.raises(CheckpointError, match=known):
        verify(out, runtime="tgi")
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(CheckpointError, match="the package vllm is not installed here"):
            verify(out, runtime="vllm")
    with pytest.raises(CheckpointError, match="no-python: there is no such program"):
        verify(out, runtime="vllm", runtime_python=Path("no-python"))


@pytest.mark.parametrize(("runtime", "form"), [("llama.cpp", "gguf"), ("onnxruntime", "onnx")])
def test_a_directory_of_safetensors_is_to_be_exported_first(
    out: Path, runtime: str, form: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"export it: quantkit export .* --format {form}"):
        verify(out, runtime=runtime)


def test_a_gguf_file_is_given_to_llama_cpp_alone(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    done = export_gguf(demo_path(), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"a GGUF file, .* this is for --runtime llama.cpp"):
        verify(done.out, runtime="vllm")
    with pytest.raises(CheckpointError, match=r"a GGUF file, and onnxruntime is given a ONNX"):
        verify(done.out, runtime="onnxruntime")
    if importlib.util.find_spec("llama_cpp") is None:
        with pytest.raises(CheckpointError, match="the package llama-cpp-python is not installed"):
            verify(done.out, runtime="llama.cpp")


def test_a_gguf_file_is_judged_by_quantkits_own_reading_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp itself is asked in the interop suite; a stand-in here."""
    pytest.importorskip("gguf")
    done = export_gguf(demo_path(), tmp_path / "out")
    asked: list[Path] = []

    def stand_in(*given: Any) -> tuple[str, list[list[int]]]:
        asked.append(given[0])
        return "1.0", continuations(*given)

    monkeypatch.setattr(runtimes, "_ask", stand_in)
    result = verify(done.out, runtime="llama.cpp", runtime_python=Path(sys.executable))
    assert result.ok, result.text()
    assert asked == [done.out / "model.gguf"]
    assert result.checks[-1].detail.startswith("llama.cpp 1.0: 32 of 32 greedy tokens")


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is not None,
    reason="compressed-tensors is installed: transformers does load the checkpoint",
)
def test_a_runtime_that_cannot_load_it_is_quoted(out: Path) -> None:
    with pytest.raises(CheckpointError, match=r"transformers cannot load it: .*compressed-tensors"):
        verify(out, runtime="transformers")


def test_damage_found_before_is_not_given_to_the_runtime(out: Path, tmp_path: Path) -> None:
    (out / "extra.txt").write_text("x")
    try:
        result = verify(out, runtime="transformers")
    finally:
        (out / "extra.txt").unlink()
    assert [check.name for check in result.checks if not check.ok] == ["files"]
    assert "runtime" not in [check.name for check in result.checks]
