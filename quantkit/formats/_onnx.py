"""The weights of an ONNX model of ours: read, not written as a format, for a graph is more.

`quantkit export --format onnx` writes them; quantkit/onnx_source.py knows where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantkit.errors import CheckpointError, FormatError
from quantkit.format import PlannedWeight, StoredWeight
from quantkit.onnx_source import METHOD, OnnxSource
from quantkit.scheme import Scheme
from quantkit.source import Source
from quantkit.tensor import QuantizedTensor
from quantkit.tensorfile import TensorInfo

_READ_ONLY = "it is written by `quantkit export --format onnx` alone"


class OnnxWeights:
    """Integers of MatMulNBits and MatMulInteger, under the checkpoint's names."""

    name: ClassVar[str] = METHOD
    holds_permuted: ClassVar[bool] = False

    def supports(self, scheme: Scheme) -> str | None:
        """Always why not: nothing is written so."""
        return _READ_ONLY

    def supports_shape(self, weight: PlannedWeight) -> str | None:
        """Always why not."""
        return _READ_ONLY

    def supports_together(self, weights: Sequence[PlannedWeight]) -> str | None:
        """Always why not."""
        return _READ_ONLY

    def readers(
        self, weights: Sequence[PlannedWeight], model_type: str
    ) -> Mapping[str, str | None]:
        """No runtime: nothing is written so."""
        return {}

    def layout(self, weight: PlannedWeight, dtype: torch.dtype) -> tuple[TensorInfo, ...]:
        """Raises FormatError."""
        raise FormatError(f"{weight.name}: onnx: {_READ_ONLY}")

    def represent(self, tensor: QuantizedTensor) -> tuple[QuantizedTensor, str | None]:
        """Raises FormatError."""
        raise FormatError(f"onnx: {_READ_ONLY}")

    def pack(self, weight: PlannedWeight, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Raises FormatError."""
        raise FormatError(f"{weight.name}: onnx: {_READ_ONLY}")

    def config(
        self,
        weights: Sequence[PlannedWeight],
        *,
        model_type: str,
        dtype: torch.dtype,
        others: Sequence[TensorInfo] = (),
    ) -> dict[str, Any]:
        """Raises FormatError."""
        raise FormatError(f"onnx: {_READ_ONLY}")

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """Weight name -> how it is stored, for every quantized weight of the graph."""
        graph = _graph(source)
        found = {}
        for name in graph.quantized_names:
            place = graph.place(name)
            found[name] = StoredWeight(
                name=name,
                scheme=place.scheme,
                shape=place.shape,
                dtype=place.dtype,
                tensors=(name,),
            )
        return found

    def unpack(self, weight: StoredWeight, source: Source) -> QuantizedTensor:
        """The numbers that were exported."""
        return _graph(source).quantized(weight.name)


def _graph(source: Source) -> OnnxSource:
    if not isinstance(source, OnnxSource):
        raise CheckpointError(
            f"quantization_config: quant_method {METHOD!r} belongs to an ONNX file, not to a "
            "directory of safetensors"
        )
    return source
