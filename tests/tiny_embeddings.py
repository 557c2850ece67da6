"""Tiny random embedding models and rerankers, laid out as their owners publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# An odd vocabulary, columns that 128 does not divide.
VOCABULARY, HIDDEN, POSITIONS = 331, 96, 130
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _COMMON,
    "xlm-roberta": {**_COMMON, "pad_token_id": 1},
    "modernbert": {
        **_COMMON,
        "global_attn_every_n_layers": 2,
        "local_attention": 16,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "qwen3": {**_COMMON, "num_key_value_heads": 2, "head_dim": 32},
    "nomic_bert": {**_COMMON, "head_dim": 24, "num_key_value_heads": 4},
}
# What each family's owners take as the vector of a text.
POOLING = {"bert": "cls", "xlm-roberta": "mean", "modernbert": "mean", "qwen3": "lasttoken"}


def embedding_model(model_type: str, directory: Path) -> Path:
    """A model without a head; of qwen3 with names that lack `model.`, as its owners store them."""
    model = _model(AutoModel, model_type)
    tiny.save(model, directory)
    tokenizer(model_type).save_pretrained(directory)
    return directory


def sentence_model(model_type: str, directory: Path, *, dense: int | None = None) -> Path:
    """The same as a directory of sentence-transformers, with its modules beside the weights."""
    embedding_model(model_type, directory)
    modules = ["", "1_Pooling", *(["2_Dense"] if dense else []), "3_Normalize"]
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense else []), "Normalize"]
    listed = [
        {"idx": k, "name": str(k), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for k, (path, kind) in enumerate(zip(modules, kinds, strict=True))
    ]
    _write(directory / "modules.json", listed)
    flags = {
        "cls": "pooling_mode_cls_token",
        "mean": "pooling_mode_mean_tokens",
        "lasttoken": "pooling_mode_lasttoken",
    }
    pooling = {"word_embedding_dimension": HIDDEN, **dict.fromkeys(flags.values(), False)}
    pooling[flags[POOLING[model_type]]] = True
    _write(directory / "1_Pooling" / "config.json", pooling)
    _write(directory / "sentence_bert_config.json", {"max_seq_length": 100, "do_lower_case": False})
    _write(
        directory / "config_sentence_transformers.json",
        {"prompts": {"query": "find: ", "document": ""}, "default_prompt_name": None},
    )
    if dense:
        config = {
            "in_features": HIDDEN,
            "out_features": dense,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
        _write(directory / "2_Dense" / "config.json", config)
        generator = torch.Generator().manual_seed(3)
        tensors = {
            "linear.weight": torch.randn(dense, HIDDEN, generator=generator) * HIDDEN**-0.5,
            "linear.bias": torch.randn(dense, generator=generator) * 0.1,
        }
        save_file(tensors, directory / "2_Dense" / "model.safetensors")
    return directory


def reranker(model_type: str, directory: Path, *, labels: int = 1) -> Path:
    """A model that gives a pair of texts a score."""
    model = _model(AutoModelForSequenceClassification, model_type, num_labels=labels)
    tiny.save(model, directory)
    tokenizer(model_type).save_pretrained(directory)
    return directory


def tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    """One token for each byte, between the special tokens that the family has."""
    found = tiny.tokenizer()
    first = "" if model_type == "qwen3" else "<s> "
    found._tokenizer.post_processor = TemplateProcessing(
        single=f"{first}$A </s>",
        pair=f"{first}$A </s> $B </s>",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    found.model_max_length = POSITIONS
    return found


def without_prefix(directory: Path, prefix: str) -> None:
    """Takes a prefix off the names of all tensors in a checkpoint of one file."""
    path = directory / "model.safetensors"
    tensors = {name.removeprefix(prefix): value for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _model(auto: Any, model_type: str, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**CONFIGS[model_type], **more)
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32).eval()
    return model


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(content, indent=1))
