"""Tiny configurations of any model type of transformers: its own defaults with small numbers.

Rules go by the names of fields and the values they have by default; what no rule can know about a
single type is in EXCEPTIONS.  Nothing of this is known to quantkit itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 320
# Ids from here on are for images and the like; text keeps below.
FIRST_SPECIAL = 300
LAYERS = 4
MAX_PARAMETERS = 20_000_000

_WIDTH, _INNER, _HEADS, _HEAD, _POSITIONS = 64, 96, 4, 16, 128
_FIELDS: dict[str, int] = {
    **dict.fromkeys(
        (
            "hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "dim", "n_embed",
            "word_embed_proj_dim", "embedding_size", "attention_hidden_size", "lru_width",
            "input_embedding_size", "backbone_hidden_size", "projection_dim", "d_inner_kv",
            "embed_dim", "mm_hidden_size", "output_hidden_size", "out_hidden_size", "hidden_dim",
            "text_hidden_size", "vision_hidden_size", "pooling_size_hidden", "output_dim",
            "encoder_hidden_size", "cross_attention_hidden_size", "projector_hidden_size",
            "pooler_hidden_size", "output_proj_dims", "vision_output_dim", "projection_hidden_size",
        ),
        _WIDTH,
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dff", "dim_ff",
            "ffn_hidden_size", "d_ff", "n_inner", "d_inner", "feed_forward_size", "n_ffn",
            "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
            "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size", "ffn_size",
            "intermediate_size_mlp", "dense_intermediate_size", "shared_experts_intermediate_size",
            "mlp_dim", "projector_intermediate_size",
        ),
        _INNER,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads", "n_head", "decoder_attention_heads", "encoder_attention_heads",
            "n_heads", "num_heads", "attention_heads", "num_encoder_attention_heads",
            "num_decoder_attention_heads", "linear_num_heads", "swa_num_attention_heads",
            "index_n_heads", "encoder_num_attention_heads", "decoder_num_attention_heads",
            "num_query_groups", "kda_num_heads",
        ),
        _HEADS,
    ),
    **dict.fromkeys(
        (
            "num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "n_kv_heads",
            "num_global_key_value_heads", "linear_num_key_heads", "moe_num_shared_experts",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "head_dim", "kv_channels", "dim_head", "d_head", "attention_head_size", "v_head_dim",
            "qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim", "linear_head_dim",
            "linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim",
            "mamba_headdim", "swa_head_dim", "attention_head_dim", "rotary_dim", "global_head_dim",
            "query_pre_attn_scalar", "swa_v_head_dim", "d_kv",
        ),
        _HEAD,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
            "encoder_layers", "num_encoder_layers", "num_decoder_layers", "num_blocks",
            "encoder_num_hidden_layers", "decoder_num_hidden_layers", "depth",
            "num_layers_per_stack",
        ),
        LAYERS,
    ),
    **dict.fromkeys(
        (
            "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length",
            "max_source_positions", "max_target_positions", "context_length", "seq_length",
            "original_max_position_embeddings", "max_sequence_length", "seq_len",
        ),
        _POSITIONS,
    ),
    **dict.fromkeys(
        (
            "vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "padded_vocab_size",
            "text_vocab_size", "audio_vocab_size", "vocab_size_per_layer_input",
            "encoder_hash_byte_group_vocab", "shape_vocab_size", "pronunciation_vocab_size",
        ),
        VOCABULARY,
    ),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_expert"),
        _HEADS,
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "n_group",
         "num_expert_group", "top_k_experts", "moe_top_k", "n_groups", "zero_expert_num"),
        2,
    ),
    **dict.fromkeys(("topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "lora_rank"), 32),
    **dict.fromkeys(
        ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 2 * _WIDTH // _HEAD
    ),
    **dict.fromkeys(
        ("mamba_d_state", "ssm_state_size", "state_size", "time_step_rank", "mamba_dt_rank",
         "mamba_chunk_size", "chunk_size", "laurel_rank", "adapter_rank", "gated_norm_rank",
         "d_rel", "router_hidden_size", "hidden_size_per_layer_input", "hc_lowrank",
         "mamba_ngroups_size", "altup_rank"),
        _HEAD,
    ),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "window_size", "attention_window_size",
         "local_attention", "local_attention_window_len", "index_topk", "attention_chunk_size",
         "index_block_size", "block_size"),
        8,
    ),
    "mamba_d_ssm": 2 * _WIDTH,
    "linear_num_value_heads": _HEADS,
    "image_size": 28,
    "patch_size": 14,
    "block_multiple_of": 32,
    "qk_head_dim": 2 * _HEAD,
    "ffn_round_up_to_multiple_of": 32,
}  # fmt: skip
# Fields that count layers: their per-layer lists are cut with them.
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers")
# Fields that list the numbers of some layers.
_LAYER_IDS = (
    "moe_layers",
    "mlp_only_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "ple_layer_ids",
)
_DROPPED = ("id2label", "label2id", "model_type", "transformers_version", "architectures", "dtype")

# type -> what the rules cannot know.
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_SHARED = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "hunyuan_v1_dense": {"head_dim": _HEAD},
    "hunyuan_v1_moe": {"head_dim": _HEAD, "num_experts": 4, "moe_topk": 2},
    "ministral": {"head_dim": _HEAD},
    "nemotron": {"num_key_value_heads": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "zamba": {
        "layers_block_type": _SHARED,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": _SHARED,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "hybrid_layer_ids": [1, 3],
    },
    "deepseek_v2": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "deepseek_ocr2_text": {
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "dots3_note_text": {
        "head_dim": 32,
        "per_layer_config": {2: {"kv_lora_rank": 48}, 3: {"kv_lora_rank": 48}},
    },
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32], "is_decoder": True},
    "inkling_text": {"n_routed_experts": 8, "num_experts": 8, "num_local_experts": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 320,
        "ple_embed_dim": 32,
        "split_ngram_parts": 2,
    },
    "hunyuan_vl_text": {"head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "hrm_text": {"num_hidden_layers": 16},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 6,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
    },
    "xmod": {"default_language": "en_XX"},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _PLAIN_ROPE, "sliding_attention": _PLAIN_ROPE},
    },
    "glm5_next_text": {"index_topk": 16},
    **{
        name: {"rope_parameters": {**_PLAIN_ROPE, "mrope_section": [4, 2, 2]}}
        for name in (
            "glm4v_text",
            "glm_ocr_text",
            "paddleocr_vl_text",
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "qwen2_5_omni_text",
        )
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            **_PLAIN_ROPE,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    },
    "mistral4": {"num_key_value_heads": 4},
    "esmc": {"num_key_value_heads": 4},
    "luke": {"entity_vocab_size": 50, "entity_emb_size": _WIDTH},
    "gemma4_unified_assistant": {"hidden_size_per_layer_input": 0},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The configuration of a tiny model of the type.  Raises whatever the type's class raises."""
    return _shrunk(CONFIG_MAPPING[model_type], {})


