"""Who reads the weights of linear layers: the layers themselves, or code around them.

A quantized layer multiplies and has no `weight`, so what others read must stay as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class _Watched(nn.Module):
    """Stands in for a linear layer: multiplies as it does, and notes if its weight is asked for."""

    def __init__(self, linear: nn.Module, path: str, read: set[str]) -> None:
        super().__init__()
        # Not registered: the weight is found through the property alone.
        self.__dict__["linear"], self.__dict__["path"], self.__dict__["read"] = linear, path, read

    @property
    def weight(self) -> Any:
        """The layer's weight, read by somebody else."""
        self.__dict__["read"].add(self.__dict__["path"])
        return self.__dict__["linear"].weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["linear"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy of the layer: copies of a watched part are plain."""
        copied: nn.Module = copy.deepcopy(self.__dict__["linear"], memo)
        return copied

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer gives."""
        product: Tensor = self.__dict__["linear"](*args, **kwargs)
        return product


@contextmanager
def watched(part: nn.Module) -> Iterator[set[str]]:
    """While active, collects the paths of weights below `part` that others than their layer read.

    Of linear layers with a matrix of their own; `part` itself is never replaced.
    """
    read: set[str] = set()
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    for path, module in part.named_modules():
        for leaf, child in module.named_children():
            if isinstance(child, (nn.Linear, Conv1D)):
                full = f"{path}.{leaf}.weight" if path else f"{leaf}.weight"
                swapped.append((module, leaf, _Watched(child, full, read)))
    originals = [(parent, leaf, parent._modules[leaf]) for parent, leaf, _ in swapped]
    for parent, leaf, stand_in in swapped:
        parent._modules[leaf] = stand_in
    try:
        yield read
    finally:
        for parent, leaf, original in originals:
            parent._modules[leaf] = original
