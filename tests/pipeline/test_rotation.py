"""Whole runs with a rotation: kept, killed, exported, checked against the model it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.calibration.stream import CalibrationStream
from quantkit.checkpoint.files import FileSource
from quantkit.checks.verify import verify
from quantkit.errors import RecipeError
from quantkit.formats.gguf.container import MODEL_FILE
from quantkit.formats.gguf.file import read_gguf
from quantkit.model.rotations.rotated import ROTATION_FILE
from quantkit.pipeline.export import export
from quantkit.pipeline.job import prepare_all
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.session import Job

pytestmark = pytest.mark.usefixtures("one_thread")

ROTATED = ("rotation=hadamard",)
UNTIED = ("rotation=hadamard", "rotation.untie=true")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with biases and a tied head, in bfloat16."""
    path = jobs.build("qwen2", tmp_path_factory.mktemp("tied") / "model")
    tensors = load_file(path / "model.safetensors")
    small = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(small, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return path


@pytest.fixture(scope="module")
def job(tied: Path) -> Job:
    return jobs.make_job(tied, "best", "w4a16_g32_asym", overrides=UNTIED)


@pytest.fixture(scope="module")
def out(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.finish(job, tmp_path_factory.mktemp("rotated") / "out").out


def test_with_eight_bits_the_logits_are_nearly_the_originals(llama: Path, tmp_path: Path) -> None:
    overrides = (*ROTATED, "range=minmax")
    done = jobs.finish(
        jobs.make_job(llama, "rtn", "w8a16_g32", overrides=overrides), tmp_path / "out"
    )
    expected = jobs.logits(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32))
    found = jobs.logits(quantkit.load(done.out))
    # Eight bits leave a thousandth of a weight; a wrong basis leaves nothing alike.
    assert float((found - expected).norm() / expected.norm()) < 0.03


def test_the_output_undoes_into_its_source(out: Path, tied: Path) -> None:
    found = verify(out, against=tied)
    assert found.ok, found.text()
    config = json.loads((out / "config.json").read_bytes())
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in FileSource(out).names()


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.v_proj.bias"]
)
def test_another_tensor_in_the_output_is_found(
    name: str, out: Path, tied: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    quantkit_files = out / "quantkit"
    (copy / "quantkit").mkdir(parents=True)
    for file in (*out.iterdir(), *quantkit_files.iterdir()):
        if file.is_file() and file.name != "manifest.json":
            (copy / file.relative_to(out)).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    tensors[name] = tensors[name].roll(1, 0)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    found = verify(copy, against=tied)
    assert any(problem.startswith(name) for check in found.checks for problem in check.problems)


class Dies(BaseException):
    """Stands for a process that ends here."""


def test_a_run_that_dies_in_a_block_ends_in_the_same_bytes(
    job: Job, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = CalibrationStream.forward
    calls = iter(range(100))

    def deadly(*arguments: object, **options: object) -> object:
        if next(calls) == 2:
            raise Dies
        return forward(*arguments, **options)  # type: ignore[arg-type]

    smallest = dataclasses.replace(job, max_ram=job.prediction.smallest)
    with monkeypatch.context() as patch:
        patch.setattr(CalibrationStream, "forward", deadly)
        with pytest.raises(Dies):
            jobs.finish(job, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    jobs.finish(smallest, tmp_path / "out")
    assert jobs.hashes(tmp_path / "out") == jobs.hashes(out)


def test_another_seed_is_another_run(job: Job, tied: Path) -> None:
    other = jobs.make_job(tied, "best", "w4a16_g32_asym", overrides=(*UNTIED, "rotation.seed=1"))
    assert other.fingerprint["recipe"] != job.fingerprint["recipe"]


def test_what_is_made_from_a_rotated_checkpoint_goes_back_to_the_source(
    llama: Path, tmp_path: Path
) -> None:
    first = jobs.finish(
        jobs.make_job(llama, "int8", "w8a16_row", overrides=ROTATED), tmp_path / "first"
    ).out
    text = llama / "calibration.txt"
    again = jobs.make_job(first, "rtn", text=text, requantize=True)
    second = jobs.finish(again, tmp_path / "second").out
    export(second, tmp_path / "graph", format_name="gptq")
    record = (first / ROTATION_FILE).read_bytes()
    for made in (second, tmp_path / "graph"):
        assert (made / ROTATION_FILE).read_bytes() == record
        for against in (llama, first):
            assert (found := verify(made, against=against)).ok, found.text()
    plain = jobs.finish(jobs.make_job(llama, "rtn"), tmp_path / "plain").out
    assert any(
        "rotated in a way" in p for c in verify(plain, against=first).checks for p in c.problems
    )


def test_a_gguf_of_a_rotated_model_is_checked_too(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from formats.gguf.test_export import save_model

    model = save_model(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    job = jobs.make_job(model, "rtn", "q8_0", overrides=UNTIED, format="gguf")
    done = jobs.finish(job, tmp_path / "out").out
    assert "output.weight" in read_gguf(done / MODEL_FILE).tensors
    assert (found := verify(done, against=model)).ok, found.text()
    expected = jobs.logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    found_logits = jobs.logits(quantkit.load(done))
    # Eight bits leave a hundredth; a wrong basis leaves nothing alike.
    assert float((found_logits - expected).norm() / expected.norm()) < 0.05


def test_methods_of_one_run_share_their_rotation(llama: Path) -> None:
    requests: Iterator[QuantizeOptions] = (
        QuantizeOptions(
            recipe=jobs.load_recipe("rtn", scheme="w4a16_g32", overrides=overrides),
            calibration=str(llama / "calibration.txt"),
        )
        for overrides in ((), ROTATED)
    )
    with pytest.raises(RecipeError, match="methods with different rotations"):
        prepare_all(str(llama), list(requests))


def test_statistics_of_the_unrotated_model_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from formats.gguf.test_export import save_model

    model = save_model(tmp_path / "model", "llama")
    given = {"format": "gguf", "imatrix": str(tmp_path / "imatrix.gguf")}
    with pytest.raises(RecipeError, match="--imatrix is of the model as it is"):
        jobs.make_job(model, "rtn", "q4_0", overrides=ROTATED, **given)


def test_a_refusal_comes_before_anything_is_written(tied: Path, tmp_path: Path) -> None:
    line = ["quantize", tied, "--method", "rtn", "--set", "rotation=hadamard"]
    assert jobs.command(*line, "--scheme", "w4a16_g32", "--out", tmp_path / "out") == 2
    assert not list(tmp_path.iterdir())
