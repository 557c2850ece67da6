"""The calibration stream: what a block's matmuls read while quantized weights are in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quantkit.numbers.activations import InputRounding


class QuantizedActivations(TorchFunctionMode):
    """While active, inputs of products with the named parameters of a block are rounded.

    As their layers do at run time, so that later blocks see the error.
    """

    def __init__(self, block: nn.Module, parameters: Mapping[str, InputRounding]) -> None:
        super().__init__()
        self._roundings = {
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
        if func is nn.functional.linear and (rounding := self._of(args[1])) is not None:
            args = (rounding(args[0]), *args[1:])
        elif func is torch.addmm and (rounding := self._of(args[2])) is not None:
            args = (args[0], rounding(args[1]), args[2])
        return func(*args, **(kwargs or {}))

    def _of(self, weight: torch.Tensor) -> InputRounding | None:
        """What happens to the weight's input; None if it stays as it is."""
        return self._roundings.get(weight.untyped_storage().data_ptr())
