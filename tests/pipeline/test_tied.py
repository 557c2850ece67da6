"""A tied model whose file holds the head and no embedding gives what the usual one does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.files import FileSource
from quantkit.checks.verify import verify
from quantkit.formats.gguf.container import MODEL_FILE
from quantkit.formats.gguf.file import read_gguf
from quantkit.pipeline.export import export

HEAD = "lm_head.weight"
EMBEDDING = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}


def rename(model: Path, old: str, new: str) -> None:
    """Gives a tensor of the one weight file another name."""
    tensors = load_file(model / "model.safetensors")
    tensors[new] = tensors.pop(old)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(params=EMBEDDING)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, str]:
    """The model with its embedding, the same with a head in its place, the embedding's name."""
    kind = request.param
    usual = jobs.build(kind, tmp_path / "usual", tie_word_embeddings=True)
    shutil.copytree(usual, tmp_path / "headed")
    rename(tmp_path / "headed", EMBEDDING[kind], HEAD)
    return usual, tmp_path / "headed", EMBEDDING[kind]


@pytest.mark.parametrize("head", [None, "w8a16_g32"])
def test_the_output_is_that_of_the_usual_name(
    pair: tuple[Path, Path, str], tmp_path: Path, head: str | None
) -> None:
    usual, headed, embedding = pair
    one, other = (
        jobs.finish(jobs.make_job(model, head=head), tmp_path / f"{model.name}-out").out
        for model in (usual, headed)
    )
    assert set(load_file(one / "model.safetensors")) == set(FileSource(other).names())
    for name, tensor in load_file(one / "model.safetensors").items():
        assert torch.equal(tensor, load_file(other / "model.safetensors")[name]), name
    assert embedding in FileSource(other).names()
    for reference in (usual, headed):
        assert (found := verify(other, against=reference)).ok, found.text()
    assert torch.equal(jobs.logits(quantkit.load(one)), jobs.logits(quantkit.load(other)))


def test_a_checkpoint_that_holds_the_head_is_exported_with_the_embedding(
    pair: tuple[Path, Path, str], tmp_path: Path
) -> None:
    usual, _, embedding = pair
    quantized = jobs.finish(jobs.make_job(usual), tmp_path / "quantized").out
    before = jobs.logits(quantkit.load(quantized))
    rename(quantized, embedding, HEAD)
    assert torch.equal(jobs.logits(quantkit.load(quantized)), before)
    out = export(quantized, tmp_path / "gptq", format_name="gptq_v2", allow_unreadable=True).out
    assert embedding in FileSource(out).names() and HEAD not in FileSource(out).names()
    assert (found := verify(out, against=usual)).ok, found.text()
    assert torch.equal(jobs.logits(quantkit.load(out)), before)


def test_gguf_files_hold_the_embedding(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    import tiny_gguf
    from formats.gguf.test_export import save_model

    usual = save_model(tmp_path / "usual", "qwen2", tie_word_embeddings=True)
    headed = tmp_path / "headed"
    shutil.copytree(usual, headed)
    rename(headed, EMBEDDING["llama"], HEAD)
    quantized = jobs.finish(jobs.make_job(headed, scheme="w8a16_g32"), tmp_path / "int8").out
    rename(quantized, EMBEDDING["llama"], HEAD)
    made = {
        "plain": tiny_gguf.export_gguf(headed, tmp_path / "plain").out,
        "int8": tiny_gguf.export_gguf(quantized, tmp_path / "exported").out,
        "q8_0": tiny_gguf.quantize(headed, tmp_path / "q8_0", "q8_0"),
        "head": tiny_gguf.quantize(headed, tmp_path / "head", "q8_0", lm_head="q4_0"),
    }
    for name, out in made.items():
        tensors = read_gguf(out / MODEL_FILE).tensors
        assert "token_embd.weight" in tensors and "output.weight" not in tensors, name
        for reference in (usual, headed):
            assert (found := verify(out, against=reference)).ok, found.text()
    assert (found := verify(made["int8"], against=quantized)).ok, found.text()
