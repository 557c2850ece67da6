"""An ONNX model of ours as a checkpoint: transformers' names and shapes, codes as they were.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.dtypes import label_of
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.sidefiles import SideFiles, find_side_files
from quantkit.checkpoint.source import Reader
from quantkit.errors import CheckpointError
from quantkit.formats.onnx.file import OnnxFile
from quantkit.formats.onnx.matrices import Matrix, matrices, read_nbits, tensor_of
from quantkit.formats.onnx.names import NAMES, Names, QuantizedPlace, read_names
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "onnx"


class OnnxSource(Reader):
    """A graph that `quantkit export --format onnx` wrote, with the names beside it.

    Opening reads the graph and no weights.  Quantized weights are in their original dtype to
    whoever reads them; `quantized` gives their numbers.  Raises CheckpointError for damage, and for
    graphs of other tools, which say nothing of a checkpoint's tensors: `inspect` describes those.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file = OnnxFile(self.path)
        record = names_of(self.path)
        if record is None:
            raise CheckpointError(
                f"{self.path}: there is no {NAMES} that tells which tensor is which: quantkit "
                "loads models that its own `export --format onnx` wrote (export it again if it was "
                "an older one); graphs of other tools can be looked at with `quantkit inspect`"
            )
        self.names_file = record
        self._names: Names = read_names(record, self.file)
        self._matrices: dict[str, Matrix] = {matrix.name: matrix for matrix in matrices(self.file)}
        for name, place in self._names.quantized.items():
            self._check(name, place)
        self._last: tuple[str, QuantizedTensor] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json, marked as quantized by `quant_method` "onnx"."""
        copied: dict[str, Any] = json.loads(json.dumps(dict(self._names.config)))
        return {**copied, "quantization_config": {"quant_method": METHOD}}

    @property
    def home(self) -> Path:
        """The directory of the names; of a Triton model it is above the graph's."""
        return self.names_file.parent.parent

    @property
    def quantized_names(self) -> tuple[str, ...]:
        """Names of the quantized weights."""
        return tuple(self._names.quantized)

    def place(self, name: str) -> QuantizedPlace:
        """Where a quantized weight is, with its scheme, shape and dtype."""
        return self._names.quantized[name]

    @property
    def address(self) -> str:
        """The file."""
        return str(self.path)

    def names(self) -> tuple[str, ...]:
        """Names as the checkpoint had them, sorted."""
        return tuple(sorted((*self._names.quantized, *self._names.kept)))

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape as in the checkpoint before it was quantized."""
        place = self._names.quantized.get(name) or self._names.kept.get(name)
        if place is None:
            lost = name in self._names.lost
            raise CheckpointError(
                f"{self.path}: {name}: "
                + ("the graph does not hold it as it was" if lost else "there is no such tensor")
            )
        return TensorInfo(name=name, dtype=place.dtype, shape=place.shape)

    def quantized(self, name: str) -> QuantizedTensor:
        """The numbers of a quantized weight [O, I], the very ones of the checkpoint."""
        place = self._names.quantized[name]
        parts = []
        for part in place.parts:
            whole = self._whole(part.node, place)
            rows = slice(part.row, part.row + part.stop - part.start)
            parts.append((whole.codes[rows], whole.scale.values()[rows], whole.zero, rows))
        zeros = [zero[rows] for _, _, zero, rows in parts if zero is not None]
        return QuantizedTensor(
            codes=torch.cat([codes for codes, *_ in parts]),
            scale=PlainScale(
                tensor=torch.cat([scale for _, scale, *_ in parts]).to(place.scale_dtype)
            ),
            zero=torch.cat(zeros) if zeros else None,
            scheme=place.scheme,
            dtype=place.dtype,
        )

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened tensor, decoded; fresh memory."""
        info = self.info(name)
        if not 0 <= start <= stop <= info.numel:
            raise IndexError(f"{name}: elements {start}..{stop} of {info.numel}")
        if name in self._names.quantized:
            whole = self.quantized(name).dequantize()
        else:
            whole = self._names.kept[name].read(self.file)
        return whole.reshape(-1)[start:stop].clone()

    def side_files(self) -> dict[str, Path | bytes]:
        """The tokenizer and what else lies beside the graph."""
        return dict(self._beside().carried)

    def left_files(self) -> dict[str, str]:
        """What of it is no side file, and why."""
        return dict(self._beside().left)

    def _beside(self) -> SideFiles:
        return find_side_files(self.path.parent, {self.path.name, f"{self.path.name}.data"})

    def _config_bytes(self) -> bytes:
        return json.dumps(self.config, sort_keys=True).encode()

    def _check(self, name: str, place: QuantizedPlace) -> None:
        for part in place.parts:
            matrix = self._matrices.get(part.node)
            if matrix is None:
                raise CheckpointError(f"{self.path}: {name!a}: there is no node {part.node!a}")
            rows, columns = matrix.shape
            if part.row + part.stop - part.start > rows or columns != place.shape[1]:
                raise CheckpointError(
                    f"{self.path}: {name!a}: {list(place.shape)} is not in {part.node!a}, which is "
                    f"{list(matrix.shape)}"
                )

    def _whole(self, node: str, place: QuantizedPlace) -> QuantizedTensor:
        """A node's matrix under the scheme of a weight in it; fused ones are read once."""
        if self._last is None or self._last[0] != node or self._last[1].scheme != place.scheme:
            self._last = None
            matrix = self._matrices[node]
            if matrix.operator == "MatMulNBits":
                whole = tensor_of(
                    node,
                    read_nbits(self.file, matrix.node),
                    place.scheme,
                    label=label_of(place.dtype),
                    scale_label=label_of(place.scale_dtype),
                )
            else:
                whole = matrix.read(self.file)
                if whole.scheme != place.scheme:
                    raise CheckpointError(
                        f"{self.path}: {node!a} is {whole.scheme.name}, {NAMES} says "
                        f"{place.scheme.name}"
                    )
            self._last = node, whole
        return self._last[1]


def names_of(graph: Path) -> Path | None:
    """The names.json that belongs to a graph; of a Triton model it is a directory above."""
    for folder in (graph.parent, graph.parent.parent):
        if (folder / NAMES).is_file():
            return folder / NAMES
    return None
