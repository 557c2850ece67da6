"""Quantized weights in the layouts of `quantkit_kernels`, and back again bit for bit.

Shapes: O out features, I in features, G groups per row.
"""

from __future__ import annotations

from typing import Any

import torch
from quantkit_kernels.ops import e2m1, fp8a8, fp8a16, int8_dot, nf4, w4a16, w8a8, w8a16
from quantkit_kernels.ops.device import Device
from torch import Tensor

from quantkit.errors import BackendError
from quantkit.inference.packed_kernel import PackedKernel, per_row
from quantkit.numbers.activations import fake_quantize_activation
from quantkit.numbers.grid import CodebookGrid, grid_of
from quantkit.numbers.superblock import BlockScale
from quantkit.numbers.tensor import (
    DividedScale,
    NestedScale,
    PlainScale,
    QuantizedTensor,
)


class Int4Kernel(PackedKernel):
    """4-bit integer weights on `quantkit::w4a16`."""

    packed: Tensor
    kernel_scale: Tensor
    kernel_zero: Tensor | None

    def __init__(self, tensor: QuantizedTensor, device: Device) -> None:
        super().__init__(tensor, device)
        weight = w4a16.pack(
            tensor.codes,
            tensor.scale.values(),
            tensor.zero,
            tensor.scheme.group_size,
            device,
            minimum_NG=tensor.minima,
        )
        self.group_size = weight.group_size
        self.register_buffer("packed", weight.packed)
        self.register_buffer("kernel_scale", weight.scale)
        self.register_buffer("kernel_zero", weight.zero)
        self.forget_copies_()

    def kernel_scales(self) -> Tensor | None:
        """The scales [O, G]; those of CPUs are rounded, and their zero points are in them."""
        if self.device_kind == "cpu":
            return None
        return per_row(self.kernel_scale, self.shape, self.group_size)

    def kernel_zeros(self) -> Tensor | None:
        """The zero points [O, G] beside them."""
        zero = self._buffers["kernel_zero"]
        return None if zero is None else per_row(zero, self.shape, self.group_size)

    @staticmethod
    def supported(tensor: QuantizedTensor, dtype: torch.dtype, device: Device) -> str | None:
        """Why the op cannot multiply x of `dtype` by this weight, or None."""
        if device != "cpu" and tensor.minima is not None:
            return f"{tensor.scheme.name}: blocks with minima have no kernel for GPUs"
        return w4a16.supported(
            bits=tensor.scheme.bits,
            group_size=tensor.scheme.group_size,
            dtype=dtype,
            device=device,
        )

    def codes(self) -> Tensor:
        """Codes uint8 [O, I] in fresh memory."""
        return w4a16.unpack(self.packed, self.shape)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with x, whose columns are in the order of the codes."""
        return w4a16.product(
            x,
            self.packed,
            self.kernel_scale,
            self.kernel_zero,
            bias,
            self.group_size,
            self.shape[0],
        )


class Int4ActivationKernel(Int4Kernel):
    """4-bit integer weights and int8 activations: x is rounded by token, then `quantkit::w4a16`."""

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with x rounded to 8 bits, once more to its dtype."""
        rounded = fake_quantize_activation(x.detach(), self.scheme)
        if x.requires_grad and torch.is_grad_enabled():
            # Rounding has no slope to follow.
            rounded = x + (rounded - x.detach())
        return super().multiply(rounded, bias)


