"""A quantized checkpoint as numbers to compute with: its weights decoded, not rounded again."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.scheme import Scheme
from quantkit.source import Source
from quantkit.tensor import QuantizedTensor
from quantkit.unpacked import Unpacked


class Decoded(Unpacked):
    """`Unpacked` whose quantized weights are read in float32: who computes in it rounds nothing."""

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Scheme of every quantized weight by its checkpoint name."""
        return {name: weight.scheme for name, weight in self.stored.items()}

    def quantized(self, name: str) -> QuantizedTensor:
        """The stored numbers of a quantized weight [O, I], fresh memory that is not kept."""
        assert self.format is not None
        return self.format.unpack(self.stored[name], self.packed)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of a tensor; of a quantized weight in float32, though `info` names its own."""
        if name not in self.stored:
            return super().read_flat(name, start, stop)
        if name in self.transposed:
            whole = self.quantized(name).dequantize(torch.float32)
            return whole.t().reshape(-1)[start:stop].clone()
        if start == 0 and stop == self.info(name).numel:
            return self.quantized(name).dequantize(torch.float32).reshape(-1)
        # Read in ranges, as the output head is: its codes stay.
        tensor = self.tensor(name)
        columns = tensor.shape[1]
        first = start // columns
        rows = tensor.decode(torch.arange(first, -(-stop // columns))).reshape(-1)
        return rows[start - first * columns : stop - first * columns]


def open_decoded(source: Source, *, trust_remote_code: bool = False) -> Source | Decoded:
    """The source itself if it is not quantized, else its decoded view.

    Raises FormatError for a quantized checkpoint in an unknown format.
    """
    if "quantization_config" not in source.config:
        return source
    return Decoded.open(source, trust_remote_code=trust_remote_code)
