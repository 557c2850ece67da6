"""What is in an ONNX graph, ours or another tool's: its weights by name, and who made it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from quantkit.checkpoint.door import CONFIG_BYTES, read_json
from quantkit.checkpoint.dtypes import name_of
from quantkit.errors import CheckpointError
from quantkit.formats.contents import Contents, Item
from quantkit.formats.onnx.file import OnnxFile
from quantkit.formats.onnx.matrices import Matrix, matrices
from quantkit.formats.onnx.names import Names, read_names
from quantkit.formats.onnx.source import names_of

_GENAI = "genai_config.json"
# What the model builder computes from the configuration: no parameters of a model.
_TABLES = ("cos_cache", "sin_cache")


def describe_onnx(path: Path) -> Contents:
    """What the graph at `path` holds; reads zero points, and no other weights.

    Raises CheckpointError if it is no graph, or a damaged one.
    """
    file = OnnxFile(path)
    record = names_of(path)
    names = None if record is None else read_names(record, file)
    found = {matrix.name: matrix for matrix in matrices(file)}
    items = list(_named(file, names, found) if names is not None else _unnamed(file, found))
    used = {name for matrix in found.values() for name in matrix.tensors}
    if names is not None:
        used |= {place.initializer for place in names.kept.values()}
    items += _others(file, used, foreign=names is None)
    model_type, notes = _model_type(path, names)
    producer = f"{file.model.producer_name} {file.model.producer_version}".strip()
    if producer:
        notes.append(f"graph by {producer[:100]}")
    if names is None:
        notes.append("named after the graph's nodes: nothing tells the checkpoint's names")
    elif names.lost:
        notes.append(f"not in the graph as they were: {', '.join(names.lost[:3])}")
    versions = [entry for entry in file.model.opset_import if entry.domain == ""]
    opset = f", opset {versions[0].version}" if versions else ""
    return Contents(
        model_type=model_type,
        format=f"onnx (ir {file.model.ir_version}{opset})",
        items=tuple(items),
        home=path.parent if record is None else record.parent.parent,
        notes=tuple(notes),
    )


def _named(file: OnnxFile, names: Names, found: dict[str, Matrix]) -> Iterator[Item]:
    """The checkpoint's tensors; of a fused node each has the bytes of its rows."""
    for name, place in names.quantized.items():
        size = 0
        for part in place.parts:
            if part.node not in found:
                raise CheckpointError(f"{file.path}: {name!a}: there is no node {part.node!a}")
            matrix = found[part.node]
            size += _bytes(file, matrix) * (part.stop - part.start) // matrix.shape[0]
        yield Item(
            name=name,
            scheme=place.scheme.name,
            dtype=str(place.dtype).removeprefix("torch."),
            parameters=place.shape[0] * place.shape[1],
            num_bytes=size,
        )
    for name, kept in names.kept.items():
        stored = file.info(kept.initializer)
        numel = 1
        for count in kept.shape:
            numel *= count
        yield Item(
            name=name,
            scheme=None,
            dtype=name_of(stored.label or "None"),
            parameters=numel,
            num_bytes=stored.num_bytes * numel // max(stored.numel, 1),
        )


def _unnamed(file: OnnxFile, found: dict[str, Matrix]) -> Iterator[Item]:
    seen: set[str] = set()
    for name, matrix in found.items():
        # A tied head's weight is gathered from too.
        if matrix.tensors[0] in seen:
            continue
        seen.add(matrix.tensors[0])
        yield Item(
            name=name,
            scheme=matrix.scheme.name,
            dtype=matrix.operator,
            parameters=matrix.shape[0] * matrix.shape[1],
            num_bytes=_bytes(file, matrix),
        )


def _others(file: OnnxFile, used: set[str], *, foreign: bool) -> Iterator[Item]:
    """What is in no quantized node; without the checkpoint's names, floats count as parameters."""
    for name, stored in {**file.stored, **file.inline}.items():
        if name in used:
            continue
        floating = stored.label in ("F32", "F16", "BF16")
        counts = foreign and floating and stored.shape and name not in _TABLES
        yield Item(
            name=ascii(name)[1:-1],
            scheme=None,
            dtype=name_of(stored.label or "not read"),
            parameters=stored.numel if counts else 0,
            num_bytes=stored.num_bytes,
        )


def _bytes(file: OnnxFile, matrix: Matrix) -> int:
    return sum(file.info(name).num_bytes for name in matrix.tensors)


def _model_type(path: Path, names: Names | None) -> tuple[str, list[str]]:
    """The type of model by the config, or by the file beside the graph; and what is wrong there."""
    if names is not None:
        return str(names.config.get("model_type", "unknown")), []
    if not os.path.lexists(path.parent / _GENAI):
        return "unknown", []
    try:
        data = read_json(path.parent / _GENAI, largest=CONFIG_BYTES)
        return str(data["model"]["type"]), []
    except (CheckpointError, KeyError, TypeError) as error:
        return "unknown", [f"{_GENAI} cannot be read: {error!r}"]
