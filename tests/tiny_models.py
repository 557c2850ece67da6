"""Tiny random checkpoints of every supported model type, written as transformers saves them.

`python tests/tiny_models.py llama DIR` writes one by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 320
HIDDEN = 64
LAYERS = 3

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FUSED_HEADS = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": {**_COMMON, "sliding_window": 8},
    "qwen2": {**_COMMON, "tie_word_embeddings": True},
    "qwen3": {**_COMMON, "head_dim": 32},
    "gemma2": {**_COMMON, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32},
    "gemma3_text": {
        **_COMMON,
        "head_dim": 32,
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {**_COMMON, "original_max_position_embeddings": 128},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "gpt_neo": {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_layers": 4,
        "attention_types": [[["global", "local"], 2]],
        "num_heads": 4,
        "window_size": 8,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "gpt_neox": {**_FUSED_HEADS, "use_parallel_residual": True},
    "falcon": {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "bloom": {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "n_layer": LAYERS,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "cohere2": {
        **_COMMON,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "logit_scale": 0.25,
    },
    "olmo2": _COMMON,
    "mixtral": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_COMMON,
        "head_dim": 32,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}
# Variants that exercise other layouts of the same types.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "falcon_grouped": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
    ),
    "falcon_alibi": (
        "falcon",
        {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    ),
    "neox_serial": ("gpt_neox", {"use_parallel_residual": False}),
    "qwen3_moe_dense_first": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "opt_post_norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
}

# Types beyond the supported ones, for what they alone have: shared experts, convolutions, experts
# stored in one tensor, experts that do not use the interface, parameters made on a device of their
# own, blocks that return lists, a forward that changes weights.
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        **_COMMON,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "lfm2": {**_COMMON, "layer_types": ["conv", "full_attention", "conv"]},
    "gpt_oss": {**_COMMON, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        **_COMMON,
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
    },
    "diffllama": _COMMON,
    "xlnet": {
        "vocab_size": VOCABULARY,
        "d_model": HIDDEN,
        "n_layer": 2,
        "n_head": 4,
        "d_inner": 96,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "openai-gpt": {
        "vocab_size": VOCABULARY,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 128,
    },
    "rwkv": {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "attention_hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "context_length": 128,
    },
}


# Image-text types -> the type of their text model, and other settings.
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"mm_tokens_per_image": 4}),
    "paligemma": ("gemma2", {"projection_dim": HIDDEN, "image_token_index": 5}),
    "llava_onevision": ("qwen2", {"image_token_index": 5, "video_token_index": 6}),
    "aya_vision": ("cohere2", {"image_token_index": 5, "downsample_factor": 2}),
}


def build(
    model_type: str,
    directory: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """The directory, which now holds config, weights and a tokenizer; a type or a variant's name.

    Norm weights and biases are random too, so that a fold that forgets one is seen.
    """
    directory = Path(directory)
    settings: dict[str, Any] = {}
    if model_type in VARIANTS:
        model_type, settings = VARIANTS[model_type]
    known = {**CONFIGS, **OTHERS}[model_type]
    config = CONFIG_MAPPING[model_type](**{**known, **settings, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return save(model, directory, seed=seed, dtype=dtype)


def save(
    model: PreTrainedModel,
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The directory, which now holds the model with random weights and a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.2)
    model.to(dtype).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def build_multimodal(directory: str | Path, kind: str = "gemma3") -> Path:
    """The directory, which now holds a vision tower beside text blocks, of a type of `IMAGES`.

    The tower is SigLIP's, with the pooling head that torch's own attention is in.
    """
    text, others = IMAGES[kind]
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = CONFIG_MAPPING[kind](
        text_config={**CONFIGS[text], "model_type": text}, vision_config=vision, **others
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return save(model, Path(directory))


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 3 special tokens and one token per byte, no merges."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary.update({char: number for number, char in enumerate(bytes_, start=3)})
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


if __name__ == "__main__":
    print(build(sys.argv[1], sys.argv[2]))
