"""The calibration stream: what a block's matmuls read while quantized weights are in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quantkit.numbers.activations import fake_quantize_activation
from quantkit.numbers.scheme import Kind


class QuantizedActivations(TorchFunctionMode):
    """While active, inputs of products with the named parameters of a block are 8-bit per token.

    The same rounding that W8A8 layers apply at run time, so later blocks see its error.
    """

    def __init__(self, block: nn.Module, parameters: Mapping[str, Kind]) -> None:
        super().__init__()
        self._kinds = {
            parameter.untyped_storage().data_ptr(): parameters[path]
            for path, parameter in block.named_parameters()
            if path in parameters
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.linear and (kind := self._kind(args[1])) is not None:
            args = (fake_quantize_activation(args[0], kind), *args[1:])
        elif func is torch.addmm and (kind := self._kind(args[2])) is not None:
            args = (args[0], fake_quantize_activation(args[1], kind), args[2])
        return func(*args, **(kwargs or {}))

    def _kind(self, weight: torch.Tensor) -> Kind | None:
        """The number kind of the weight's activations; None if they stay as they are."""
        return self._kinds.get(weight.untyped_storage().data_ptr())
