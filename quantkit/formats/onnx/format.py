"""The weights of an ONNX model of ours: read, not written as a format, for a graph is more.

`quantkit export --format onnx` writes them; quantkit/formats/onnx/source.py knows where they are.
"""

from __future__ import annotations

from typing import ClassVar

from quantkit.checkpoint.dtypes import label_of
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError
from quantkit.formats.format import StoredWeight
from quantkit.formats.onnx.source import METHOD, OnnxSource
from quantkit.numbers.tensor import QuantizedTensor


class OnnxWeights:
    """Integers of MatMulNBits and MatMulInteger, under the checkpoint's names."""

    name: ClassVar[str] = METHOD

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
                label=label_of(place.dtype),
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
