"""The one table of model families in GGUF: tensor names, what is rearranged, metadata keys.

The container is defined per architecture, so a table is right here and nowhere else.  Names and
keys are those of the `gguf` package (checked by tests/formats/gguf/test_export.py); what a family
takes for granted (`assumes`) is read in llama.cpp's src/models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from quantkit.errors import FormatError

Kind = Literal["u32", "f32"]


@dataclass(frozen=True, kw_only=True)
class Key:
    """Metadata `{architecture}.{suffix}` and the field of the transformers config it comes from.

    `optional`: left out where the config has no value.
    """

    suffix: str
    field: str
    kind: Kind = "u32"
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """The architecture computes with `values` of a config field only; None counts as the first."""

    field: str
    values: tuple[object, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a transformers model type is written; names are stems, less ".weight" or ".bias".

    outside     checkpoint stem -> GGUF stem
    block       the same below `prefix`N. and blk.N.
    experts     checkpoint stem below the block, {e} for the expert -> GGUF stem of all experts
    interleave  GGUF stem -> config field with its number of heads, whose rows pair halves of a head
                (transformers) and must pair neighbours (ggml)
    norm_shift  added to norm weights: transformers computes with 1 + w
    transposed  GGUF stems that the checkpoint stores [in, out]
    ignored     checkpoint stems below the block that hold no weights
    rotates     false for models with learnt positions
    """

    model_type: str
    architecture: str
    class_name: str
    outside: Mapping[str, str]
    block: Mapping[str, str]
    metadata: tuple[Key, ...]
    prefix: str = "model.layers."
    experts: Mapping[str, str] = field(default_factory=dict)
    interleave: Mapping[str, str] = field(default_factory=dict)
    norm_shift: float = 0.0
    transposed: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    assumes: tuple[Assumption, ...] = ()
    rotates: bool = True
    block_count: str = "num_hidden_layers"


def family_of(model_type: str) -> Family:
    """The family of a transformers model type.  Raises FormatError listing the known ones."""
    found = FAMILIES.get(model_type)
    if found is None:
        raise FormatError(
            f"model type {model_type!r}: gguf is written for {', '.join(sorted(FAMILIES))}; "
            "choose another --format"
        )
    return found


_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_GATED = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_GEMMA_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_INTERLEAVE = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}

_SIZES = (
    Key(suffix="context_length", field="max_position_embeddings"),
    Key(suffix="embedding_length", field="hidden_size"),
    Key(suffix="block_count", field="num_hidden_layers"),
    Key(suffix="feed_forward_length", field="intermediate_size"),
    Key(suffix="attention.head_count", field="num_attention_heads"),
    Key(suffix="attention.head_count_kv", field="num_key_value_heads"),
    Key(suffix="attention.layer_norm_rms_epsilon", field="rms_norm_eps", kind="f32"),
    Key(suffix="vocab_size", field="vocab_size"),
)
_HEAD_SIZE = (
    Key(suffix="attention.key_length", field="head_dim", optional=True),
    Key(suffix="attention.value_length", field="head_dim", optional=True),
)
_SILU = Assumption(field="hidden_act", values=("silu",))
_GELU = Assumption(field="hidden_activation", values=("gelu_pytorch_tanh",))
_NO_WINDOW = Assumption(field="use_sliding_window", values=(False,))

