"""Decoding with a random Llama on a GPU: bfloat16 and each scheme, static cache, CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit.nn import QuantLinear
from quantkit.scheme import Scheme
from quantkit.tensor import PlainScale, QuantizedTensor

SCHEMES = (None, "w4a16_g128", "w8a16_row", "w8a8_row", "nf4_b64")
EIGHT_BILLION = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=4096,
)
PROMPT, NEW = 128, 128


def rows(device: torch.device, config: LlamaConfig = EIGHT_BILLION) -> Iterator[dict[str, Any]]:
    """One row per scheme: tokens per second, seconds to the first token, peak memory."""
    for name in SCHEMES:
        torch.cuda.reset_peak_memory_stats(device)
        model = random_model(config, name, device)
        yield {"scheme": name or "bf16", **timed(model, device)}
        del model
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def random_model(config: LlamaConfig, scheme: str | None, device: torch.device) -> nn.Module:
    """A Llama of random codes, built a layer at a time; head and embedding stay bfloat16."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and scheme is not None and "lm_head" not in path:
            parent, _, leaf = path.rpartition(".")
            shape = (module.out_features, module.in_features)
            layer = QuantLinear(random_tensor(scheme, shape, device), backend="auto")
            if layer.fallback is not None:
                raise RuntimeError(f"{path}: {layer.fallback}")
            setattr(model.get_submodule(parent), leaf, layer)
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, leaf = path.rpartition(".")
            value = torch.randn(parameter.shape, device=device).bfloat16() * 0.02
            owner = model.get_submodule(parent)
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            # A buffer that no checkpoint holds: computed again on the device.
            fresh = type(module)(config=config, device=device)
            module.inv_freq = fresh.inv_freq
            module.original_inv_freq = fresh.inv_freq
    return model.eval()


def random_tensor(name: str, shape: tuple[int, int], device: torch.device) -> QuantizedTensor:
    """Random codes and scales of a symmetric scheme."""
    scheme = Scheme.parse(name)
    groups = shape[1] // (scheme.group_size or shape[1])
    return QuantizedTensor(
        codes=torch.randint(1, 2**scheme.bits, shape, dtype=torch.uint8, device=device),
        scale=PlainScale(
            tensor=(torch.rand(shape[0], groups, device=device) * 1e-3).bfloat16().float()
        ),
        zero=None,
        scheme=scheme,
        dtype=torch.bfloat16,
    )


def timed(model: Any, device: torch.device) -> dict[str, float]:
    """Tokens per second after the first, seconds to the first token, peak bytes."""
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), device=device)
    options: dict[str, Any] = {
        "do_sample": False,
        "cache_implementation": "static",
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    seconds = {}
    # The first two runs compile and capture.
    for number in range(4):
        for count in (1, NEW + 1):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
            torch.cuda.synchronize(device)
            if number >= 2:
                seconds.setdefault(count, []).append(time.perf_counter() - start)
    first, whole = min(seconds[1]), min(seconds[NEW + 1])
    return {
        "tokens_per_second": round(NEW / (whole - first), 1),
        "first_token_seconds": round(first, 4),
        "peak_bytes": torch.cuda.max_memory_allocated(device),
    }
