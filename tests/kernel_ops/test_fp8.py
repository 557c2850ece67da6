"""quantkit::fp8a16 and fp8a8: kernels in the interpreter and CPU paths against float64."""

from __future__ import annotations

from typing import Any

import kernel_cases as cases
import pytest
import torch
from quantkit_kernels.gpu.tuning import Tile
from quantkit_kernels.ops import fp8a8, fp8a16
from torch import Tensor

from quantkit.numbers.activations import float8_activation

TILE = Tile(rows=64, tokens=16, split=2, warps=4, stages=2)
GROUPS = [None, 128, 64, 32]


def fused(weight: fp8a16.Packed) -> Any:
    from quantkit_kernels.gpu.weight import Weight

    return Weight(
        kind="fp8", packed=weight.packed, scale=weight.scale, zero=None, group=weight.group_size
    )


def test_moving_bits_gives_every_e4m3_number() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    found = fp8a16.decode(codes.view(torch.int8))
    # As bits: zeros have signs.
    wanted = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_the_fused_kernel_equals_float64(
    group: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit_kernels.gpu.fused import matmul

    shape = (70, 256 if group else 200)
    codes, scale, exact = cases.float8_weight(shape, group)
    x, bias = cases.activations((3, shape[1]), torch.float16), torch.randn(shape[0])
    weight = fused(fp8a16.pack(codes, scale, group, "triton"))
    cases.poison(monkeypatch)
    found = matmul(x, weight, bias, shape[0], TILE, use_asm=False)
    # One rounding of the result to 11 bits.
    assert cases.relative_error(found, cases.expected(x, exact, bias)) < 2**-11


def test_the_decode_kernel_rounds_once() -> None:
    from quantkit_kernels.gpu.fused import dequantize

    codes, scale, exact = cases.float8_weight((70, 200), None)
    weight = fused(fp8a16.pack(codes, scale, None, "triton"))
    found = dequantize(weight, (70, 200), torch.float16, use_asm=False)
    # 4-bit mantissas times 8-bit scales: exact in float32.
    assert torch.equal(found, exact.half())


@pytest.mark.parametrize("device", ["triton", "cpu"])
@pytest.mark.parametrize("group", [None, 32], ids=str)
def test_packing_has_an_inverse(device: Any, group: int | None) -> None:
    codes, scale, _ = cases.float8_weight((37, 160), group)
    weight = fp8a16.pack(codes, scale, group, device)
    assert torch.equal(fp8a16.unpack(weight.packed, (37, 160)), codes)
    both, _ = fp8a8.pack(codes, scale[:, 0])
    assert both.shape == (40, 160) and both.dtype == torch.int8
    assert torch.equal(fp8a8.unpack(both, (37, 160)), codes)


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
@pytest.mark.parametrize("group", [None, 32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_cpu_op_equals_float64(
    dtype: torch.dtype, group: int | None, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (37, 160 if group else 75)
    monkeypatch.setattr("quantkit_kernels.cpu.tiled.ELEMENTS", 5 * shape[1])
    codes, scale, exact = cases.float8_weight(shape, group)
    weight = fp8a16.pack(codes, scale, group, "cpu")
    x, bias = cases.activations((tokens, 2, shape[1]), dtype), torch.randn(shape[0])
    found = torch.ops.quantkit.fp8a16(
        x, weight.packed, weight.scale, bias, weight.group_size, shape[0]
    )
    assert found.shape == (tokens, 2, shape[0]) and found.dtype == dtype
    if tokens:
        # Two roundings to bfloat16; in float32 sums of 160 products.
        bound = 2**-7 if dtype == torch.bfloat16 else 1e-5
        assert cases.relative_error(found, cases.expected(x, exact, bias)) < bound


@pytest.mark.parametrize("device", ["triton", "cpu"])
def test_the_weight_only_op_is_well_formed(device: Any) -> None:
    codes, scale, exact = cases.float8_weight((37, 128), None)
    weight = fp8a16.pack(codes, scale, None, device)
    x = cases.activations((2, 3, 128), torch.bfloat16)
    for bias in (None, torch.randn(37)):
        arguments = (x, weight.packed, weight.scale, bias, 0, 37)
        torch.library.opcheck(torch.ops.quantkit.fp8a16.default, arguments)
        found = fp8a16.reference(*arguments)
        # The weight and the result are rounded to bfloat16.
        assert cases.relative_error(found, cases.expected(x, exact, bias)) < 2**-7


def exact8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The definition: the pipeline's numbers of x, products, scales and bias in float64."""
    numbers, x_scale = float8_activation(x)
    product = numbers.double() @ codes.view(torch.float8_e4m3fn).double().t()
    return product * x_scale.double() * scale.view(-1).double() + bias.double()


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("columns", [75, 256])
def test_the_product_of_two_float8s_equals_the_definition(
    columns: int, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit_kernels.gpu import fp8 as fp8_triton

    codes, scale, _ = cases.float8_weight((70, columns), None)
    weight, padded = fp8a8.pack(codes, scale.view(-1))
    x, bias = cases.activations((3, columns), torch.float16), torch.randn(70)
    tile = Tile(rows=64, tokens=16, split=split, warps=4, stages=2)
    wanted = exact8(x, codes, scale, bias)
    cases.poison(monkeypatch)
    found = fp8_triton.matmul(x, weight, padded, bias, 70, tile)
    assert cases.relative_error(found, wanted) < 2**-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernel_rounds_tokens_as_the_pipeline_does(dtype: torch.dtype) -> None:
    from quantkit_kernels.gpu import fp8 as fp8_triton

    x = torch.randn(6, 5000).to(dtype)
    x[1] = 0
    # Ties, subnormal numbers and the largest, at scale 1.
    edges = [448.0, -448.0, 17.0, 19.0, -21.0, 2**-9, 1.5 * 2**-9, 2**-10, -(2**-6), 0.0145]
    x[2, : len(edges)] = torch.tensor(edges)
    x[2, len(edges) :] = 0
    x[3, 7] = float("nan")
    found, scale = fp8_triton.quantize(x, 5024)
    numbers, wanted = float8_activation(x)
    keep = [0, 1, 2, 4, 5]
    assert torch.equal(scale[keep], wanted.view(-1)[keep])
    assert torch.isnan(scale[3])
    assert torch.equal(found[keep, :5000].float(), numbers[keep].float())
    assert not found[keep, 5000:].float().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_cpu_op_with_float8_activations_equals_the_definition(
    tokens: int, dtype: torch.dtype
) -> None:
    codes, scale, _ = cases.float8_weight((37, 2100), None)
    weight, padded = fp8a8.pack(codes, scale.view(-1))
    x, bias = cases.activations((tokens, 2, 2100), dtype), torch.randn(37)
    found = torch.ops.quantkit.fp8a8(x, weight, padded, bias, 37)
    assert found.dtype == dtype
    # Sums and the result are rounded to bfloat16; in float32 sums of 2100 products.
    bound = 2**-7 if dtype == torch.bfloat16 else 1e-5
    assert cases.relative_error(found, exact8(x, codes, scale, bias)) < bound


def test_the_op_with_float8_activations_is_well_formed() -> None:
    codes, scale, _ = cases.float8_weight((37, 75), None)
    weight, padded = fp8a8.pack(codes, scale.view(-1))
    x, bias = cases.activations((2, 3, 75), torch.bfloat16), torch.randn(37)
    arguments = (x, weight, padded, bias, 37)
    torch.library.opcheck(torch.ops.quantkit.fp8a8.default, arguments)
    torch.library.opcheck(torch.ops.quantkit.fp8a8.default, (x, weight, padded, None, 37))
    found = fp8a8.reference(*arguments)
    assert cases.relative_error(found, exact8(x, codes, scale, bias)) < 2**-8
    assert torch.ops.quantkit.fp8a8(x[:0], *arguments[1:]).shape == (0, 3, 37)


def test_what_is_unsupported_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    short = torch.bfloat16
    assert fp8a16.supported(group_size=None, dtype=short, device="cpu") is None
    reason = fp8a16.supported(group_size=None, dtype=torch.float32, device="cpu")
    assert "float32" in str(reason)
    monkeypatch.setattr(fp8a8, "needs_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "8.9" in str(fp8a8.supported(dtype=short, device="triton"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert fp8a8.supported(dtype=short, device="triton") is None
    assert fp8a8.supported(dtype=short, device="cpu") is None