def _shrunk(cls: type[PretrainedConfig], given: Mapping[str, Any]) -> PretrainedConfig:
    model_type = cls.model_type
    try:
        default = cls(**given).to_dict()
    except Exception:
        default = dict(given)
    changes = _changes({**default, **given})
    special = EXCEPTIONS.get(model_type, {})
    for name, sub in getattr(cls, "sub_configs", {}).items():
        value = default.get(name)
        nested = value if isinstance(value, dict) else {}
        kind = nested.get("model_type", "")
        sub_cls = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else sub  # noqa: SIM401 - lazy
        if not inspect.isclass(sub_cls) or sub_cls.__name__ == "AutoConfig":
            continue
        inner = {**special.get(name, {})} if isinstance(special.get(name), dict) else {}
        changes[name] = {**_shrunk(sub_cls, nested).to_dict(), **inner}
    subs = getattr(cls, "sub_configs", {})
    flat = {k: v for k, v in special.items() if k not in subs or k not in changes}
    return cls(**{**_own(cls, default), **changes, **flat})


def _own(cls: type[PretrainedConfig], default: Mapping[str, Any]) -> dict[str, Any]:
    """The default's values that a new configuration takes."""
    return {k: v for k, v in default.items() if k not in _DROPPED and not k.startswith("_")}


def _changes(default: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    special = FIRST_SPECIAL
    for name, value in default.items():
        number = isinstance(value, int) and not isinstance(value, bool)
        if name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if value is not None:
                found[name] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}[name]
        elif number and name.endswith(("_token_id", "_token_index", "token_idx")) and value >= 0:
            found[name] = special
            special += 1
        elif number and name in _FIELDS and value > 0:
            found[name] = min(_FIELDS[name], value) if name in ("block_size",) else _FIELDS[name]
    _cut_layers_(default, found)
    if default.get("kv_lora_rank") and "num_key_value_heads" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]
    if isinstance(rope := default.get("rope_parameters"), dict) and "mrope_section" in rope:
        half = int(_HEAD * rope.get("partial_rotary_factor", 1)) // 2
        sections = [half - 2 * (half // 4), half // 4, half // 4]
        found["rope_parameters"] = {**rope, "mrope_section": sections}
    if default.get("linear_num_key_heads") == default.get("linear_num_value_heads") is not None:
        found["linear_num_key_heads"] = found["linear_num_value_heads"]
    return found


def _cut_layers_(default: Mapping[str, Any], found: dict[str, Any]) -> None:
    """Cuts lists with a value for each layer to the same few layers, every kind of them."""
    field = next((f for f in _COUNTS if isinstance(default.get(f), int) and f in found), None)
    if field is None:
        return
    count = default[field]
    lists = {
        name: value
        for name, value in default.items()
        if isinstance(value, list | tuple)
        and len(value) == count
        and count > 1
        and name not in _LAYER_IDS
    }
    kept = _representatives(list(zip(*lists.values(), strict=True))) if lists else []
    if kept:
        for name, value in lists.items():
            found[name] = [_small(name, value[index]) for index in kept]
        found[field] = len(kept)
    if isinstance(special := default.get("per_layer_config"), dict):
        layers = kept or list(range(LAYERS))
        values = {int(index): value for index, value in special.items()}
        found["per_layer_config"] = {
            place: {k: _small(k, v) for k, v in values[index].items()}
            for place, index in enumerate(layers)
            if index in values
        }
    for name in _LAYER_IDS:
        if isinstance(default.get(name), list | tuple):
            layers = kept or list(range(LAYERS))
            found[name] = [place for place, index in enumerate(layers) if index in default[name]]


def _small(name: str, value: Any) -> Any:
    if name == "num_attention_heads_per_layer":
        return _HEADS
    if name == "intermediate_size":
        return _INNER
    if name in ("num_attention_heads", "num_key_value_heads"):
        return _HEADS
    # A layer of its own has heads of its own size.
    return 2 * _HEAD if name in ("head_dim", "global_head_dim") else value


def _representatives(kinds: Sequence[Any]) -> list[int]:
    """Indices of one layer of each kind, filled up to LAYERS with the first others, in order."""
    first = {repr(kind): index for index, kind in reversed(list(enumerate(kinds)))}
    chosen = set(first.values())
    for index in range(len(kinds)):
        if len(chosen) >= min(LAYERS, len(kinds)):
            break
        chosen.add(index)
    return sorted(chosen)
