"""ONNX as a format: what its operators hold, and the weights of a graph of ours.

A graph is more than weights: the model builder of onnxruntime-genai makes it of a finished
checkpoint (quantkit/pipeline/onnx_export.py).  Until then weights lie as compressed-tensors has
them; in the graph, quantkit/formats/onnx/source.py knows where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.dtypes import label_of
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.formats.format import PlannedWeight, StoredWeight
from quantkit.formats.onnx import nbits
from quantkit.formats.onnx.source import METHOD, OnnxSource
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.checkpoint.dtypes import Dtype

READERS: Mapping[str, str | None] = {"onnxruntime": None, "onnxruntime-genai": None}


class Onnx:
    """A graph for ONNX Runtime: integers of MatMulNBits and MatMulInteger, made by a builder."""

    name: ClassVar[str] = METHOD
    holds_permuted: ClassVar[bool] = False
    built_by: ClassVar[str] = "the model builder of onnxruntime-genai"

    def __init__(self) -> None:
        self._till_then = CompressedTensors()

    def supports(self, scheme: Scheme) -> str | None:
        """None if an operator of ONNX Runtime holds the scheme exactly, else why not."""
        if scheme.centered:
            return None
        if (reason := nbits.holds(scheme)) is not None:
            return (
                f"{reason}; it holds weight-only integers of 2 to 8 bits in groups divisible by 16 "
                "or in rows, and w8a8_row"
            )
        return self._till_then.supports(scheme)

    def supports_shape(self, weight: PlannedWeight) -> str | None:
        """None if a weight of this shape can be held under its scheme, else why not."""
        return self._till_then.supports_shape(weight)

    def supports_together(self, weights: Sequence[PlannedWeight]) -> str | None:
        """None: each product has an operator of its own."""
        return self._till_then.supports_together(weights)

    def readers(
        self, weights: Sequence[PlannedWeight], model_type: str
    ) -> Mapping[str, str | None]:
        """ONNX Runtime; which types of models the builder knows it tells when it runs."""
        return READERS

    def layout(self, weight: PlannedWeight, dtype: Dtype) -> tuple[TensorInfo, ...]:
        """The tensors of the checkpoint that the graph is made of."""
        return self._till_then.layout(weight, dtype)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """As the checkpoint has them: the graph's float32 holds all of those."""
        return self._till_then.scale_dtype(dtype)

    def represent(self, tensor: QuantizedTensor) -> tuple[QuantizedTensor, str | None]:
        """The tensor itself: nothing is rounded."""
        return self._till_then.represent(tensor)

    def pack(self, weight: PlannedWeight, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors of the checkpoint that the graph is made of."""
        return self._till_then.pack(weight, tensor)

    def config(
        self,
        weights: Sequence[PlannedWeight],
        *,
        model_type: str,
        dtype: torch.dtype,
        others: Sequence[TensorInfo] = (),
    ) -> dict[str, Any]:
        """The `quantization_config` of that checkpoint."""
        return self._till_then.config(weights, model_type=model_type, dtype=dtype, others=others)

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """Weight name -> how it is stored, for every quantized weight of a graph."""
        graph = _graph(source)
        found = {}
        for name in graph.quantized_names:
            place = graph.place(name)
            found[name] = StoredWeight(
                name=name,
                scheme=place.scheme,
                shape=place.shape,
                label=label_of(place.dtype),
                tensors=(name,),
            )
        return found

    def unpack(self, weight: StoredWeight, source: Source) -> QuantizedTensor:
        """The numbers that the graph was made of."""
        return _graph(source).quantized(weight.name)


def _graph(source: Source) -> OnnxSource:
    if not isinstance(source, OnnxSource):
        raise CheckpointError(
            f"quantization_config: quant_method {METHOD!r} belongs to an ONNX file, not to a "
            "directory of safetensors"
        )
    return source
