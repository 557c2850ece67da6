"""config.json at the door: the fields that quantkit, or transformers without checking, works with.

What a model's own class declares it checks itself; these are the fields that all models share.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quantkit.checkpoint.door import (
    Fields,
    check_fields,
    is_bool,
    is_count,
    is_integer,
    is_number,
    is_object,
    is_size,
    is_text,
    list_of,
)
from quantkit.errors import CheckpointError

# What transformers calls the parts of a model that have a configuration of their own.
_PARTS = ("text_config", "vision_config", "audio_config", "decoder", "encoder")
_BLOCKS = frozenset(
    {
        "num_hidden_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "num_decoder_layers",
        "decoder_layers",
        "num_encoder_layers",
        "encoder_layers",
        "num_nextn_predict_layers",
    }
)
# So many blocks are built on no memory worth speaking of; missing weights then show by name.
_FEW_BLOCKS = 1024
# Tokenizers write 10**30 where there is no limit, and nothing computes with it.
_WITHOUT_LIMIT = frozenset({"model_max_length", "max_length"})
# Labels become a dictionary, and no language model has classes.
_MOST_LABELS = 100_000
_NUMBER = re.compile(r"(?<![0-9])[0-9]{1,9}(?![0-9])")


def _is_ids(value: Any) -> bool:
    return is_integer(value) or list_of(is_integer)(value)


def _is_numbers(value: Any) -> bool:
    return is_number(value) or list_of(is_number)(value)


def _is_code(value: Any) -> bool:
    """Class -> "module.Class", or a list of these where there are a slow and a fast one."""

    def named(each: Any) -> bool:
        return each is None or is_text(each)

    return is_object(value) and all(
        named(each) or (isinstance(each, list) and all(map(named, each))) for each in value.values()
    )


_FIELDS: Fields = {
    **dict.fromkeys(("model_type", "torch_dtype", "dtype"), (is_text, "a text")),
    **dict.fromkeys(("transformers_version", "_name_or_path"), (is_text, "a text")),
    "architectures": (list_of(is_text), "a list of texts"),
    "auto_map": (_is_code, "an object of class names"),
    **dict.fromkeys(("quantization_config", "compression_config"), (is_object, "an object")),
    **dict.fromkeys(("id2label", "label2id", "text_config"), (is_object, "an object")),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), (is_object, "an object")),
    **dict.fromkeys(
        (
            "output_hidden_states",
            "output_attentions",
            "return_dict",
            "use_return_dict",
            "is_encoder_decoder",
            "is_decoder",
            "add_cross_attention",
            "tie_word_embeddings",
            "use_cache",
        ),
        (is_bool, "true or false"),
    ),
    **dict.fromkeys(("hidden_size", "vocab_size"), (is_size, "a whole number of at least 1")),
    **dict.fromkeys(
        (*_BLOCKS, "num_labels", "chunk_size_feed_forward"), (is_count, "a whole number")
    ),
    "sliding_window": (is_integer, "a whole number"),
    **dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id"), (_is_ids, "a token id or a list of them")
    ),
    "max_position_embeddings": (is_number, "a number"),
    "rope_theta": (_is_numbers, "a number or a list of them"),
}


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Nothing if the shared fields have the types they should; else CheckpointError naming one.

    `where` names the file.
    """
    for path, part in _parts(config):
        check_fields(part, _FIELDS, f"{where}: {path}", needed=frozenset({"model_type"}))
        for name, value in part.items():
            if is_integer(value) and abs(value) >= 2**64 and name not in _WITHOUT_LIMIT:
                raise CheckpointError(f"{where}: {path}{name}: an integer beyond 64 bits")


def check_counts(config: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Nothing if the tensors can be as many blocks as config.json counts; else CheckpointError.

    Building a model of a thousand million blocks would take all memory before the first missing
    weight shows.  Every block has a number of its own in the names of its tensors.
    """
    counts = [
        (f"{path}{name}", value)
        for path, part in _parts(config)
        for name, value in part.items()
        if name in _BLOCKS and is_count(value)
    ]
    labels = config.get("num_labels") or 0
    if labels > _MOST_LABELS:
        raise CheckpointError(
            f"{where}: num_labels is {labels}, and no tensor holds so many classes; take it out"
        )
    if max((value for _, value in counts), default=0) <= _FEW_BLOCKS:
        return
    numbered = max((int(n) for name in names for n in _NUMBER.findall(name)), default=0) + 1
    for name, value in counts:
        if value > max(numbered, _FEW_BLOCKS):
            raise CheckpointError(
                f"{where}: {name} is {value}, but the checkpoint's tensors are numbered up to "
                f"{numbered - 1}; weights and config belong to different models"
            )


def _parts(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The configuration and those of its parts, each with the path that leads to it."""
    found: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    for name in _PARTS:
        part = config.get(name)
        if isinstance(part, Mapping):
            found.append((f"{name}.", part))
    return found