class Int8Kernel(PackedKernel):
    """8-bit integer weights on `quantkit::w8a16`."""

    packed: Tensor
    kernel_scale: Tensor

    def __init__(self, tensor: QuantizedTensor, device: Device) -> None:
        super().__init__(tensor, device)
        weight = w8a16.pack(tensor.codes, tensor.scale.values(), tensor.scheme.group_size, device)
        self.group_size = weight.group_size
        self.decodes_always = weight.group_size > 0
        self.register_buffer("packed", weight.packed)
        self.register_buffer("kernel_scale", weight.scale)
        self.forget_copies_()

    def kernel_scales(self) -> Tensor | None:
        """The scales [O, G]; those of CPUs are rounded per row."""
        if self.device_kind == "cpu":
            return self.kernel_scale if self.group_size else None
        return per_row(self.kernel_scale, self.shape, self.group_size)

    @staticmethod
    def supported(tensor: QuantizedTensor, dtype: torch.dtype, device: Device) -> str | None:
        """Why the op cannot multiply x of `dtype` by this weight, or None."""
        return w8a16.supported(
            symmetric=tensor.scheme.symmetric,
            group_size=tensor.scheme.group_size,
            dtype=dtype,
            device=device,
        )

    def codes(self) -> Tensor:
        """Codes uint8 [O, I] in fresh memory."""
        return w8a16.unpack(self.packed, self.shape)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with x, whose columns are in the order of the codes."""
        return w8a16.product(
            x, self.packed, self.kernel_scale, bias, self.group_size, self.shape[0]
        )


class RoundedInputKernel(PackedKernel):
    """Every scheme on `quantkit::int8_dot`, which rounds activations to int8 in blocks of 32.

    Those of W8A8 and of FP8 too, instead of one scale per token.
    """

    packed: Tensor
    kernel_scale: Tensor
    kernel_zero: Tensor | None
    table: Tensor | None
    offset: Tensor | None

    def __init__(self, tensor: QuantizedTensor, device: Device) -> None:
        super().__init__(tensor, device)
        scheme, scale = tensor.scheme, tensor.scale.values()
        offset = tensor.minima
        if scheme.kind in ("int", "ggml"):
            if offset is not None:
                # The op takes codes around their middle: smaller sums, which round less.
                offset = offset + scale * 2 ** (scheme.bits - 1)
            group, bits = scheme.group_size, scheme.bits
            weight = int8_dot.pack(tensor.codes, scale, tensor.zero, group, bits)
        elif scheme.kind in ("fp8", "mxfp8"):
            weight = int8_dot.pack_floats(tensor.codes, scale, scheme.group_size)
        else:
            grid = grid_of(scheme)
            assert isinstance(grid, CodebookGrid) and scheme.group_size is not None
            per_row = scale.view(tensor.shape[0], -1)
            weight = int8_dot.pack_codebook(tensor.codes, per_row, grid.values, scheme.group_size)
        self.stored_bits = weight.bits
        self.floats = weight.floats
        self.group_size = weight.group_size
        self.register_buffer("packed", weight.packed)
        self.register_buffer("kernel_scale", weight.scale)
        self.register_buffer("kernel_zero", weight.zero)
        self.register_buffer("table", weight.table)
        # What is added to the weights of each group [O, G] of a block type with minima.
        self.register_buffer("offset", offset)
        self.forget_copies_()

    def kernel_scales(self) -> Tensor | None:
        """The scales [O, G] of integers; those of other numbers are in other units."""
        if self.scheme.kind != "int":
            return None
        return int8_dot.by_row(self.kernel_scale, self.shape[0])

    def kernel_zeros(self) -> Tensor | None:
        """The zero points [O, G]."""
        zero = self._buffers["kernel_zero"]
        return None if zero is None else int8_dot.by_row(zero, self.shape[0])

    @staticmethod
    def supported(tensor: QuantizedTensor, dtype: torch.dtype, device: Device) -> str | None:
        """Why the op cannot multiply x of `dtype` by this weight, or None."""
        scheme = tensor.scheme
        if device != "cpu":
            return "activations are rounded to int8 on CPUs only"
        if scheme.flat and tensor.shape[1] % (scheme.group_size or 1):
            return f"{tensor.shape[1]} columns: blocks of {scheme.group_size} straddle the rows"
        if scheme.static_input:
            return f"the input of {scheme.name} has a scale of its own"
        return int8_dot.supported(bits=scheme.bits, group_size=scheme.group_size, dtype=dtype)

    def codes(self) -> Tensor:
        """Codes uint8 [O, I] in fresh memory."""
        return int8_dot.unpack(self.packed, self.shape)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with x, whose columns are in the order of the codes."""
        weight = (self.packed, self.kernel_scale, self.kernel_zero, self.table)
        numbers = (self.stored_bits, self.floats, self.group_size)
        if self.offset is None:
            return int8_dot.product(x, *weight, bias, *numbers, self.shape[0])
        wide = x.to(torch.float32)
        out = int8_dot.product(wide, *weight, bias, *numbers, self.shape[0])
        sums = wide.unflatten(-1, (-1, self.group_size)).sum(-1)
        return (out + torch.nn.functional.linear(sums, self.offset)).to(x.dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Another process may not have built the op, or cannot.
        if reason := int8_dot.unavailable():
            raise BackendError(f"backend cpu-int8: {reason}; load it with auto, cpu or reference")
        super().__setstate__(state)


class Int8ActivationKernel(PackedKernel):
    """8-bit integer weights and activations on `quantkit::w8a8`."""

    packed: Tensor
    kernel_scale: Tensor

    def __init__(self, tensor: QuantizedTensor, device: Device) -> None:
        super().__init__(tensor, device)
        packed, scale = w8a8.pack(tensor.codes, tensor.scale.values().view(-1))
        self.register_buffer("packed", packed)
        self.register_buffer("kernel_scale", scale)

    @staticmethod
    def supported(tensor: QuantizedTensor, dtype: torch.dtype, device: Device) -> str | None:
        """Why the op cannot multiply x of `dtype` by this weight, or None."""
        return w8a8.supported(dtype=dtype, device=device)

    def codes(self) -> Tensor:
        """Codes uint8 [O, I] in fresh memory."""
        return w8a8.unpack(self.packed, self.shape)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with x, whose columns are in the order of the codes."""
        return w8a8.product(x, self.packed, self.kernel_scale, bias, self.shape[0])


class Float8Kernel(PackedKernel):
    """e4m3 weights on `quantkit::fp8a16`."""

    decodes_always = True
    packed: Tensor
    kernel_scale: Tensor

    def __init__(self, tensor: QuantizedTensor, device: Device) -> None:
        super().__init__(tensor, device)
        weight = fp8a16.pack(tensor.codes, tensor.scale.values(), tensor.scheme.group_size, device)
        self.group_size = weight.group_size
        self.register_buffer("packed", weight.packed)
        self.register_buffer("kernel_scale", weight.scale)
        self.forget_copies_()

    def kernel_scales(self) -> Tensor | None:
        """The scales [O, G]; those of CPUs lie as stored."""
        if self.device_kind == "cpu":
            return self.kernel_scale
        return per_row(self.kernel_scale, self.shape, self.group_size)

    @staticmethod
    def supported(tensor: QuantizedTensor, dtype: torch.dtype, device: Device) -> str | None:
        """Why the op cannot multiply x of `dtype` by this weight, or None."""
        return fp8a16.supported(group_size=tensor.scheme.group_size, dtype=dtype, device=device)

    def codes(self) -> Tensor:
        """Codes uint8 [O, I] in fresh memory."""
        return fp8a16.unpack(self.packed, self.shape)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with x, whose columns are in the order of the codes."""
        return fp8a16.product(
            x, self.packed, self.kernel_scale, bias, self.group_size, self.shape[0]
        )


class Float8ActivationKernel(PackedKernel):
    """e4m3 weights and activations on `quantkit::fp8a8`."""

    decodes_always = True
    packed: Tensor
    kernel_scale: Tensor

    def __init__(self, tensor: QuantizedTensor, device: Device) -> None:
        super().__init__(tensor, device)
        packed, scale = fp8a8.pack(tensor.codes, tensor.scale.values().view(-1))
        self.register_buffer("packed", packed)
        self.register_buffer("kernel_scale", scale)

    @staticmethod
    def supported(tensor: QuantizedTensor, dtype: torch.dtype, device: Device) -> str | None:
        """Why the op cannot multiply x of `dtype` by this weight, or None."""
        return fp8a8.supported(dtype=dtype, device=device)

    def codes(self) -> Tensor:
        """Codes uint8 [O, I] in fresh memory."""
        return fp8a8.unpack(self.packed, self.shape)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with x, whose columns are in the order of the codes."""
        return fp8a8.product(x, self.packed, self.kernel_scale, bias, self.shape[0])


class Nf4Kernel(PackedKernel):
    """NF4 weights on `quantkit::nf4`; on CPUs nested scales are decoded by the op."""

    decodes_always = True
    packed: Tensor
    kernel_scale: Tensor

    def __init__(self, tensor: QuantizedTensor, device: Device) -> None:
        super().__init__(tensor, device)
        scale, groups = tensor.scale, tensor.shape[1] // nf4.BLOCK
        nested = None
        if isinstance(scale, NestedScale):
            stored = scale.codes
            nested = nf4.Nested(table=scale.table, absmax=scale.absmax, offset=scale.offset)
        else:
            stored = scale.values()
        weight = nf4.pack(tensor.codes, stored.view(-1, groups), device, nested)
        self.register_buffer("packed", weight.packed)
        self.register_buffer("kernel_scale", weight.scale)

    @staticmethod
    def supported(tensor: QuantizedTensor, dtype: torch.dtype, device: Device) -> str | None:
        """Why the op cannot multiply x of `dtype` by this weight, or None."""
        if isinstance(tensor.scale, NestedScale) and tensor.scale.block != nf4.OUTER:
            return f"nested blocks of {tensor.scale.block}: the kernel takes {nf4.OUTER}"
        return nf4.supported(
            block=tensor.scheme.group_size, shape=tensor.shape, dtype=dtype, device=device
        )

    def codes(self) -> Tensor:
        """Codes uint8 [O, I] in fresh memory."""
        return nf4.unpack(self.packed, self.shape)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with x, whose columns are in the order of the codes."""
        scale = self._stored_scale()
        nest: tuple[Tensor | None, ...] = (None, None, None)
        if isinstance(scale, NestedScale) and self.kernel_scale.dtype == torch.uint8:
            nest = (scale.table, scale.absmax, scale.offset)
        return nf4.product(
            x,
            self.packed,
            self.kernel_scale,
            *nest,
            bias,
            self.shape[0],
        )


class E2m1Kernel(PackedKernel):
    """NVFP4 and MXFP4 weights on `quantkit::e2m1`; NVFP4's divisor is a factor of the rows."""

    decodes_always = True
    packed: Tensor
    kernel_scale: Tensor
    kernel_outer: Tensor | None

    def __init__(self, tensor: QuantizedTensor, device: Device) -> None:
        super().__init__(tensor, device)
        scale, outer = tensor.scale.values(), None
        if isinstance(tensor.scale, DividedScale):
            scale = tensor.scale.tensor.to(torch.float32)
            outer = tensor.scale.turned(inverted=True).divisor
        self.group_size = tensor.scheme.group_size or 0
        weight = e2m1.pack(tensor.codes, scale, outer, self.group_size, device)
        self.register_buffer("packed", weight.packed)
        self.register_buffer("kernel_scale", weight.scale)
        self.register_buffer("kernel_outer", weight.outer)

    @staticmethod
    def supported(tensor: QuantizedTensor, dtype: torch.dtype, device: Device) -> str | None:
        """Why the op cannot multiply x of `dtype` by this weight, or None."""
        return e2m1.supported(
            group_size=tensor.scheme.group_size, shape=tensor.shape, dtype=dtype, device=device
        )

    def codes(self) -> Tensor:
        """Codes uint8 [O, I] in fresh memory."""
        return e2m1.unpack(self.packed, self.shape)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with x, whose columns are in the order of the codes."""
        return e2m1.product(
            x,
            self.packed,
            self.kernel_scale,
            self.kernel_outer,
            bias,
            self.group_size,
            self.shape[0],
        )


def kernel_class(tensor: QuantizedTensor) -> type[PackedKernel] | None:
    """The kernel for a scheme, if there is one."""
    scheme = tensor.scheme
    if scheme.kind == "nf4":
        return Nf4Kernel
    if scheme.kind in ("mxfp4", "nvfp4") and scheme.activation_bits == 16:
        return E2m1Kernel
    if (
        scheme.kind not in ("int", "fp8", "ggml")
        or scheme.coarse_scales
        or not isinstance(tensor.scale, PlainScale | BlockScale)
    ):
        return None
    eight = scheme.activation_bits == 8
    if scheme.kind == "fp8":
        return Float8ActivationKernel if eight else Float8Kernel
    if eight:
        return Int8ActivationKernel if scheme.bits == 8 else Int4ActivationKernel
    return {4: Int4Kernel, 8: Int8Kernel}.get(scheme.bits)
