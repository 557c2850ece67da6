"""llama.cpp reads quantkit's GGUF files: tokens, logits, greedy continuations, perplexity."""

from __future__ import annotations

import ctypes
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gguf_cases import EXPORTED, FAMILIES, QUANTIZED
from safetensors.numpy import load_file

# Logits of bfloat16 and 8-bit activations (llama.cpp rounds both) are off by up to about this much.
TIE = 0.15
NAMES = [*EXPORTED, *QUANTIZED]
TINY = [f"tiny-{name.replace('phi3', 'phi')}" for name in FAMILIES]


@lru_cache(maxsize=1)
def opened(path: Path) -> llama_cpp.Llama:
    """The model with logits of every position; one is held at a time."""
    return llama_cpp.Llama(
        str(path), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )


def logits_of(model: llama_cpp.Llama, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Float32 [T, V]."""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)], dtype=np.float32)


def losses(logits: np.ndarray[Any, Any], ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Negative log likelihood of each next token."""
    wide = logits[:-1].astype(np.float64)
    normal = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1)) + wide.max(1)
    found: np.ndarray[Any, Any] = normal - wide[np.arange(len(wide)), ids[1:]]
    return found


@pytest.mark.parametrize("name", [*NAMES, *TINY])
def test_text_becomes_the_same_tokens(root: Path, name: str) -> None:
    model = opened(root / "gguf" / name / "model.gguf")
    for prompt in json.loads((root / "gguf" / name / "prompts.json").read_text()):
        found = model.tokenize(prompt["text"].encode(), add_bos=True, special=False)
        assert found == prompt["ids"]


@pytest.mark.parametrize("name", TINY)
def test_every_family_computes_the_same_logits(root: Path, name: str) -> None:
    expected = load_file(root / "gguf" / name / "expected.safetensors")
    found = logits_of(
        opened(root / "gguf" / name / "model.gguf"), expected["input_ids"][0].tolist()
    )
    # llama.cpp keeps keys and values in float16; logits of these models are about 1.
    assert np.abs(found - expected["logits"][0]).max() < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_quantkits_own(root: Path, name: str) -> None:
    model = opened(root / "gguf" / name / "model.gguf")
    agreed = total = 0
    for prompt in json.loads((root / "gguf" / name / "prompts.json").read_text()):
        ids, tokens = prompt["ids"], prompt["tokens"]
        # Teacher-forced on quantkit's tokens: at a difference theirs must be as good, or nearly.
        scores = logits_of(model, ids + tokens)[len(ids) - 1 : -1]
        chosen = scores[np.arange(len(tokens)), tokens]
        behind = scores.max(1) - chosen
        agreed += int((behind == 0).sum())
        total += len(tokens)
        assert behind.max() < TIE
    print(f"{name}: {agreed} of {total} tokens are llama.cpp's own choice")
    assert agreed >= 0.9 * total


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_is_quantkits_own(root: Path, name: str) -> None:
    expected = load_file(root / "gguf" / name / "expected.safetensors")
    ids = expected["input_ids"][0]
    ours = losses(expected["logits"][0], ids).mean()
    theirs = losses(logits_of(opened(root / "gguf" / name / "model.gguf"), ids.tolist()), ids)
    print(f"{name}: perplexity {np.exp(theirs.mean()):.4f}, quantkit's own {np.exp(ours):.4f}")
    assert abs(np.exp(theirs.mean() - ours) - 1) < 0.005


def test_model_description_is_the_quantized_type(root: Path) -> None:
    model = opened(root / "gguf" / "q4_0-exported" / "model.gguf")
    buffer = ctypes.create_string_buffer(200)
    llama_cpp.llama_model_desc(model.model, buffer, len(buffer))
    assert b"Q4_0" in buffer.value
