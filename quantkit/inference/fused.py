"""Projections that read the same input, multiplied at once: q/k/v, and gate with up.

One product is one launch instead of three and fills a GPU better.  The model keeps its modules:
each projection hands out its rows of the shared product.  Shapes: O out features of all parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from quantkit.inference.layers import QuantLinear
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

# What attention and gated layers call projections of one input.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class SharedProduct(nn.Module):
    """A stacked weight whose product is computed for the first part asked for and kept for others.

    A part is handed out once for each input; the next time, or for another tensor, all are computed
    again.  So the result is that of separate layers, unless a caller changes x in place between
    one projection and the next.
    """

    def __init__(self, stacked: QuantLinear, rows: Sequence[int]) -> None:
        super().__init__()
        self.stacked = stacked
        self.rows = tuple(rows)
        self._pending: tuple[Tensor, tuple[Tensor | None, ...]] | None = None

    def part(self, x: Tensor, index: int) -> Tensor:
        """The product's rows of one part: a view, whose rows lie as far apart as those of all."""
        pending = self._pending
        if pending is None or pending[0] is not x or pending[1][index] is None:
            pending = (x, self.stacked(x).split(self.rows, dim=-1))
        found = pending[1][index]
        assert found is not None
        left = tuple(None if n == index else part for n, part in enumerate(pending[1]))
        self._pending = (x, left) if any(part is not None for part in left) else None
        return found

    def span(self, index: int) -> slice:
        """The rows of one part."""
        ends = list(accumulate(self.rows))
        return slice(ends[index] - self.rows[index], ends[index])

    def __getstate__(self) -> dict[str, object]:
        # A copy starts with nothing kept.
        return {**self.__dict__, "_pending": None}


class FusedLinear(nn.Module):
    """One projection of a shared product, in the place of its QuantLinear."""

    def __init__(self, shared: SharedProduct, index: int) -> None:
        super().__init__()
        self.shared = shared
        self.index = index
        self.in_features = shared.stacked.in_features
        self.out_features = shared.rows[index]
        self.scheme: Scheme = shared.stacked.scheme

    @property
    def bias(self) -> Tensor | None:
        """This part's bias, in memory of its own."""
        whole = self.shared.stacked.bias
        return None if whole is None else whole.detach()[self.shared.span(self.index)].clone()

    @property
    def weight(self) -> Tensor:
        """As `QuantLinear.weight`: a shape, a dtype and a device."""
        return self.shared.stacked.weight[self.shared.span(self.index)]

    @property
    def quantized_tensor(self) -> QuantizedTensor:
        """The tensor this part was made of, bit for bit; unpacks the codes into fresh memory."""
        whole, rows = self.shared.stacked.quantized_tensor, self.shared.span(self.index)
        assert isinstance(whole.scale, PlainScale)
        return dataclasses.replace(
            whole,
            codes=whole.codes[rows].clone(),
            scale=PlainScale(tensor=whole.scale.tensor[rows].clone()),
            zero=None if whole.zero is None else whole.zero[rows].clone(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> this part's [..., O] in the dtype of x."""
        return self.shared.part(x, self.index)

    def extra_repr(self) -> str:
        """Shapes and scheme, as nn.Linear prints them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme.name}, part={self.index}"
        )


def fuse_(model: nn.Module) -> int:
    """Puts FusedLinear where projections share an input and a scheme; how many products are left.

    Others stay as they are: of different schemes or dtypes, with nested scales, blocks that
    straddle rows, or a bias in some only.
    """
    count = 0
    for parent in list(model.modules()):
        for names in TOGETHER:
            children = [getattr(parent, name, None) for name in names]
            layers = [child for child in children if isinstance(child, QuantLinear)]
            if len(layers) < len(names):
                continue
            shared = _stack(layers)
            if shared is None:
                continue
            for index, name in enumerate(names):
                setattr(parent, name, FusedLinear(shared, index))
            count += 1
    return count


def _stack(layers: Sequence[QuantLinear]) -> SharedProduct | None:
    """The layers as one, or None if they cannot be."""
    first = layers[0]
    tensors = [layer.quantized_tensor for layer in layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if len(biases) not in (0, len(layers)):
        return None
    if not all(_alike(tensors[0], tensor) for tensor in tensors):
        return None
    scales = [tensor.scale.tensor for tensor in tensors if isinstance(tensor.scale, PlainScale)]
    zeros = [tensor.zero for tensor in tensors if tensor.zero is not None]
    whole = dataclasses.replace(
        tensors[0],
        codes=torch.cat([tensor.codes for tensor in tensors]),
        scale=PlainScale(tensor=torch.cat(scales)),
        zero=torch.cat(zeros) if zeros else None,
    )
    bias = torch.cat([bias.detach() for bias in biases]) if biases else None
    stacked = QuantLinear(whole, bias, backend=first.backend, dtype=first.activation_dtype)
    return SharedProduct(stacked, [layer.out_features for layer in layers])


def _alike(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    plain = isinstance(one.scale, PlainScale) and isinstance(other.scale, PlainScale)
    if not plain or one.scale.values().ndim != 2 or other.scale.values().ndim != 2:
        return False
    # Parts with orders of their own would want the input in each of them.
    if one.columns is None or other.columns is None:
        ordered = one.columns is other.columns
    else:
        ordered = torch.equal(one.columns, other.columns)
    kind, wanted = ((part.scheme, part.dtype, part.shape[1]) for part in (one, other))
    return ordered and kind == wanted
