"""Small models trained in minutes, for questions that random weights do not answer.

    python -m tools.toys --kind gated_delta --minutes 4 --out DIR

They learn the English and the tasks of quantkit.demo with its tokenizer.  Needs torch and
transformers; one thread, no network.  Nothing of them is kept in the repository.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantkit.demo import corpus, tasks
from quantkit.demo.files import demo_path
from tools.train_demo import Muon

# Sequences whose logits are computed at once.
_BATCH = 4
_COMMON: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Name -> model type of transformers, and what its configuration says beyond the above.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # Three layers of gated delta rule, one of attention.
    "gated_delta": (
        "qwen3_5_text",
        {
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
    ),
    # Three layers of Mamba 2, one of attention.
    "mamba2": (
        "bamba",
        {
            "attn_layer_indices": [3],
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 32,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "mamba_chunk_size": 64,
        },
    ),
    # A mixture of sixteen experts, two for each token.
    "mixture": (
        "qwen3_moe",
        {
            "moe_intermediate_size": 128,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "output_router_logits": False,
        },
    ),
}
LENGTH, ROWS = 512, 4
_RATE_MATRIX, _RATE_OTHER, _DECAY_FROM = 0.015, 0.004, 0.4


def log_probabilities(model: Any, ids_BT: Tensor) -> Tensor:
    """Of the model's next tokens, float32 [B, T, V]; some sequences at a time."""
    parts = [
        torch.log_softmax(model(input_ids=part, use_cache=False).logits.float(), -1)
        for part in ids_BT.split(_BATCH)
    ]
    return torch.cat(parts)


def divergence(wanted_BTV: Tensor, found_BTV: Tensor) -> tuple[Tensor, dict[str, float]]:
    """KL [B, T] of log-probabilities in nats, and its mean with the error over sequences."""
    kl_BT = (wanted_BTV.exp() * (wanted_BTV - found_BTV)).sum(-1)
    return kl_BT, {
        "kl": float(f"{kl_BT.mean():.4g}"),
        "standard_error": float(f"{kl_BT.mean(1).std() / len(kl_BT) ** 0.5:.2g}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=sorted(KINDS), required=True)
    parser.add_argument("--minutes", type=float, default=4.0, help="of CPU")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    train(arguments.kind, arguments.minutes, arguments.out)


def train(kind: str, minutes: float, out: Path, *, seed: int = 7) -> dict[str, Any]:
    """Trains a toy for so many minutes of CPU and writes it, with its tokenizer; what became of it.

    {"minutes", "steps", "parameters", "loss" (nats per token, the last tenth of training)}, which
    lies in training.json too.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model_type, special = KINDS[kind]
    config = CONFIG_MAPPING[model_type](**{**_COMMON, **special})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    tokens = training_tokens(tokenizer, seed)
    generator = torch.Generator().manual_seed(seed)
    inside = {id(p) for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
    parameters = list(model.parameters())
    muon = Muon([p for p in parameters if id(p) in inside], 0.05)
    adam = torch.optim.AdamW(
        [p for p in parameters if id(p) not in inside], lr=_RATE_OTHER, betas=(0.9, 0.95)
    )
    began, steps, losses = time.process_time(), 0, []
    while (done := (time.process_time() - began) / (60 * minutes)) < 1:
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,), generator=generator)
        ids = torch.stack([tokens[s : s + LENGTH] for s in starts.tolist()])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        rate = min(1.0, (steps + 1) / 20) * min(1.0, max(1 - done, 0.02) / (1 - _DECAY_FROM))
        muon.step(_RATE_MATRIX * rate)
        adam.param_groups[0]["lr"] = _RATE_OTHER * rate
        adam.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
        steps += 1
        if steps % 25 == 0:
            print(f"{done:4.0%} step {steps} loss {sum(losses[-25:]) / 25:.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    tail = losses[-max(len(losses) // 10, 1) :]
    told = {
        "minutes": minutes,
        "steps": steps,
        "parameters": sum(p.numel() for p in parameters),
        "loss": round(sum(tail) / len(tail), 4),
    }
    (out / "training.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
    return told


def training_tokens(tokenizer: Any, seed: int, *, english: bool = True) -> Tensor:
    """Token ids [T] of all training text, English and tasks in turn, or of as many tasks alone."""
    rng = random.Random(seed)
    flat: list[int] = []
    for document in corpus.english_documents("train"):
        if english:
            flat += tokenizer(document.text, verbose=False)["input_ids"]
        flat += tokenizer(tasks.task_text("train", rng), verbose=False)["input_ids"]
    return torch.tensor(flat)


def heldout_windows(tokenizer: Any, length: int, count: int) -> Tensor:
    """Token ids [count, length] of held-out English."""
    flat: list[int] = []
    for document in corpus.english_documents("heldout"):
        flat += tokenizer(document.text, verbose=False)["input_ids"]
    return torch.tensor(flat[: count * length]).view(count, length)


if __name__ == "__main__":
    main()
