"""A model of a Triton Inference Server repository: the configuration beside a version's graph.

REPOSITORY/NAME/config.pbtxt
REPOSITORY/NAME/1/model.onnx and the files around it
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import FormatError
from quantkit.formats.onnx.file import MODEL, OnnxFile

if TYPE_CHECKING:
    from onnx import ValueInfoProto

# ONNX's types -> those of the server's model_config.proto.
_TYPES = {1: "TYPE_FP32", 6: "TYPE_INT32", 7: "TYPE_INT64", 10: "TYPE_FP16", 16: "TYPE_BF16"}


def model_config(version: Path, *, name: str) -> str:
    """The text of config.pbtxt for the graph in a version's directory.

    max_batch_size is 0: the batch is an axis of the graph's own, as its cache has one too.
    """
    graph = OnnxFile(version).graph
    lines = [
        f'name: "{_checked(name)}"',
        'backend: "onnxruntime"',
        f'default_model_filename: "{MODEL}"',
        "max_batch_size: 0",
    ]
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            lines += [f"{kind} {{", *(f"  {line}" for line in _tensor(value)), "}"]
    lines += ["instance_group {", "  kind: KIND_CPU", "  count: 1", "}"]
    return "\n".join(lines) + "\n"


def _tensor(value: ValueInfoProto) -> list[str]:
    found = value.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in found.shape.dim]
    if found.elem_type not in _TYPES:
        raise FormatError(f"{value.name}: data type {found.elem_type} is not served")
    return [
        f'name: "{_checked(value.name)}"',
        f"data_type: {_TYPES[found.elem_type]}",
        f"dims: [ {', '.join(str(dim) for dim in dims)} ]",
    ]


def _checked(name: str) -> str:
    """The name; FormatError if it cannot stand between quotes."""
    if not name.isprintable() or '"' in name or "\\" in name:
        raise FormatError(f"{name!a}: a model of the server cannot have this name; choose another")
    return name
