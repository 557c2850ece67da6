"""A fused 3-D parameter whose slices are quantized, for code that multiplies by it on its own.

transformers lets others run experts that keep to its ExpertsInterface.  Those that do not call
torch with slices of the parameter, or with all of it at once: what stands in its place answers
such calls by its layers, and any other with decoded values.

Letters: E slices, T tokens, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from quantkit.numbers.tensor import QuantizedTensor

_PRODUCTS = frozenset(
    {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}
)
# A slice's layers, one above the other by rows.
_Pieces = Sequence[nn.Module]


class _Answering:
    """Takes part in torch's calls without being a tensor."""

    shape: torch.Size

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        weight = args[1] if len(args) > 1 else None
        if isinstance(weight, _Answering) and not kwargs and isinstance(args[0], Tensor):
            product = weight.product(func, args[0], args[2:])
            if product is not None:
                return product
        decoded = tree_map_only(_Answering, lambda part: part.decoded(), (args, kwargs))
        return func(*decoded[0], **decoded[1])

    def product(self, func: Callable[..., Any], x: Tensor, rest: Sequence[Any]) -> Tensor | None:
        """What `func` gives on x and this weight; None if it is no product that layers know."""
        raise NotImplementedError

    def decoded(self) -> Tensor:
        """The values, in fresh memory."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("shape", "slices", "pieces", "transposed"):
            raise AttributeError(name)
        return getattr(self.decoded(), name)


class SlicedWeight(_Answering):
    """In the place of a parameter [E, O, I], or [E, I, O]: of square slices the former."""

    def __init__(self, slices: Sequence[_Pieces], shape: torch.Size) -> None:
        self.slices, self.shape = slices, shape
        rows = sum(_values(piece).shape[0] for piece in slices[0])
        self.transposed = rows != shape[1]

    def __getitem__(self, key: Any) -> Any:
        single = key.numel() == 1 and not key.dim() if isinstance(key, Tensor) else False
        if single or isinstance(key, int):
            return _Slice(self.slices[int(key)], self.shape[1:], transposed=self.transposed)
        return self.decoded()[key]

    def __len__(self) -> int:
        return self.shape[0]

    def product(self, func: Callable[..., Any], x: Tensor, rest: Sequence[Any]) -> Tensor | None:
        """[E, T, O] from x [E, T, I]."""
        if func not in _PRODUCTS or not self.transposed or x.dim() != 3 or len(x) != len(self):
            return None
        return torch.stack([_multiply(part, x[e]) for e, part in enumerate(self.slices)])

    def decoded(self) -> Tensor:
        """[E, O, I] or [E, I, O]."""
        return torch.stack([self[number].decoded() for number in range(len(self))])


class _Slice(_Answering):
    """One slice of a `SlicedWeight`: [O, I], or [I, O] if `transposed`."""

    def __init__(self, pieces: _Pieces, shape: torch.Size, *, transposed: bool) -> None:
        self.pieces, self.shape, self.transposed = pieces, shape, transposed

    def product(self, func: Callable[..., Any], x: Tensor, rest: Sequence[Any]) -> Tensor | None:
        """[..., O] from x [..., I]."""
        if func is nn.functional.linear and not self.transposed:
            y = _multiply(self.pieces, x)
            return y if not rest or rest[0] is None else y + rest[0]
        return _multiply(self.pieces, x) if func in _PRODUCTS and self.transposed else None

    def decoded(self) -> Tensor:
        """[O, I] or [I, O]."""
        whole = torch.cat([_values(piece) for piece in self.pieces])
        return whole.t().contiguous() if self.transposed else whole

    def t(self) -> _Slice:
        """The slice the other way round."""
        return _Slice(self.pieces, self.shape[::-1], transposed=not self.transposed)

    @property
    def T(self) -> _Slice:
        """As `t`."""
        return self.t()


def _multiply(pieces: _Pieces, x: Tensor) -> Tensor:
    parts = [piece(x) for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _values(piece: nn.Module) -> Tensor:
    tensor = getattr(piece, "quantized_tensor", None)
    if isinstance(tensor, QuantizedTensor):
        return tensor.dequantize(getattr(piece, "activation_dtype", None))
    assert isinstance(piece, nn.Linear)
    return piece.weight.detach()
