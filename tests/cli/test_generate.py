"""`generate` and `bench` on models and tokenizers that cannot do what is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_jobs as jobs
import tiny_models as tiny
import torch
from transformers import BertConfig, BertForMaskedLM

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def given(*line: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = jobs.command(*line)
        told = capsys.readouterr()
        return code, told.out, told.err

    return given


def generate(run: Run, model: Path, prompt: str = "all", tokens: int = 3) -> tuple[int, str, str]:
    return run("generate", model, "--prompt", prompt, "--max-new-tokens", tokens)


def test_a_tokenizer_without_a_mask_continues_as_one_with(tmp_path: Path, run: Run) -> None:
    model = tiny.build("llama", tmp_path)
    expected = generate(run, model)
    path = model / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "model_input_names": ["input_ids"]})
    )
    assert generate(run, model) == expected
    assert expected[0] == 0


@pytest.mark.parametrize("prompt, tokens", [("a", 128), ("a" * 127, 2), ("a" * 300, 1)])
def test_more_tokens_than_positions_are_refused(
    prompt: str, tokens: int, tmp_path: Path, run: Run
) -> None:
    code, _, told = generate(run, tiny.build("gpt2", tmp_path), prompt, tokens)
    assert code == 2, told
    assert f"{len(prompt)} + {tokens} tokens do not fit the model's 128 positions" in told


def test_all_positions_can_be_used(tmp_path: Path, run: Run) -> None:
    assert generate(run, tiny.build("gpt2", tmp_path), "a" * 126, 2)[0] == 0


def test_a_token_without_an_embedding_is_named(tmp_path: Path, run: Run) -> None:
    code, _, told = generate(run, tiny.build("llama", tmp_path, vocab_size=100), "\u00ff")
    assert code == 2, told
    assert "the model has 100 embeddings" in told


@pytest.mark.parametrize("content", ["{", "[]", '{"max_new_tokens": "x"}'])
def test_damaged_settings_for_generating_are_named(content: str, tmp_path: Path, run: Run) -> None:
    model = tiny.build("llama", tmp_path)
    (model / "generation_config.json").write_text(content)
    code, _, told = generate(run, model)
    assert code == 2, told
    assert f"{model}/generation_config.json: no settings for generating" in told


def tiny_encoder(directory: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=320, num_attention_heads=4, **sizes)
    return tiny.save(BertForMaskedLM(config), directory)


def test_an_encoder_continues_nothing(tmp_path: Path, run: Run) -> None:
    model = tiny_encoder(tmp_path)
    code, _, told = generate(run, model)
    assert code == 2, told
    assert "BertForMaskedLM: this model reads texts and continues none" in told
    code, _, told = run("bench", model, "--batches", 1, "--prompt-tokens", 4, "--new-tokens", 2)
    assert code == 2, told
    assert "continues none" in told


CONFIGURATION = """from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "quantkit_own"
"""
MODELING = """from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_is_continued_where_it_is_trusted(
    tmp_path: Path, run: Run
) -> None:
    model = tiny.build("llama", tmp_path)
    expected = generate(run, model)
    path = model / "config.json"
    own = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    found = {**json.loads(path.read_text()), "auto_map": own, "model_type": "quantkit_own"}
    path.write_text(json.dumps(found))
    (model / "configuration_own.py").write_text(CONFIGURATION)
    (model / "modeling_own.py").write_text(MODELING)
    code, _, told = generate(run, model)
    assert code == 2 and "pass --trust-remote-code" in told
    line = ("generate", model, "--prompt", "all", "--max-new-tokens", 3)
    assert run(*line, "--trust-remote-code")[:2] == expected[:2]


def test_an_encoder_predicts_nothing_that_could_be_measured(tmp_path: Path, run: Run) -> None:
    model = tiny_encoder(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("any text that is long enough to fill two short windows " * 4)
    measured = ("--text", text, "--out", tmp_path / "out")
    for line in (
        ("eval", model, model, "--prompts", 0, "--seq-len", 32, *measured),
        ("quantize", model, "--method", "rtn", "--scheme", "w8a16_row", "--eval", *measured),
    ):
        code, _, told = run(*line)
        assert code == 2, told
        assert "a masked language model sees the tokens that it would have to predict" in told
        assert not (tmp_path / "out").exists()