_LLAMA = Family(
    model_type="llama",
    architecture="llama",
    class_name="LlamaForCausalLM",
    outside=_OUTSIDE,
    block=_ATTENTION | _NORMS | _GATED,
    metadata=_SIZES + _HEAD_SIZE,
    interleave=_INTERLEAVE,
    ignored=frozenset({"self_attn.rotary_emb.inv_freq"}),
    assumes=(_SILU,),
)
_MISTRAL = Family(
    model_type="mistral",
    architecture="llama",
    class_name="MistralForCausalLM",
    outside=_OUTSIDE,
    block=_ATTENTION | _NORMS | _GATED,
    metadata=_SIZES + _HEAD_SIZE,
    interleave=_INTERLEAVE,
    assumes=(_SILU, Assumption(field="sliding_window", values=(None,))),
)
_MIXTRAL = Family(
    model_type="mixtral",
    architecture="llama",
    class_name="MixtralForCausalLM",
    outside=_OUTSIDE,
    block=_ATTENTION | _NORMS | {"block_sparse_moe.gate": "ffn_gate_inp"},
    metadata=(
        *_SIZES,
        *_HEAD_SIZE,
        Key(suffix="expert_count", field="num_local_experts"),
        Key(suffix="expert_used_count", field="num_experts_per_tok"),
    ),
    experts={
        "block_sparse_moe.experts.{e}.w1": "ffn_gate_exps",
        "block_sparse_moe.experts.{e}.w2": "ffn_down_exps",
        "block_sparse_moe.experts.{e}.w3": "ffn_up_exps",
    },
    interleave=_INTERLEAVE,
    assumes=(_SILU, Assumption(field="sliding_window", values=(None,))),
)
_QWEN2 = Family(
    model_type="qwen2",
    architecture="qwen2",
    class_name="Qwen2ForCausalLM",
    outside=_OUTSIDE,
    block=_ATTENTION | _NORMS | _GATED,
    metadata=_SIZES,
    assumes=(_SILU, _NO_WINDOW),
)
_QWEN3 = Family(
    model_type="qwen3",
    architecture="qwen3",
    class_name="Qwen3ForCausalLM",
    outside=_OUTSIDE,
    block=_ATTENTION | _HEAD_NORMS | _NORMS | _GATED,
    metadata=_SIZES + _HEAD_SIZE,
    assumes=(_SILU, _NO_WINDOW, Assumption(field="attention_bias", values=(False,))),
)
_QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="qwen3moe",
    class_name="Qwen3MoeForCausalLM",
    outside=_OUTSIDE,
    block=_ATTENTION | _HEAD_NORMS | _NORMS | {"mlp.gate": "ffn_gate_inp"},
    metadata=(
        *_SIZES,
        *_HEAD_SIZE,
        Key(suffix="expert_count", field="num_experts"),
        Key(suffix="expert_used_count", field="num_experts_per_tok"),
        Key(suffix="expert_feed_forward_length", field="moe_intermediate_size"),
    ),
    experts={
        "mlp.experts.{e}.gate_proj": "ffn_gate_exps",
        "mlp.experts.{e}.down_proj": "ffn_down_exps",
        "mlp.experts.{e}.up_proj": "ffn_up_exps",
    },
    assumes=(
        _SILU,
        _NO_WINDOW,
        Assumption(field="attention_bias", values=(False,)),
        Assumption(field="norm_topk_prob", values=(True,)),
        Assumption(field="decoder_sparse_step", values=(1,)),
        Assumption(field="mlp_only_layers", values=([],)),
    ),
)
_GEMMA2 = Family(
    model_type="gemma2",
    architecture="gemma2",
    class_name="Gemma2ForCausalLM",
    outside=_OUTSIDE,
    block=_ATTENTION | _GEMMA_NORMS | _GATED,
    metadata=(
        *_SIZES,
        *_HEAD_SIZE,
        Key(suffix="attn_logit_softcapping", field="attn_logit_softcapping", kind="f32"),
        Key(suffix="final_logit_softcapping", field="final_logit_softcapping", kind="f32"),
        Key(suffix="attention.sliding_window", field="sliding_window"),
    ),
    norm_shift=1.0,
    # llama.cpp has no head of its own for Gemma 2.
    assumes=(
        _GELU,
        Assumption(field="attention_bias", values=(False,)),
        Assumption(field="tie_word_embeddings", values=(True,)),
    ),
)
_GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="gemma3",
    class_name="Gemma3ForCausalLM",
    outside=_OUTSIDE,
    block=_ATTENTION | _HEAD_NORMS | _GEMMA_NORMS | _GATED,
    metadata=(
        *_SIZES,
        *_HEAD_SIZE,
        Key(
            suffix="final_logit_softcapping",
            field="final_logit_softcapping",
            kind="f32",
            optional=True,
        ),
        Key(suffix="attention.sliding_window", field="sliding_window"),
    ),
    norm_shift=1.0,
    assumes=(
        _GELU,
        Assumption(field="attention_bias", values=(False,)),
        Assumption(field="attn_logit_softcapping", values=(None,)),
        Assumption(field="use_bidirectional_attention", values=(False,)),
    ),
)
_PHI3 = Family(
    model_type="phi3",
    architecture="phi3",
    class_name="Phi3ForCausalLM",
    outside=_OUTSIDE,
    block=_NORMS
    | {
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    metadata=_SIZES,
    # llama.cpp reads the window of Phi-3 and does not use it.
    assumes=(_SILU, Assumption(field="sliding_window", values=(None,))),
)
_GPT2 = Family(
    model_type="gpt2",
    architecture="gpt2",
    class_name="GPT2LMHeadModel",
    prefix="transformer.h.",
    outside={
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    block={
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    metadata=(
        Key(suffix="context_length", field="n_positions"),
        Key(suffix="embedding_length", field="n_embd"),
        Key(suffix="block_count", field="n_layer"),
        Key(suffix="feed_forward_length", field="n_inner"),
        Key(suffix="attention.head_count", field="n_head"),
        Key(suffix="attention.layer_norm_epsilon", field="layer_norm_epsilon", kind="f32"),
        Key(suffix="vocab_size", field="vocab_size"),
    ),
    transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ignored=frozenset({"attn.bias", "attn.masked_bias"}),
    assumes=(
        Assumption(field="activation_function", values=("gelu_new", "gelu_pytorch_tanh")),
        Assumption(field="scale_attn_weights", values=(True,)),
        Assumption(field="scale_attn_by_inverse_layer_idx", values=(False,)),
    ),
    rotates=False,
    block_count="n_layer",
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        _LLAMA,
        _MISTRAL,
        _MIXTRAL,
        _QWEN2,
        _QWEN3,
        _QWEN3_MOE,
        _GEMMA2,
        _GEMMA3,
        _PHI3,
        _GPT2,
    )
}
