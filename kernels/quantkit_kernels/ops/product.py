"""What every op is made of: its overloads, the check of x, a result without numbers, the gradient.

An op multiplies x [..., K] by a weight [N, K].  Its arguments are x, the weight's tensors, the
bias, the weight's numbers, and N.  Three are defined for a NAME:

    NAME           has a gradient for x and bias: that of x · weightᵀ + bias
    NAME_fixed     has none; calling it costs some microseconds less
    NAME_decode    the weight [N, K] in a dtype, of the same arguments without x and bias

Rounding activations has no slope worth following: ops that do it have the gradient of the product
that they stand for (Bengio et al. 2013, arXiv 1308.3432, the straight-through estimator).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.cpu.tiled import wide_dtype

# float64 runs on CPUs only, through the plain references.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Product:
    """An op.  Calling it chooses NAME or NAME_fixed by whether a gradient is asked for."""

    def __init__(
        self,
        name: str,
        *,
        tensors: str,
        numbers: str,
        columns: Callable[..., tuple[int, int]],
        dequantize: Callable[..., Tensor],
        cpu: Callable[..., Tensor] | None,
        cuda: Callable[..., Tensor] | None,
        dequantize_cuda: Callable[..., Tensor] | None = None,
    ) -> None:
        """Defines the op.

        name, tensors, numbers  of the schema: `tensors` and `numbers` are those of the weight
        columns     (padded K, multiple it is padded to) of the op's arguments but x
        dequantize  the weight, of its tensors, its numbers, (N, K) and a dtype
        cpu, cuda   the op itself; None: registered elsewhere, or not there
        """
        self._count = len(tensors.split(","))
        self._name = name
        self._columns = columns
        parts = [f"Tensor x, {tensors}", "Tensor? bias", numbers, "int out_features"]
        schema = f"({', '.join(filter(None, parts))}) -> Tensor"
        for full in (f"quantkit::{name}", f"quantkit::{name}_fixed"):
            torch.library.define(full, schema)
            torch.library.register_fake(full, self._fake)
            for key, run in (("CPU", cpu), ("CUDA", cuda)):
                if run is not None:
                    torch.library.impl(full, key, self._checked(run))
        torch.library.register_autograd(
            f"quantkit::{name}", self._backward, setup_context=self._remember
        )
        parts = [tensors, numbers, "int out_features", "int in_features", "ScalarType dtype"]
        decode = f"quantkit::{name}_decode"
        torch.library.define(decode, f"({', '.join(filter(None, parts))}) -> Tensor")
        torch.library.register_fake(decode, _empty_weight)
        for key, run in (("CPU", dequantize), ("CUDA", dequantize_cuda or dequantize)):
            torch.library.impl(decode, key, _whole(run))
        # The overloads themselves: looking them up by the arguments takes as long as a call.
        self._tracked = getattr(torch.ops.quantkit, name).default
        self._fixed = getattr(torch.ops.quantkit, f"{name}_fixed").default
        self._decode = getattr(torch.ops.quantkit, f"{name}_decode").default

    def __call__(self, x: Tensor, *arguments: Any) -> Tensor:
        """[..., N] in the dtype of x; `arguments` are the op's, from the weight's first tensor on.

        Raises ValueError if x has not the weight's columns and device, or a dtype that is no float.
        """
        if torch.is_grad_enabled():
            bias = arguments[self._count]
            if x.requires_grad or (bias is not None and bias.requires_grad):
                return self._tracked(x, *arguments)  # type: ignore[no-any-return]
        return self._fixed(x, *arguments)  # type: ignore[no-any-return]

    def _check(self, x: Tensor, *arguments: Any) -> None:
        check_input(self._name, x, arguments[0].device, *self._columns(*arguments))

    def _checked(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name, columns = self._name, self._columns

        def checked(x: Tensor, *arguments: Any) -> Tensor:
            check_input(name, x, arguments[0].device, *columns(*arguments))
            return run(x, *arguments)

        return checked

    def _fake(self, x: Tensor, *arguments: Any) -> Tensor:
        self._check(x, *arguments)
        return x.new_empty(*x.shape[:-1], arguments[-1])

    def _remember(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias = inputs[0], inputs[1 + self._count]
        ctx.save_for_backward(*inputs[1 : 1 + self._count])
        ctx.numbers = (*inputs[2 + self._count :], x.shape[-1])
        ctx.bias_dtype = None if bias is None else bias.dtype

    def _backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if ctx.needs_input_grad[0]:
            dtype = wide_dtype(grad.dtype) if grad.device.type == "cpu" else grad.dtype
            weight = self._decode(*ctx.saved_tensors, *ctx.numbers, dtype)
            gradients[0] = (grad.to(dtype) @ weight).to(grad.dtype)
        if ctx.needs_input_grad[1 + self._count]:
            rows = grad.reshape(-1, grad.shape[-1])
            wide = torch.promote_types(grad.dtype, torch.float32)
            gradients[1 + self._count] = rows.sum(0, dtype=wide).to(ctx.bias_dtype)
        return tuple(gradients)


def check_input(op: str, x: Tensor, device: torch.device, padded: int, multiple: int) -> None:
    """ValueError unless x can be multiplied by a weight of `padded` columns on `device`.

    The weight has less than `multiple` columns fewer: how many exactly its layout does not say.
    """
    found = x.shape[-1] if x.ndim else 0
    # One expression where all is well: it is evaluated in every call.
    if padded - multiple < found <= padded and x.device == device and x.dtype in _DTYPES:
        return
    if x.dtype not in _DTYPES:
        raise ValueError(f"quantkit::{op}: x is {x.dtype}; allowed: bfloat16, float16, float32")
    if x.device != device:
        raise ValueError(f"quantkit::{op}: x is on {x.device}, the weight on {device}")
    least = f"{padded - multiple + 1} to " if multiple > 1 else ""
    raise ValueError(f"quantkit::{op}: x has {found} columns, the weight {least}{padded}")


def _whole(dequantize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def decode(*arguments: Any) -> Tensor:
        *weight, rows, columns, dtype = arguments
        return dequantize(*weight, (rows, columns), dtype).contiguous()

    return decode


def _empty_weight(*arguments: Any) -> Tensor:
    packed: Tensor = arguments[0]
    rows, columns, dtype = arguments[-3:]
    return packed.new_empty(rows, columns, dtype=dtype)
