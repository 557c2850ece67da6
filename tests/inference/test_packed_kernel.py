"""Kernels keep scales and zero points once, and give back the tensor that they were made of."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from inference.test_layers import make_tensor, same
from quantkit_kernels.ops import int8_dot

from quantkit.inference.kernels import RoundedInputKernel, kernel_class
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

ONCE = ["w4a16_g32", "w4a16_g32_asym", "w4a16_g128_asym", "w4a16_row", "w8a16_row", "w8a16_g32"]
ONCE += ["fp8a16_row", "fp8a16_g32"]


def of_dtype(name: str, dtype: torch.dtype, shape: tuple[int, int] = (24, 256)) -> QuantizedTensor:
    tensor = make_tensor(name, shape)
    assert isinstance(tensor.scale, PlainScale)
    scale = tensor.scale.tensor.to(dtype)
    scale.view(-1)[0] = -0.0
    return dataclasses.replace(tensor, scale=PlainScale(tensor=scale))


def nbytes(module: torch.nn.Module) -> int:
    return sum(buffer.nbytes for buffer in module.buffers())


# The layouts of a GPU are made on any device.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ONCE)
def test_a_gpus_kernels_hold_scales_and_zeros_once(name: str, dtype: torch.dtype) -> None:
    tensor = of_dtype(name, dtype)
    make = kernel_class(tensor)
    assert make is not None
    kernel = make(tensor, "triton")
    assert kernel.scale is None and kernel._buffers["zero"] is None
    # The codes, scales and zeros that are read, filled up to whole tiles: nothing else.
    names = {name for name, _ in kernel.named_buffers()}
    assert names <= {"packed", "kernel_scale", "kernel_zero"}
    for one in (kernel, copy.deepcopy(kernel)):
        assert same(one.quantized_tensor, tensor)
        assert isinstance(tensor.scale, PlainScale)
        found = one.quantized_tensor.scale.tensor  # type: ignore[union-attr]
        assert torch.equal(found.signbit(), tensor.scale.tensor.signbit())


@pytest.mark.parametrize("name", ["w3a16_g32_asym", "w4a16_g32", "w8a16_row", "w4a16_g64_asym"])
def test_int8_activations_hold_them_once(name: str) -> None:
    if reason := int8_dot.unavailable():
        pytest.skip(reason)
    tensor = of_dtype(name, torch.bfloat16, (13, 192))
    kernel = RoundedInputKernel(tensor, "cpu")
    assert kernel.scale is None and kernel._buffers["zero"] is None
    assert same(kernel.quantized_tensor, tensor)


def test_what_is_rounded_for_a_kernel_stays_beside_it() -> None:
    tensor = of_dtype("w4a16_g32", torch.float16)
    make = kernel_class(tensor)
    assert make is not None
    kernel = make(tensor, "cpu")
    # Those of the CPU's kernel are bfloat16.
    assert kernel.scale is not None and same(kernel.quantized_tensor, tensor)


def test_a_nan_among_the_scales_comes_back() -> None:
    tensor = of_dtype("w4a16_g128_asym", torch.float32)
    assert isinstance(tensor.scale, PlainScale)
    tensor.scale.tensor[3, 1] = float("nan")
    make = kernel_class(tensor)
    assert make is not None
    found = make(tensor, "triton").quantized_tensor.scale
    assert isinstance(found, PlainScale)
    assert torch.equal(found.tensor.view(torch.int32), tensor.scale.tensor.view(torch.int32))
