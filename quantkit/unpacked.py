"""A quantized checkpoint read as if it were not: its weights decoded when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from quantkit import skeleton
from quantkit.checkpoint import FileSource
from quantkit.format import Format, StoredWeight, format_of
from quantkit.source import Reader, Source
from quantkit.tensor import QuantizedTensor
from quantkit.tensorfile import TensorInfo


class Unpacked(Reader):
    """A checkpoint under the names, shapes and dtypes it had before it was quantized.

    `transposed` names the weights whose unquantized storage is [I, O].  Holds the codes of the
    weight read last, so that a head read in ranges of rows is unpacked once.
    """

    def __init__(
        self, source: Source, fmt: Format | None, stored: Mapping[str, StoredWeight]
    ) -> None:
        self.packed = source
        self.format = fmt
        self.stored = stored
        self.transposed: frozenset[str] = frozenset()
        if isinstance(source, FileSource):
            self.path = source.path
        packed = {name for weight in stored.values() for name in weight.tensors}
        self._names = tuple(sorted({*source.names(), *stored} - (packed - set(stored))))
        self._last: tuple[str, QuantizedTensor] | None = None

    @classmethod
    def open(cls, source: Source, *, trust_remote_code: bool = False) -> Self:
        """The view of a quantized checkpoint.  FormatError if its format is not known."""
        fmt = format_of(source)
        view = cls(source, fmt, fmt.weights(source))
        model = skeleton.build(view, trust_remote_code=trust_remote_code, dtype=None)
        view.transposed = skeleton.conv1d_names(model, view.names())
        return view

    @property
    def config(self) -> dict[str, Any]:
        """The config without `quantization_config`."""
        return {k: v for k, v in self.packed.config.items() if k != "quantization_config"}

    def names(self) -> tuple[str, ...]:
        """Names as before quantization, sorted."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape as before quantization."""
        weight = self.stored.get(name)
        if weight is None:
            return self.packed.info(name)
        shape = weight.shape[::-1] if name in self.transposed else weight.shape
        return TensorInfo(name=name, dtype=weight.dtype, shape=shape)

    def tensor(self, name: str) -> QuantizedTensor:
        """A quantized weight, not decoded."""
        assert self.format is not None
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self.format.unpack(self.stored[name], self.packed)
        return self._last[1]

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened tensor; a quantized one's rows are decoded."""
        if name not in self.stored:
            return self.packed.read_flat(name, start, stop)
        tensor = self.tensor(name)
        if not 0 <= start <= stop <= tensor.codes.numel():
            raise IndexError(f"{name}: elements {start}..{stop} of {tensor.codes.numel()}")
        if name in self.transposed:
            return tensor.dequantize().t().reshape(-1)[start:stop].clone()
        columns = tensor.shape[1]
        first, last = start // columns, -(-stop // columns)
        if last - first == tensor.shape[0]:
            values = tensor.dequantize()
        else:
            values = tensor.decode(torch.arange(first, last)).to(tensor.dtype)
        return values.reshape(-1)[start - first * columns : stop - first * columns].clone()

    def side_files(self) -> dict[str, Path | bytes]:
        """The source's."""
        return self.packed.side_files()

    def _config_bytes(self) -> bytes:
        return json.dumps(self.packed.config, sort_keys=True).encode()
