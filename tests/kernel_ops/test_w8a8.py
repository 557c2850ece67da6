"""quantkit::w8a8: the Triton kernels in the interpreter and the CPU paths against integers."""

from __future__ import annotations

import kernel_cases as cases
import pytest
import torch
from quantkit_kernels.cpu import isa
from quantkit_kernels.gpu.tuning import Tile
from quantkit_kernels.ops import w8a8
from torch import Tensor

from quantkit.numbers.activations import quantize_activation


def make(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales [N] and the weight packed."""
    codes, scale, _ = cases.int_weight(shape, None, bits=8)
    codes = codes.clamp_(min=1)
    return (codes, scale.view(-1), *w8a8.pack(codes, scale.view(-1)))


def exact(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The definition: pipeline's codes of x, integer products, scales and bias in float64."""
    x_codes, x_scale = quantize_activation(x)
    product = x_codes.double() @ (codes.double() - 128).t()
    return product * x_scale.double() * scale.double() + bias.double()


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("columns", [75, 256])
def test_the_kernels_equal_the_definition(
    columns: int, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit_kernels.gpu import w8a8 as w8a8_triton

    codes, scale, weight, padded = make((70, columns))
    x, bias = cases.activations((3, columns), torch.float16), torch.randn(70)
    tile = Tile(rows=64, tokens=16, split=split, warps=4, stages=2)
    cases.poison(monkeypatch)
    found = w8a8_triton.matmul(x, weight, padded, bias, 70, tile)
    assert cases.relative_error(found, exact(x, codes, scale, bias)) < 2**-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernel_quantizes_tokens_as_the_pipeline_does(dtype: torch.dtype) -> None:
    from quantkit_kernels.gpu import w8a8 as w8a8_triton

    x = torch.randn(6, 5000).to(dtype)
    x[1] = 0
    x[2, :5] = torch.tensor([127.0, 0.5, 1.5, -2.5, -127.0])
    x[2, 5:] = 0
    x[3, 7] = float("nan")
    found, scale = w8a8_triton.quantize(x, 5024)
    codes, wanted = quantize_activation(x)
    assert torch.equal(scale[[0, 1, 2, 4, 5]], wanted.view(-1)[[0, 1, 2, 4, 5]])
    assert torch.isnan(scale[3])
    keep = [0, 1, 2, 4, 5]
    assert torch.equal(found[keep, :5000], codes[keep])
    assert not found[keep, 5000:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, max(w8a8.FEW_ROWS.values()) + 1])
def test_the_cpu_op_equals_the_definition(tokens: int, dtype: torch.dtype) -> None:
    codes, scale, weight, padded = make((37, 2100))
    x, bias = cases.activations((tokens, 2, 2100), dtype), torch.randn(37)
    found = torch.ops.quantkit.w8a8(x, weight, padded, bias, 37)
    assert found.dtype == dtype
    # Few rows round the sum to bfloat16 before the result is; float32 is exact up to its rounding.
    bound = 2**-7 if dtype == torch.bfloat16 else 1e-6
    assert cases.relative_error(found, exact(x, codes, scale, bias)) < bound


def test_integer_products_are_exact_beyond_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w8a8, "_TILE_ELEMENTS", 3 * 1024)
    draw = cases.generator(0)
    x = torch.randint(-127, 128, (3, 5024), generator=draw, dtype=torch.int8)
    weight = torch.randint(-127, 128, (8, 5024), generator=draw, dtype=torch.int8)
    x[0], weight[0] = 127, 127  # 127 · 127 · 5024 > 2^24
    found = w8a8.integer_product(x, weight)
    assert torch.equal(found.double(), x.double() @ weight.double().t())


def test_a_machine_with_dot_products_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "fast_int8", lambda: True)
    x = torch.randint(-127, 128, (3, 64), dtype=torch.int8)
    weight = torch.randint(-127, 128, (8, 64), dtype=torch.int8)
    found = w8a8.integer_product(x, weight)
    assert found.dtype == torch.int32
    assert torch.equal(found.double(), x.double() @ weight.double().t())


def test_packing_has_an_inverse() -> None:
    codes, _, weight, _ = make((37, 75))
    assert weight.shape == (40, 96)
    assert torch.equal(w8a8.unpack(weight, (37, 75)), codes)


def test_the_op_is_well_formed() -> None:
    codes, scale, weight, padded = make((37, 75))
    x, bias = cases.activations((2, 3, 75), torch.bfloat16), torch.randn(37)
    arguments = (x, weight, padded, bias, 37)
    torch.library.opcheck(torch.ops.quantkit.w8a8.default, arguments)
    torch.library.opcheck(torch.ops.quantkit.w8a8.default, (x, weight, padded, None, 37))
    found = w8a8.reference(*arguments)
    assert cases.relative_error(found, exact(x, codes, scale, bias)) < 2**-8
    assert torch.ops.quantkit.w8a8(x[:0], *arguments[1:]).shape == (0, 3, 37)
