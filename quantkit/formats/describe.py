"""What is in a checkpoint, told from headers and configuration: no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.dtypes import name_of
from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.source import Source
from quantkit.errors import QuantkitError
from quantkit.formats.contents import Contents, Item
from quantkit.formats.format import StoredWeight
from quantkit.formats.gguf.describe import describe_gguf
from quantkit.formats.onnx.describe import describe_onnx
from quantkit.formats.open import container_of, is_onnx, open_source
from quantkit.formats.registry import format_of

# Codes that other tools pack into the 32-bit words of this tensor.
_PACKED = ".qweight"
# What other tools keep beside codes: no numbers of the original.
_HELPERS = (".scales", ".qzeros", ".g_idx", "_scale", "_scale_inv", "_zero_point", ".SCB")
_OPTIONS = (
    "bits",
    "w_bit",
    "group_size",
    "q_group_size",
    "sym",
    "desc_act",
    "version",
    "format",
    "checkpoint_format",
    "bnb_4bit_quant_type",
    "load_in_8bit",
    "fmt",
)


def describe(path: Path) -> Contents:
    """What a directory, GGUF or ONNX file at `path` holds, ours or another tool's.

    Layouts that quantkit does not read are told from their configuration, with a note.  Raises
    CheckpointError if there is no checkpoint, or a damaged one.
    """
    if (file := container_of(path)) is not None:
        return describe_onnx(file) if is_onnx(file) else describe_gguf(file)
    source = open_source(path)
    assert isinstance(source, FileSource)
    return describe_source(source)


def describe_source(source: FileSource) -> Contents:
    """The same of an opened checkpoint in safetensors."""
    config = source.config
    quantization = _quantization_config(config)
    notes: list[str] = []
    stored: dict[str, StoredWeight] = {}
    name = "unquantized safetensors"
    if quantization is not None:
        name = _described(quantization)
        try:
            fmt = format_of(source)
            stored = fmt.weights(source)
            name = fmt.name
        except QuantkitError as error:
            notes.append(f"not read by quantkit: {error}")
    return Contents(
        model_type=str(config.get("model_type", "unknown")),
        format=name,
        items=tuple(_items(source, stored, quantization or {})),
        home=source.path,
        notes=tuple(notes),
    )


def _quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key) if isinstance(part, Mapping) else None
            if isinstance(found, dict):
                return found
    return None


def _described(config: Mapping[str, Any]) -> str:
    """A foreign quantization_config in a line: its method and its main options."""
    options = [f"{key} {config[key]}" for key in _OPTIONS if config.get(key) not in (None, False)]
    method = str(config.get("quant_method", "unknown method"))
    return f"{method} ({', '.join(options)})" if options else method


def _items(
    source: Source, stored: Mapping[str, StoredWeight], config: Mapping[str, Any]
) -> Iterator[Item]:
    """All tensors; a quantized weight counts as one."""
    packed = Counter(name for weight in stored.values() for name in weight.tensors)
    for weight in stored.values():
        yield Item(
            name=weight.name,
            scheme=weight.scheme.name,
            dtype=name_of(weight.label),
            parameters=math.prod(weight.shape),
            # Experts may share their tensors.
            num_bytes=sum(source.info(name).nbytes // packed[name] for name in weight.tensors),
        )
    bits = config.get("bits", config.get("w_bit"))
    for name in source.names():
        if name in packed:
            continue
        info = source.info(name)
        foreign = bool(config) and not stored
        yield Item(
            name=name,
            scheme=None,
            dtype=name_of(info.label),
            parameters=_foreign_parameters(name, info.numel, bits) if foreign else info.numel,
            num_bytes=info.nbytes,
        )


def _foreign_parameters(name: str, numel: int, bits: object) -> int:
    """Original numbers in a tensor of another tool: scales, zeros and indices hold none."""
    if name.endswith(_PACKED) and isinstance(bits, int) and bits > 0:
        return numel * 32 // bits
    return 0 if name.endswith(_HELPERS) or ".weight." in name else numel
