"""An ONNX model on disk: a graph whose weights lie in a second file, read and written by range.

model.onnx        the graph (protobuf)
model.onnx.data   the weights, each at its offset

Graphs of others may have several such files, and small weights in the graph itself.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.disk import disk_errors, open_own
from quantkit.checkpoint.door import read_plain
from quantkit.checkpoint.dtypes import bytes_of, dtype_of, label_of, name_of
from quantkit.checkpoint.safetensors import read_into, refuse_git_lfs, write_from
from quantkit.errors import CheckpointError, FormatError
from quantkit.formats.onnx.wire import LARGEST_GRAPH, check_graph_size

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto
    from torch import Tensor

MODEL = "model.onnx"
DATA = "model.onnx.data"
DOMAIN = "com.microsoft"
# ONNX's numbers of the types that weights have here.
_DTYPES = {
    1: "F32",
    2: "U8",
    3: "I8",
    6: "I32",
    7: "I64",
    10: "F16",
    16: "BF16",
}
_NUMBERS = {label: number for number, label in _DTYPES.items()}
# Two of these in a byte, the first in the lower half; read as a byte each.
_NIBBLES = {21: "U8", 22: "I8"}
_ALIGNMENT = 4096


@dataclass(frozen=True, kw_only=True)
class StoredInitializer:
    """A weight of the graph: where it lies in a file beside it, or `file` None for the graph.

    label   dtype as it is read, as safetensors names it; None for types that are not
    nibble  two numbers are stored in each byte
    """

    name: str
    label: str | None
    shape: tuple[int, ...]
    num_bytes: int
    offset: int = 0
    file: Path | None = None
    nibble: bool = False

    @property
    def dtype(self) -> torch.dtype | None:
        """torch's dtype."""
        return None if self.label is None else dtype_of(self.label)

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class OnnxFile:
    """The graph at `path` (or the `model.onnx` of that directory), its weights left in their files.

    `stored` are the weights outside the graph, `inline` those in it.  Raises CheckpointError if it
    is missing or damaged, or if a weight reaches outside its file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / MODEL if path.is_dir() else path
        self.folder = self.path.parent
        self.model = _parse(self.path)
        self._check_names()
        self.stored: dict[str, StoredInitializer] = {}
        self.inline: dict[str, StoredInitializer] = {}
        self._values: dict[str, TensorProto] = {}
        self._sizes: dict[str, int] = {}
        for tensor in self.graph.initializer:
            if tensor.name in self.stored or tensor.name in self.inline:
                raise CheckpointError(f"{self.path}: {tensor.name!a}: the weight comes twice")
            if tensor.data_location == 1:
                self.stored[tensor.name] = self._locate(tensor)
            else:
                self.inline[tensor.name] = self._inline(tensor)
                self._values[tensor.name] = tensor

    @property
    def graph(self) -> GraphProto:
        """The graph."""
        return self.model.graph

    def find(self, name: str) -> StoredInitializer | None:
        """A weight of the graph, wherever it lies; None if there is none of this name."""
        return self.stored.get(name) or self.inline.get(name)

    def info(self, name: str) -> StoredInitializer:
        """The same; CheckpointError if there is none of this name."""
        found = self.find(name)
        if found is None:
            raise CheckpointError(f"{self.path}: {name!a}: there is no such weight in the graph")
        return found

    def read(self, name: str) -> Tensor:
        """A weight in fresh memory; 4-bit numbers one in each byte."""
        found = self.info(name)
        if found.label is None:
            raise CheckpointError(f"{self.path}: {name!a}: its data type is not read")
        if found.file is None:
            return self._read_inline(found)
        shape = (found.num_bytes,) if found.nibble else found.shape
        buffer = torch.empty(shape, dtype=torch.uint8 if found.nibble else dtype_of(found.label))
        try:
            with found.file.open("rb", buffering=0) as file:
                done = read_into(file.fileno(), buffer, found.offset)
        except OSError as error:
            raise CheckpointError(f"{found.file}: {name!a}: {error.strerror}") from error
        if done < buffer.nbytes:
            raise CheckpointError(f"{found.file}: {name!a}: the file was cut short")
        return _halves(buffer, found) if found.nibble else buffer

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

    def _locate(self, tensor: TensorProto) -> StoredInitializer:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        where = f"{self.path}: {tensor.name!a}"
        location = fields.get("location", "")
        plain = location.isprintable() and not {"/", "\\", ":"}.intersection(location)
        if not plain or location in ("", ".", "..") or len(location.encode()) > 255:
            raise CheckpointError(
                f"{where}: its values are in {location[:100]!a}; only files beside the graph are "
                "read"
            )
        file = self.folder / location
        try:
            offset, length = int(fields.get("offset", "0")), int(fields["length"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{where}: offset or length is no number") from error
        found = self._described(tensor, length, where)
        size = self._size(file)
        if offset < 0 or offset + length > size:
            raise CheckpointError(
                f"{where}: bytes {offset} to {offset + length} of {location}, which has {size}; "
                "the file was cut short"
            )
        return dataclasses.replace(found, offset=offset, file=file)

    def _size(self, file: Path) -> int:
        """Bytes of a file beside the graph, 0 if there is none."""
        if file.name not in self._sizes:
            if file.is_symlink() and file.resolve().parent != self.folder.resolve():
                raise CheckpointError(f"{file}: the link leads out of the directory; copy the file")
            self._sizes[file.name] = file.stat().st_size if file.is_file() else 0
        return self._sizes[file.name]

    def _inline(self, tensor: TensorProto) -> StoredInitializer:
        where = f"{self.path}: {tensor.name!a}"
        if tensor.HasField("raw_data"):
            return self._described(tensor, len(tensor.raw_data), where)
        typed = (tensor.float_data, tensor.double_data, tensor.int32_data, tensor.int64_data)
        count = sum(len(values) for values in (*typed, tensor.uint64_data))
        label = _DTYPES.get(tensor.data_type, "U8")
        # Two 4-bit numbers share an entry, which is a byte then.
        return self._described(tensor, count * bytes_of(label), where)

    def _described(self, tensor: TensorProto, length: int, where: str) -> StoredInitializer:
        """The weight, its bytes compared with its shape."""
        nibble = tensor.data_type in _NIBBLES
        label = _NIBBLES.get(tensor.data_type, _DTYPES.get(tensor.data_type))
        shape = tuple(tensor.dims)
        numel = math.prod(shape)
        whole = length if label is None else numel * bytes_of(label)
        expected = -(-numel // 2) if nibble else whole
        if any(count < 0 for count in shape) or length < 0 or expected != length:
            kind = name_of(label) if label else f"data type {tensor.data_type}"
            raise CheckpointError(f"{where}: {length} bytes are not a {list(shape)} of {kind}")
        return StoredInitializer(
            name=tensor.name, label=label, shape=shape, num_bytes=length, nibble=nibble
        )

    def _read_inline(self, found: StoredInitializer) -> Tensor:
        helper = importlib.import_module("onnx.numpy_helper")
        try:
            array = helper.to_array(self._values[found.name])
        # The owner's own errors, of whatever kind, for values that do not fit the shape.
        except Exception as error:
            raise CheckpointError(f"{self.path}: {found.name!a}: damaged: {error}") from error
        wide = found.label in ("F16", "BF16")
        if wide or found.nibble:
            array = array.astype("float32" if wide else name_of(found.label or ""))
        return torch.from_numpy(array.copy()).reshape(found.shape).to(found.dtype)


def _halves(raw: Tensor, found: StoredInitializer) -> Tensor:
    """Numbers of four bits, one in each byte; signed ones -8..7."""
    numbers = torch.stack([raw & 15, raw >> 4], dim=1).reshape(-1)[: found.numel]
    if found.label == "I8":
        numbers = ((numbers ^ 8).to(torch.int16) - 8).to(torch.int8)
    return numbers.reshape(found.shape)


class DataWriter:
    """Writes `model.onnx` and its data file anew, weight after weight."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._position = 0
        with disk_errors(folder / DATA):
            self._descriptor = open_own(folder / DATA, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

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
            name=name, data_type=_NUMBERS[label_of(value.dtype)], dims=value.shape, data_location=1
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
    if path.is_file() and (size := path.stat().st_size) > LARGEST_GRAPH:
        raise CheckpointError(
            f"{path}: {size} bytes; graphs of at most {LARGEST_GRAPH} are read: save it with "
            "its weights in a file beside it (onnx.save_model, save_as_external_data=True)"
        )
    data = read_plain(path, largest=LARGEST_GRAPH)
    refuse_git_lfs(path, data[:100])
    check_graph_size(path, data, onnx.ModelProto.DESCRIPTOR)
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception as error:  # protobuf's own errors differ between its versions
        raise CheckpointError(f"{path}: no ONNX model, or a damaged one: {error}") from error
    if not model.graph.node:
        raise CheckpointError(f"{path}: no ONNX model, or a damaged one: no nodes")
    return model
