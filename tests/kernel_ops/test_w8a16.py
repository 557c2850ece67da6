"""quantkit::w8a16: the Triton kernels in the interpreter and the CPU paths against float64."""

from __future__ import annotations

from typing import Any

import kernel_cases as cases
import pytest
import torch
from quantkit_kernels.gpu.tuning import Tile
from quantkit_kernels.ops import layout, w8a16

TILE = Tile(rows=64, tokens=16, split=2, warps=4, stages=2)
GROUPS = [None, 128, 64, 32]


def fused(weight: w8a16.Packed) -> Any:
    from quantkit_kernels.gpu.weight import Weight

    return Weight(
        kind="int8",
        packed=weight.packed,
        scale=weight.scale,
        zero=None,
        group=weight.group_size,
    )


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_the_fused_kernel_equals_float64(
    group: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit_kernels.gpu.fused import matmul

    shape = (70, 256 if group else 200)
    codes, scale, _ = cases.int_weight(shape, group, bits=8)
    x, bias = cases.activations((3, shape[1]), torch.float16), torch.randn(shape[0])
    wanted = cases.expected(x, cases.decoded(codes, scale, None, bits=8), bias)
    weight = fused(w8a16.pack(codes, scale, group, "triton"))
    cases.poison(monkeypatch)
    found = matmul(x, weight, bias, shape[0], TILE, use_asm=False)
    # One rounding of the result to 11 bits.
    assert cases.relative_error(found, wanted) < 2**-11


def test_the_decode_kernel_rounds_once() -> None:
    from quantkit_kernels.gpu.fused import dequantize

    codes, scale, _ = cases.int_weight((70, 200), None, bits=8)
    weight = fused(w8a16.pack(codes, scale, None, "triton"))
    found = dequantize(weight, (70, 200), torch.float16, use_asm=False)
    # 8-bit codes times 8-bit scales: exact in float32.
    assert torch.equal(found, cases.decoded(codes, scale, None, bits=8).half())


@pytest.mark.parametrize("device", ["triton", "cpu"])
@pytest.mark.parametrize("group", [None, 32], ids=str)
def test_packing_has_an_inverse(device: Any, group: int | None) -> None:
    codes, scale, _ = cases.int_weight((37, 160), group, bits=8)
    weight = w8a16.pack(codes, scale, group, device)
    assert torch.equal(w8a16.unpack(weight.packed, (37, 160)), codes)


def test_qk8_puts_each_code_where_the_layout_says() -> None:
    codes = torch.randint(-128, 128, (128, 256), dtype=torch.int8)
    words = layout.pack_qk8(codes)
    assert words.shape == (2, 128, 32)
    for column in range(128):
        b, rest = divmod(column, 16)
        h, rest = divmod(rest, 8)
        t, p = divmod(rest, 2)
        byte = (words[:, :, t * 8 + b] >> (8 * (2 * h + p))) & 0xFF
        assert torch.equal(byte.to(torch.uint8).view(torch.int8), codes[:, column::128].t())


@pytest.mark.parametrize("tokens", [0, 1, 5, max(w8a16.FEW_ROWS.values()) + 1])
@pytest.mark.parametrize("group", [None, 32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_cpu_op_equals_float64(
    dtype: torch.dtype, group: int | None, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (37, 160 if group else 75)
    monkeypatch.setattr("quantkit_kernels.cpu.tiled.ELEMENTS", 5 * shape[1])
    codes, scale, _ = cases.int_weight(shape, group, bits=8)
    weight = w8a16.pack(codes, scale, group, "cpu")
    x, bias = cases.activations((tokens, 2, shape[1]), dtype), torch.randn(shape[0])
    found = torch.ops.quantkit.w8a16(
        x, weight.packed, weight.scale, bias, weight.group_size, shape[0]
    )
    assert found.shape == (tokens, 2, shape[0]) and found.dtype == dtype
    if tokens:
        wanted = cases.expected(x, cases.decoded(codes, scale, None, bits=8), bias)
        # Two roundings to bfloat16; in float32 sums of 160 products.
        bound = 2**-7 if dtype == torch.bfloat16 else 1e-5
        assert cases.relative_error(found, wanted) < bound


@pytest.mark.parametrize("device", ["triton", "cpu"])
def test_the_op_is_well_formed(device: Any) -> None:
    codes, scale, _ = cases.int_weight((37, 128), None, bits=8)
    weight = w8a16.pack(codes, scale, None, device)
    x = cases.activations((2, 3, 128), torch.bfloat16)
    for bias in (None, torch.randn(37)):
        arguments = (x, weight.packed, weight.scale, bias, 0, 37)
        torch.library.opcheck(torch.ops.quantkit.w8a16.default, arguments)


def test_what_is_unsupported_is_said() -> None:
    def reason(**changes: Any) -> str | None:
        wanted = {
            "symmetric": True,
            "group_size": None,
            "dtype": torch.bfloat16,
            "device": "cpu",
        }
        return w8a16.supported(**{**wanted, **changes})

    assert reason() is None
    assert "zero points" in str(reason(symmetric=False))
    assert "float32" in str(reason(dtype=torch.float32))
