"""A tiny trained-looking model, its quantized form and text, for tests of evaluation."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import tiny_jobs as jobs
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 71


def tiny_llama(vocab: int = VOCAB) -> LlamaForCausalLM:
    """A random model whose predictions differ between tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def perturbed(model: LlamaForCausalLM, noise: float) -> LlamaForCausalLM:
    """A copy with noise on every parameter."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return other


def reference_log_probs(model: Any, ids_NT: torch.Tensor) -> np.ndarray:
    """Log-probabilities the slow, obvious way: float64, one window at a time."""
    with torch.no_grad():
        logits = [model(input_ids=row[None]).logits[0, :-1].double().numpy() for row in ids_NT]
    stacked = np.stack(logits)
    shifted = stacked - stacked.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def loud(kind: str, directory: Path, **overrides: Any) -> Path:
    """A tiny checkpoint with large weights, so that quantization shows in its predictions."""
    return jobs.build(kind, directory, initializer_range=0.2, **overrides)


def write_heldout(directory: Path) -> Path:
    """A text file unlike the calibration's, a few thousand tokens long."""
    generator = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz ,."
    path = directory / "heldout.txt"
    path.write_text("".join(generator.choice(letters) for _ in range(2600)))
    return path


def quantized(model: Path, out: Path, method: str = "rtn", scheme: str = "w4a16_g32") -> Path:
    """The finished checkpoint of a method."""
    return jobs.finish(jobs.make_job(model, method, scheme), out).out
