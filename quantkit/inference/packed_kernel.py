"""What weights in the layouts of `quantkit_kernels` share: stored numbers, and the way back.

Scales and zero points are kept as stored only where what the kernel reads does not give them back.
Shapes: O out features, I in features, G groups per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from quantkit_kernels.ops.device import Device
from torch import Tensor

from quantkit.errors import ShapeError
from quantkit.inference.reference import StoredModule, StoredScale
from quantkit.numbers.tensor import PlainScale, QuantizedTensor, Scale


class PackedKernel(StoredModule, ABC):
    """What all repacked weights share: the stored numbers without the codes, and the inverse."""

    decodes_always = False

    def __init__(self, tensor: QuantizedTensor, device: Device) -> None:
        super().__init__()
        self.shape = tensor.shape
        self.scheme = tensor.scheme
        self.weight_dtype = tensor.dtype
        self.device_kind: Device = device
        self.name = f"{device} {type(self).__name__}"
        self.scale: StoredScale | None = StoredScale(tensor.scale)
        self.register_buffer("zero", tensor.zero)
        self.register_buffer("columns", tensor.columns)
        # Of a scale, and of zeros, that the kernel's own stand for.
        self._scale_form: tuple[torch.dtype, torch.Size] | None = None
        self._zero_dtype: torch.dtype | None = None

    def forget_copies_(self) -> None:
        """Drops what the kernel's own scales and zeros give back bit for bit; once, when packed."""
        scale = None if self.scale is None else self.scale.get()
        found = self.kernel_scales() if isinstance(scale, PlainScale) else None
        if isinstance(scale, PlainScale) and found is not None:
            stored = scale.tensor
            if torch.equal(_bits(found.to(stored.dtype).reshape(stored.shape)), _bits(stored)):
                self._scale_form, self.scale = (stored.dtype, stored.shape), None
        zero, found = self._buffers["zero"], self.kernel_zeros()
        if zero is not None and found is not None and torch.equal(found.to(zero.dtype), zero):
            self._zero_dtype = zero.dtype
            self._buffers["zero"] = None

    def kernel_scales(self) -> Tensor | None:
        """The scales [O, G] that the kernel reads, in any float dtype; None: not those stored."""
        return None

    def kernel_zeros(self) -> Tensor | None:
        """The zero points [O, G] that the kernel reads, in any dtype; None: not those stored."""
        return None

    def _stored_scale(self) -> Scale:
        if self.scale is not None:
            return self.scale.get()
        found = self.kernel_scales()
        assert found is not None and self._scale_form is not None
        dtype, shape = self._scale_form
        return PlainScale(tensor=found.to(dtype).reshape(-1).contiguous().view(shape))

    def _stored_zero(self) -> Tensor | None:
        found = None if self._zero_dtype is None else self.kernel_zeros()
        if found is None or self._zero_dtype is None:
            return self._buffers["zero"]
        return found.to(self._zero_dtype).reshape(-1).contiguous().view(found.shape)

    @property
    def quantized_tensor(self) -> QuantizedTensor:
        """The tensor this was made of, bit for bit; unpacks the codes into fresh memory."""
        return QuantizedTensor(
            codes=self.codes(),
            scale=self._stored_scale(),
            zero=self._stored_zero(),
            scheme=self.scheme,
            dtype=self.weight_dtype,
            columns=self._buffers["columns"],
        )

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I] -> [..., O] in the dtype of x; ShapeError for another number of columns."""
        if x.shape[-1] != self.shape[1]:
            raise ShapeError(f"x has {x.shape[-1]} columns, the weight {self.shape[1]}")
        columns = self._buffers["columns"]
        if columns is not None:
            # The weight stays in the order of its groups: the input follows it.
            x = x.index_select(-1, columns)
        return self.multiply(x, bias)

    @abstractmethod
    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with x, whose columns are in the order of the codes."""

    @staticmethod
    @abstractmethod
    def supported(tensor: QuantizedTensor, dtype: torch.dtype, device: Device) -> str | None:
        """Why the op cannot multiply x of `dtype` by this weight, or None."""

    @abstractmethod
    def codes(self) -> Tensor:
        """Codes uint8 [O, I] in fresh memory."""


def _bits(numbers: Tensor) -> Tensor:
    """Bytes, because -0 equals 0 and a NaN nothing."""
    return numbers.reshape(-1).contiguous().view(torch.uint8)


def per_row(per_group_GN: Tensor, shape: tuple[int, int], group_size: int) -> Tensor:
    """[O, G] of `layout.pad_groups`."""
    groups = -(-shape[1] // group_size) if group_size else 1
    return per_group_GN[:groups, : shape[0]].t()
