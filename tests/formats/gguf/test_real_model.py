"""tools/real_model.py: a GGUF file becomes what transformers would have saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_jobs as jobs
import tiny_models as tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import quantkit
from quantkit.cli.app import main

pytest.importorskip("gguf", reason="transformers reads GGUF through it")
from tools.real_model import decode

TEXT = "in 1984 all work\n\nand  no play: 3.14"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit llama in a GGUF file, with heads whose rows ggml orders otherwise, and digits cut."""
    folder = tmp_path_factory.mktemp("gguf")
    with jobs.one_thread():
        model = jobs.build("llama", folder / "model", dtype=torch.bfloat16)
        _save_tokenizer(model)
        packed = quantkit.quantize(
            model, "rtn", scheme="w4a16_g32", out=folder / "packed", progress=False
        )
    with pytest.raises(SystemExit) as ended:
        main(["export", str(packed), "--format", "gguf", "--out", str(folder / "gguf")])
    assert ended.value.code == 0
    (path,) = (folder / "gguf").glob("*.gguf")
    return path


def _save_tokenizer(model: Path) -> None:
    """The tiny tokenizer with a merge of two digits, which cutting them one by one prevents."""
    made = tiny.tokenizer()
    vocabulary = {**made.get_vocab(), "19": len(made)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "9")]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(model)


@pytest.fixture(scope="module")
def decoded(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("decoded") / "model"
    decode(gguf, out)
    return out


def test_weights_are_those_that_transformers_decodes(gguf: Path, decoded: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(decoded)
    assert ours.dtype == torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    ).state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_tokenizer_cuts_digits_as_the_original(gguf: Path, decoded: Path) -> None:
    original = AutoTokenizer.from_pretrained(gguf.parent.parent / "model")
    ours = AutoTokenizer.from_pretrained(decoded)
    assert ours(TEXT)["input_ids"] == original(TEXT)["input_ids"]
    assert ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str("1984")[1][0] == "9"
    assert ours.model_max_length == 128


def test_what_is_decoded_quantizes(decoded: Path, tmp_path: Path) -> None:
    out = quantkit.quantize(
        decoded, "awq", out=tmp_path / "out", samples=2, seq_len=32, progress=False
    )
    assert out.is_dir()


def test_a_failure_leaves_nothing(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(FileExistsError):
        decode(gguf, tmp_path / "out")
    assert not (tmp_path / "out").exists()
