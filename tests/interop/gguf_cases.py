"""What make_gguf.py writes and test_llama_cpp.py reads."""

from __future__ import annotations

from typing import Any

# Tokens of one text on which perplexities are compared.
PERPLEXITY_TOKENS = 400

# Name -> options of `quantkit quantize` for the checkpoint; none: the model itself.
EXPORTED: dict[str, tuple[str, ...]] = {
    "dense": (),
    "q4_0-exported": ("--method", "rtn", "--scheme", "w4a16_g32"),
    "q8_0-exported": ("--method", "rtn", "--scheme", "w8a16_g32"),
    "q4_1-exported": ("--method", "rtn", "--scheme", "w4a16_g128_asym"),
}
# Name -> options of `quantkit quantize`, written without a checkpoint between.
_CALIBRATION = ("--calib", "demo", "--samples", "16", "--seq-len", "128")
QUANTIZED: dict[str, tuple[str, ...]] = {
    name: ("--format", "gguf", "--scheme", name, *_CALIBRATION)
    for name in ("q2_k", "q3_k_m", "q4_k_m", "q5_0", "q5_1", "q5_k_m", "q6_k")
}
# Blocks of 4-bit floats, which llama-quantize makes of experts only.
FLOATS: dict[str, tuple[str, ...]] = {
    "mxfp4": ("--format", "gguf", "--scheme", "mxfp4a16", "--method", "gptq", *_CALIBRATION)
}
# The owner's numbers of the same recipes (llama_ftype).
FILE_TYPES = {
    "q2_k": 10,
    "q3_k_m": 12,
    "q4_k_m": 15,
    "q5_0": 8,
    "q5_1": 9,
    "q5_k_m": 17,
    "q6_k": 18,
}

# Tokenizers as sentencepiece makes them: Llama 2's adds a space and <s>, Gemma's neither here.
SENTENCEPIECE: dict[str, dict[str, bool]] = {
    "llama": {"adds_space": True, "starts": True},
    "gemma": {"adds_space": False, "starts": False},
}

_BASE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16}
# Model type -> sizes of a random model.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _BASE
    | {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": _BASE | {"head_dim": 64, "sliding_window": None},
    "qwen2": _BASE | {"tie_word_embeddings": True},
    "qwen3": _BASE | {"head_dim": 64},
    "gemma2": _BASE | _GEMMA,
    "gemma3_text": _BASE | _GEMMA | {"num_hidden_layers": 7},
    "phi3": _BASE,
    "gpt2": {
        "n_embd": 128,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
        "initializer_range": 0.08,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "mixtral": _BASE | {"num_local_experts": 4},
    "qwen3_moe": _BASE
    | {
        "head_dim": 32,
        "num_experts": 4,
        "num_local_experts": 4,
        "moe_intermediate_size": 64,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}
