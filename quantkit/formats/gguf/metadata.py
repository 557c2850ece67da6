"""Metadata of a GGUF file from a transformers configuration, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quantkit_kernels.lazy import torch

from quantkit.errors import CheckpointError, FormatError
from quantkit.formats.gguf.families import FAMILIES, Assumption, Family
from quantkit.formats.gguf.file import GgufHeader, damaged, shown

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["u32", "f32", "bool", "str", "strings", "i32s", "f32s"]
# Depths for which llama.cpp scales attention by hidden size / heads instead of the head's size.
_WIDE_ATTENTION = {"gemma2": 46, "gemma3_text": 62}
# Every so many layers one sees the whole context, the others a window.
_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_MAX_LAYERS = 4096
_TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One metadata key with its type in the file."""

    key: str
    kind: Kind
    value: int | float | bool | str | tuple[str, ...] | tuple[int, ...] | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Described:
    """A model's metadata; `rope_factors` float32 [rotated / 2] is a tensor of its own, or None."""

    entries: tuple[Entry, ...]
    rope_factors: Tensor | None
    notes: tuple[str, ...]


def describe(family: Family, config: Any) -> Described:
    """The architecture's metadata for a transformers config object.

    Raises FormatError if the config asks for something that llama.cpp computes otherwise.
    """
    for assumption in family.assumes:
        _check_assumption(family, config, assumption)
    _check_attention(family, config)
    entries, notes = [], []
    for key in family.metadata:
        value = getattr(config, key.field, None)
        if value is None and key.field == "n_inner":
            value = 4 * config.n_embd
        window = getattr(config, "sliding_window", None)
        unused = any(assumption.field == "sliding_window" for assumption in family.assumes)
        if key.suffix == "context_length" and unused and window is not None and window < value:
            notes.append(
                f"llama.cpp has no sliding window for {family.model_type}: the context length is "
                f"written as the window's, {window} instead of {value}"
            )
            value = window
        if value is None:
            if key.optional:
                continue
            raise FormatError(f"config.json: {key.field} is missing; gguf needs it")
        name = f"{family.architecture}.{key.suffix}"
        number = int(value) if key.kind == "u32" else float(value)
        entries.append(Entry(key=name, kind=key.kind, value=number))
    factors = None
    if family.rotates:
        rope, factors = _rope_entries(family, config)
        entries += rope
    return Described(entries=tuple(entries), rope_factors=factors, notes=tuple(notes))


def reconstruct(header: GgufHeader) -> tuple[Family, dict[str, Any]]:
    """The family of a file and the config.json that gives its model in transformers.

    Raises CheckpointError naming the key if metadata is missing, or the architecture is not known.
    """
    architecture = header.text("general.architecture")
    experts = header.metadata.get(f"{architecture}.expert_count", 0)
    model_type = {
        ("llama", True): "mixtral",
        ("llama", False): "llama",
        ("gemma3", False): "gemma3_text",
        ("qwen3moe", True): "qwen3_moe",
    }.get((architecture, bool(experts)), architecture)
    family = FAMILIES.get(model_type)
    if family is None or family.architecture != architecture:
        known = ", ".join(sorted({family.architecture for family in FAMILIES.values()}))
        raise CheckpointError(
            f"{header.path}: general.architecture {shown(architecture)!r} is not read; known: "
            f"{known}"
        )
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.class_name],
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    for key in family.metadata:
        name = f"{architecture}.{key.suffix}"
        if key.suffix == "vocab_size" or (key.optional and name not in header.metadata):
            continue
        config[key.field] = header.count(name) if key.kind == "u32" else header.number(name)
    layers = config[family.block_count]
    if not 1 <= layers <= _MAX_LAYERS:
        raise damaged(header.path, f"metadata {architecture}.block_count is {layers}")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise damaged(header.path, "there is no matrix token_embd.weight")
    config["vocab_size"] = embedding.shape[0]
    for field, key_name in _TOKEN_IDS.items():
        config[field] = header.count(key_name) if key_name in header.metadata else None
        if config[field] is not None and config[field] >= config["vocab_size"]:
            raise damaged(header.path, f"metadata {key_name} is {config[field]}")
    for assumption in family.assumes:
        config.setdefault(assumption.field, assumption.values[0])
    _restore_attention_(family, config)
    if family.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    if family.rotates:
        config["rope_parameters"] = _rope_parameters(family, header)
    return family, config


def _check_assumption(family: Family, config: Any, assumption: Assumption) -> None:
    value = getattr(config, assumption.field, None)
    if value is None or value in assumption.values or assumption.field == "sliding_window":
        return
    allowed = " or ".join(repr(allowed) for allowed in assumption.values)
    raise FormatError(
        f"config.json: {assumption.field} is {value!r}; llama.cpp computes {family.architecture} "
        f"with {allowed} only"
    )


