"""An ONNX model on disk: a graph whose weights lie in a second file, read and written by range.

model.onnx        the graph (protobuf)
model.onnx.data   the weights, each at its offset
"""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.disk import disk_errors
from quantkit.errors import CheckpointError, FormatError
from quantkit.tensorfile import read_into, write_from

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

MODEL = "model.onnx"
DATA = "model.onnx.data"
DOMAIN = "com.microsoft"
# ONNX's numbers of the types that weights have here.
_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    10: torch.float16,
    16: torch.bfloat16,
}
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}
# Graphs without their weights take some MB; protobuf itself ends at 2 GiB.
_LARGEST_GRAPH = 1 << 29
_ALIGNMENT = 4096


@dataclass(frozen=True, kw_only=True)
class StoredInitializer:
    """A weight of the graph: where it lies in the data file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return math.prod(self.shape) * self.dtype.itemsize


class OnnxFile:
    """`model.onnx` of a directory, its weights left in the data file.

    Raises CheckpointError if it is missing or damaged, or if a weight reaches outside its file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / MODEL
        self.model = _parse(self.path)
        self._check_names()
        self.stored: dict[str, StoredInitializer] = {}
        size = (folder / DATA).stat().st_size if (folder / DATA).is_file() else 0
        for tensor in self.graph.initializer:
            if tensor.data_location == 1:
                self.stored[tensor.name] = self._locate(tensor, size)

    @property
    def graph(self) -> GraphProto:
        """The graph."""
        return self.model.graph

    def read(self, name: str) -> Tensor:
        """A weight in fresh memory."""
        stored = self.stored.get(name)
        if stored is None:
            raise CheckpointError(f"{self.path}: {name}: there is no such weight in {DATA}")
        buffer = torch.empty(stored.shape, dtype=stored.dtype)
        with (self.folder / DATA).open("rb", buffering=0) as file:
            if read_into(file.fileno(), buffer, stored.offset) < buffer.nbytes:
                raise CheckpointError(f"{self.folder / DATA}: {name}: the file was cut short")
        return buffer

    def _check_names(self) -> None:
        """CheckpointError if a name is no text, which protobuf hands out as bytes."""
        for node in self.graph.node:
            attributes = [found.name for found in node.attribute]
            for name in (node.name, node.op_type, *node.input, *node.output, *attributes):
                if not isinstance(name, str):
                    raise CheckpointError(f"{self.path}: a node's name is damaged: {name!a}")
        for tensor in self.graph.initializer:
            fields = [text for entry in tensor.external_data for text in (entry.key, entry.value)]
            if not all(isinstance(text, str) for text in (tensor.name, *fields)):
                raise CheckpointError(f"{self.path}: a weight's name is damaged: {tensor.name!a}")

    def _locate(self, tensor: TensorProto, size: int) -> StoredInitializer:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        where = f"{self.path}: {tensor.name}"
        if fields.get("location") != DATA:
            raise CheckpointError(f"{where}: its values are not in {DATA}, the only file read")
        dtype = _DTYPES.get(tensor.data_type)
        if dtype is None:
            raise CheckpointError(f"{where}: data type {tensor.data_type} is not read")
        try:
            offset, length = int(fields.get("offset", "0")), int(fields["length"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{where}: offset or length is no number") from error
        shape = tuple(tensor.dims)
        stored = StoredInitializer(name=tensor.name, dtype=dtype, shape=shape, offset=offset)
        if any(count < 0 for count in shape) or stored.num_bytes != length:
            raise CheckpointError(f"{where}: {length} bytes are not a {list(shape)} of {dtype}")
        if offset < 0 or offset + length > size:
            raise CheckpointError(
                f"{where}: bytes {offset} to {offset + length} of {DATA}, which has {size}; "
                "the file was cut short"
            )
        return stored


class DataWriter:
    """Writes `model.onnx` and its data file anew, weight after weight."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._position = 0
        with disk_errors(folder / DATA):
            self._descriptor = os.open(
                folder / DATA, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666
            )

    def __enter__(self) -> DataWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def put(self, name: str, tensor: Tensor) -> TensorProto:
        """The graph's entry of a weight that was just written."""
        onnx = require_onnx()
        offset = -(-self._position // _ALIGNMENT) * _ALIGNMENT
        value = tensor.contiguous()
        with disk_errors(self.folder / DATA):
            write_from(self._descriptor, value, offset)
        self._position = offset + value.nbytes
        entry = onnx.TensorProto(
            name=name, data_type=_NUMBERS[value.dtype], dims=value.shape, data_location=1
        )
        for key, number in (("offset", offset), ("length", value.nbytes)):
            entry.external_data.add(key=key, value=str(number))
        entry.external_data.add(key="location", value=DATA)
        return entry

    def finish(self, model: ModelProto) -> None:
        """Writes the graph."""
        with disk_errors(self.folder / MODEL):
            (self.folder / MODEL).write_bytes(model.SerializeToString(deterministic=True))


def attribute(node: NodeProto, name: str) -> int:
    """An integer attribute of a node; CheckpointError if it has none."""
    for found in node.attribute:
        if found.name == name:
            return int(found.i)
    raise CheckpointError(f"{node.name}: the node has no attribute {name}")


def require_onnx() -> Any:
    """The package `onnx`.  FormatError naming the extra if it is not installed."""
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise FormatError(
            "format onnx needs the packages onnx and onnxruntime-genai: "
            "pip install 'quantkit[onnx]'"
        ) from error


def _parse(path: Path) -> ModelProto:
    onnx = require_onnx()
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if path.stat().st_size > _LARGEST_GRAPH:
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes; graphs are read whose weights lie in {DATA}"
        )
    try:
        model = onnx.load_model(path, load_external_data=False)
    except Exception as error:  # protobuf's own errors differ between its versions
        raise CheckpointError(f"{path}: no ONNX model, or a damaged one: {error}") from error
    if not model.graph.node:
        raise CheckpointError(f"{path}: no ONNX model, or a damaged one: no nodes")
    return model
