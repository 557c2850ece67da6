"""A quantized checkpoint read as if it had never been quantized: weights are decoded on the way.

Letters: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from quantkit import skeleton
from quantkit.format import Format, StoredWeight, format_of
from quantkit.loading import Unpacked
from quantkit.scheme import Scheme
from quantkit.source import Source
from quantkit.tensor import QuantizedTensor


class Decoded(Unpacked):
    """The names, shapes and values that a quantized checkpoint stands for.

    Reading a quantized weight holds its codes beside the result; ranges of a weight that is read in
    parts, as the output head is, are decoded from codes that stay until another weight is read.
    """

    def __init__(
        self, source: Source, fmt: Format, stored: Mapping[str, StoredWeight] | None = None
    ) -> None:
        self._format = fmt
        self.stored: Mapping[str, StoredWeight] = fmt.weights(source) if stored is None else stored
        super().__init__(source, self.stored)
        self._kept: tuple[str, QuantizedTensor] | None = None

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Scheme of every quantized weight by its checkpoint name."""
        return {name: weight.scheme for name, weight in self.stored.items()}

    def quantized(self, name: str) -> QuantizedTensor:
        """The stored numbers of a quantized weight [O, I], fresh memory."""
        return self._format.unpack(self.stored[name], self._source)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of a tensor; of a quantized weight in float32: its reader rounds once."""
        if name not in self.stored:
            return super().read_flat(name, start, stop)
        if start == 0 and stop == self.info(name).numel:
            self._kept = None
            whole = self.quantized(name).dequantize(torch.float32)
            return (whole.t() if name in self.transposed else whole).reshape(-1)
        if self._kept is None or self._kept[0] != name:
            self._kept = None
            self._kept = name, self.quantized(name)
        tensor = self._kept[1]
        columns = tensor.shape[1]
        if name in self.transposed:
            return tensor.dequantize(torch.float32).t().reshape(-1)[start:stop].clone()
        first, last = start // columns, -(-stop // columns)
        rows = tensor.decode(torch.arange(first, last)).reshape(-1)
        return rows[start - first * columns : stop - first * columns]


def open_decoded(source: Source, *, trust_remote_code: bool = False) -> Source | Decoded:
    """The source itself if it is not quantized, else its decoded view.

    Raises FormatError for a quantized checkpoint in an unknown format.
    """
    if "quantization_config" not in source.config:
        return source
    view = Decoded(source, format_of(source))
    model = skeleton.build(view, trust_remote_code=trust_remote_code, dtype=None)
    paths = [f"{path}.weight" for path, module in model.named_modules() if type(module) is Conv1D]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    held = {*paths, *(path.removeprefix(prefix) for path in paths)}
    view.transposed = frozenset(held.intersection(view.names()))
    return view
