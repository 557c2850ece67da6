"""quantkit::e2m1: the Triton kernels in the interpreter and the CPU path against float64."""

from __future__ import annotations

from typing import Any

import kernel_cases as cases
import pytest
import torch
from quantkit_kernels.gpu.tuning import Tile
from quantkit_kernels.ops import e2m1
from quantkit_kernels.ops.codebook import E2M1
from torch import Tensor

from quantkit.numbers.grid import grid_of
from quantkit.numbers.scheme import Scheme

TILE = Tile(rows=64, tokens=16, split=2, warps=4, stages=2)
SHAPE = (70, 288)
KINDS = ["mxfp4a16", "nvfp4a16"]


def make(kind: str) -> tuple[Tensor, Tensor, Tensor | None, int, Tensor]:
    """Codes, scales [N, G], the factor of all, the group's size, and the weight in float64."""
    draw = cases.generator(0)
    group = Scheme.parse(kind).group_size
    assert group is not None
    codes = torch.randint(0, 16, SHAPE, generator=draw, dtype=torch.uint8)
    count = (SHAPE[0], SHAPE[1] // group)
    outer = None
    if kind == "nvfp4a16":
        bits = torch.randint(1, 0x7F, count, generator=draw, dtype=torch.uint8)
        scale, outer = bits.view(torch.float8_e4m3fn).float(), torch.tensor(1 / 517.3)
    else:
        scale = torch.exp2(torch.randint(-9, -2, count, generator=draw).float())
    weight = torch.tensor(E2M1).double()[codes.long()] * scale.double().repeat_interleave(group, 1)
    return codes, scale, outer, group, weight if outer is None else weight * outer.double()


def test_the_codes_are_those_of_the_pipeline() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[None]
    for kind in KINDS:
        found = grid_of(Scheme.parse(kind)).decode(codes, torch.ones(1, 1), None)
        assert found.view(-1).tolist() == list(E2M1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_equal_float64(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit_kernels.gpu.fused import dequantize, matmul

    codes, scale, outer, group, exact = make(kind)
    packed = e2m1.pack(codes, scale, outer, group, "triton")
    assert packed.scale.dtype == torch.bfloat16
    weight = e2m1._weight(packed.packed, packed.scale, packed.outer, group)
    x, bias = cases.activations((3, SHAPE[1]), dtype), torch.randn(SHAPE[0])
    cases.poison(monkeypatch)
    found = matmul(x, weight, bias, SHAPE[0], TILE, use_asm=False)
    # One rounding of the result, which the interpreter truncates to bfloat16.
    bound = 2**-7 if dtype == torch.bfloat16 else 2**-11
    assert cases.relative_error(found, cases.expected(x, exact, bias)) < bound
    decoded = dequantize(weight, SHAPE, torch.float32, use_asm=False)
    # Exact, but for the product with NVFP4's factor.
    torch.testing.assert_close(decoded.double(), exact, rtol=0 if outer is None else 2**-23, atol=0)


@pytest.mark.parametrize("device", ["triton", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_packing_has_an_inverse_and_decodes(kind: str, device: Any) -> None:
    codes, scale, outer, group, exact = make(kind)
    packed = e2m1.pack(codes, scale, outer, group, device)
    assert torch.equal(e2m1.unpack(packed.packed, SHAPE), codes)
    found = e2m1.dequantize(packed.packed, packed.scale, packed.outer, group, SHAPE, torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=2**-22, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_cpu_op_equals_float64(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit_kernels.cpu.tiled.ELEMENTS", 3 * SHAPE[1])
    codes, scale, outer, group, exact = make(kind)
    packed = e2m1.pack(codes, scale, outer, group, "cpu")
    x, bias = cases.activations((2, 3, SHAPE[1]), dtype), torch.randn(SHAPE[0])
    arguments = (packed.packed, packed.scale, packed.outer, bias, group, SHAPE[0])
    found = torch.ops.quantkit.e2m1(x, *arguments)
    bound = 2**-7 if dtype == torch.bfloat16 else 1e-5
    assert cases.relative_error(found, cases.expected(x, exact, bias)) < bound
    assert torch.ops.quantkit.e2m1(x[:0], *arguments).shape == (0, 3, SHAPE[0])


@pytest.mark.parametrize("device", ["triton", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_op_is_well_formed(kind: str, device: Any) -> None:
    codes, scale, outer, group, exact = make(kind)
    packed = e2m1.pack(codes, scale, outer, group, device)
    x = cases.activations((2, SHAPE[1]), torch.bfloat16)
    arguments = (x, packed.packed, packed.scale, packed.outer, None, group, SHAPE[0])
    torch.library.opcheck(torch.ops.quantkit.e2m1.default, arguments)
    found = e2m1.reference(*arguments)
    assert cases.relative_error(found, cases.expected(x, exact)) < 2**-7


def test_what_is_unsupported_is_said() -> None:
    wanted: dict[str, Any] = {
        "group_size": 16,
        "shape": (8, 48),
        "dtype": torch.bfloat16,
        "device": "cpu",
    }
    assert e2m1.supported(**wanted) is None
    assert "straddle" in str(e2m1.supported(**{**wanted, "group_size": 32}))
    assert "16 and 32" in str(e2m1.supported(**{**wanted, "group_size": 64}))
    assert "float32" in str(e2m1.supported(**{**wanted, "dtype": torch.float32}))