def _check_attention(family: Family, config: Any) -> None:
    """Gemma's attention scale and window pattern are not in the file: llama.cpp has its own."""
    every = _FULL_EVERY.get(family.model_type)
    if every is None:
        return
    expected = config.head_dim
    if config.num_hidden_layers == _WIDE_ATTENTION[family.model_type]:
        expected = config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar != expected:
        raise FormatError(
            f"config.json: query_pre_attn_scalar is {config.query_pre_attn_scalar}; llama.cpp "
            f"scales the attention of {family.architecture} by {expected}"
        )
    if list(config.layer_types) != _layer_types(config.num_hidden_layers, every):
        raise FormatError(
            f"config.json: layer_types: llama.cpp takes every {every}th layer of "
            f"{family.architecture} as full attention, the others as sliding"
        )


def _layer_types(layers: int, every: int) -> list[str]:
    kinds = ("sliding_attention", "full_attention")
    return [kinds[index % every == every - 1] for index in range(layers)]


def _restore_attention_(family: Family, config: dict[str, Any]) -> None:
    every = _FULL_EVERY.get(family.model_type)
    if every is None:
        return
    layers = config["num_hidden_layers"]
    config["layer_types"] = _layer_types(layers, every)
    config["query_pre_attn_scalar"] = config.get("head_dim", 256)
    if layers == _WIDE_ATTENTION[family.model_type]:
        config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]


def _rope_entries(family: Family, config: Any) -> tuple[list[Entry], Tensor | None]:
    parameters: Mapping[str, Any] = config.rope_parameters
    local = parameters.get("sliding_attention")
    whole = parameters.get("full_attention", parameters)
    stem = f"{family.architecture}.rope"
    entries = [Entry(key=f"{stem}.freq_base", kind="f32", value=float(whole["rope_theta"]))]
    if local is not None:
        if local.get("rope_type", "default") != "default":
            raise FormatError("config.json: rope_parameters: sliding layers are not scaled by gguf")
        theta = float(local["rope_theta"])
        entries.append(Entry(key=f"{stem}.freq_base_swa", kind="f32", value=theta))
    head_size = getattr(config, "head_dim", None)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    rotated = int(head_size * whole.get("partial_rotary_factor", 1.0))
    entries.append(Entry(key=f"{stem}.dimension_count", kind="u32", value=rotated))
    kind = whole.get("rope_type", "default")
    if kind == "default":
        return entries, None
    if kind == "llama3" and family.architecture == "llama":
        return entries, _llama3_factors(whole, rotated)
    told = {"linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings")}
    further = set(whole) - {"rope_type", "rope_theta", "partial_rotary_factor"}
    if kind not in told or further - set(told[kind]) or not set(told[kind]) <= further:
        raise FormatError(
            f"config.json: rope_parameters of type {kind!r} with {', '.join(sorted(further))}: "
            "gguf is written for default, linear (factor), yarn (factor and "
            "original_max_position_embeddings) and, for llama, llama3"
        )
    entries.append(Entry(key=f"{stem}.scaling.type", kind="str", value=kind))
    entries.append(Entry(key=f"{stem}.scaling.factor", kind="f32", value=float(whole["factor"])))
    if kind == "yarn":
        length = int(whole["original_max_position_embeddings"])
        entries.append(
            Entry(key=f"{stem}.scaling.original_context_length", kind="u32", value=length)
        )
    return entries, None


def _llama3_factors(rope: Mapping[str, Any], rotated: int) -> Tensor:
    """What each frequency is divided by, as Llama 3.1 scales them: float32 [rotated / 2]."""
    factor, low, high, length = (float(rope[field]) for field in _LLAMA3)
    found = []
    for index in range(0, rotated, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (index / rotated)
        if wavelength < length / high:
            found.append(1.0)
        elif wavelength > length / low:
            found.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found, dtype=torch.float32)


def llama3_rope(theta: float, factors: Tensor) -> dict[str, Any] | None:
    """The rope_parameters behind the frequency factors of a Llama 3 file, or None.

    The file has only what each frequency is divided by, float32 [rotated / 2].  All models of this
    kind share two of the four numbers, the largest factor is the third, and the length that the
    model was first trained on is a power of two: 8192 in those that were published.
    """
    known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for length in (8192, *(2**k for k in range(4, 21) if k != 13)):
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": float(factors.max()),
            "original_max_position_embeddings": length,
            **known,
        }
        # Their tables are computed in float32.
        if torch.allclose(_llama3_factors(rope, 2 * len(factors)), factors, rtol=1e-4):
            return rope
    return None


def _rope_parameters(family: Family, header: GgufHeader) -> dict[str, Any]:
    stem = f"{family.architecture}.rope"
    base = header.number(f"{stem}.freq_base") if f"{stem}.freq_base" in header.metadata else 1e4
    kind = header.metadata.get(f"{stem}.scaling.type", "none")
    whole: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if kind in ("linear", "yarn"):
        whole |= {"rope_type": kind, "factor": header.number(f"{stem}.scaling.factor")}
        if kind == "yarn":
            name = f"{stem}.scaling.original_context_length"
            whole["original_max_position_embeddings"] = header.count(name)
    elif kind != "none":
        raise CheckpointError(f"{header.path}: metadata {stem}.scaling.type {kind!r} is not read")
    if family.model_type == "gemma3_text":
        name = f"{stem}.freq_base_swa"
        local = header.number(name) if name in header.metadata else 1e4
        return {
            "full_attention": whole,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return whole
