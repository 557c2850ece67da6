"""quantkit::w4a16: Triton kernels in the interpreter and CPU paths against float64."""

from __future__ import annotations

from typing import Any

import kernel_cases as cases
import pytest
import torch
from quantkit_kernels.cpu import int4pack
from quantkit_kernels.gpu.tuning import Tile
from quantkit_kernels.ops import layout, w4a16

# One rounding of the result to 8 or 11 bits, as a share of the largest value; the interpreter cuts
# bfloat16 off instead of rounding it.
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-11}
GROUPS = [32, 64, 128, 256, None]
SHAPE = (130, 512)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    cases.poison(monkeypatch)


def fused(weight: w4a16.Packed) -> Any:
    from quantkit_kernels.gpu.weight import Weight

    return Weight(
        kind="int4",
        packed=weight.packed,
        scale=weight.scale,
        zero=weight.zero,
        group=weight.group_size,
    )


def interpreted(
    x: torch.Tensor,
    weight: w4a16.Packed,
    rows: int,
    bias: torch.Tensor | None = None,
    *,
    split: int = 2,
    tile_rows: int = 128,
) -> torch.Tensor:
    from quantkit_kernels.gpu.fused import matmul

    tile = Tile(rows=tile_rows, tokens=16, split=split, warps=4, stages=2)
    return matmul(x, fused(weight), bias, rows, tile, use_asm=False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_the_fused_kernel_equals_float64(group: int | None, asym: bool) -> None:
    codes, scale, zero = cases.int_weight(SHAPE, group, asym=asym)
    weight = w4a16.pack(codes, scale, zero, group, "triton")
    x, bias = cases.activations((3, SHAPE[1]), torch.bfloat16), torch.randn(SHAPE[0])
    wanted = cases.expected(x, cases.decoded(codes, scale, zero), bias)
    found = interpreted(x, weight, SHAPE[0], bias)
    assert cases.relative_error(found, wanted) < ROUNDING[torch.bfloat16]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tokens", [1, 3, 17, 64])
def test_any_number_of_rows(tokens: int) -> None:
    codes, scale, _ = cases.int_weight((200, 256), 128)
    weight = w4a16.pack(codes, scale, None, 128, "triton")
    x = cases.activations((tokens, 256), torch.float16)
    wanted = cases.expected(x, cases.decoded(codes, scale, None))
    found = interpreted(x, weight, 200, split=1, tile_rows=64)
    assert cases.relative_error(found, wanted) < ROUNDING[torch.float16]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("columns", [32, 160, 416])
@pytest.mark.parametrize("group", [32, None], ids=str)
def test_columns_that_fill_no_block_are_masked(columns: int, group: int | None) -> None:
    codes, scale, zero = cases.int_weight((7, columns), group, asym=True)
    weight = w4a16.pack(codes, scale, zero, group, "triton")
    storage = torch.full((5, columns + 96), float("nan"), dtype=torch.float16)
    x = storage[:, :columns].copy_(cases.activations((5, columns), torch.float16))
    wanted = cases.expected(x, cases.decoded(codes, scale, zero))
    # More splits than blocks: some programs have nothing to do and must say zero.
    found = interpreted(x, weight, 7, split=4)
    assert cases.relative_error(found, wanted) < ROUNDING[torch.float16]


def test_splitting_changes_the_last_float32_bits_only() -> None:
    codes, scale, _ = cases.int_weight((128, 512), 128)
    weight = w4a16.pack(codes, scale, None, 128, "triton")
    x = cases.activations((2, 512), torch.float16)
    once, again = interpreted(x, weight, 128, split=4), interpreted(x, weight, 128, split=4)
    assert torch.equal(once, again)
    whole = interpreted(x, weight, 128, split=1)
    assert cases.relative_error(once, whole.double()) < ROUNDING[torch.float16]


@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_the_decode_kernel_rounds_once(group: int | None, asym: bool) -> None:
    from quantkit_kernels.gpu.fused import dequantize

    shape = (70, 256)
    codes, scale, zero = cases.int_weight(shape, group, asym=asym)
    weight = fused(w4a16.pack(codes, scale, zero, group, "triton"))
    found = dequantize(weight, shape, torch.float16, use_asm=False)
    # The product of a code and a bfloat16 scale is exact in float32.
    assert torch.equal(found, cases.decoded(codes, scale, zero).half())


@pytest.mark.parametrize("device", ["triton", "cpu"])
@pytest.mark.parametrize("shape", [(1, 32), (130, 160), (64, 4096)], ids=str)
def test_packing_has_an_inverse(device: w4a16.Device, shape: tuple[int, int]) -> None:
    codes, scale, zero = cases.int_weight(shape, 32, asym=True)
    weight = w4a16.pack(codes, scale, zero, 32, device)
    assert torch.equal(w4a16.unpack(weight.packed, shape), codes)


def test_qk4_puts_each_code_where_the_layout_says() -> None:
    codes, _, _ = cases.int_weight((128, 256), 128)
    words = layout.pack_qk4(codes)
    assert words.shape == (2, 128, 16)
    for column in range(128):
        b, rest = divmod(column, 32)
        j, rest = divmod(rest, 16)
        h, rest = divmod(rest, 8)
        t, p = divmod(rest, 2)
        nibble = (words[:, :, t * 4 + b] >> (4 * (2 * j + h + 4 * p))) & 15
        assert torch.equal(nibble.to(torch.uint8), codes[:, column::128].t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, max(int4pack.FEW_ROWS.values()) + 1])
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
def test_the_cpu_op_equals_float64(
    asym: bool, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several tiles, the last of them short.
    monkeypatch.setattr(int4pack, "ELEMENTS", 2 * int4pack.block_rows() * SHAPE[1])
    codes, scale, zero = cases.int_weight(SHAPE, 128, asym=asym)
    weight = w4a16.pack(codes, scale, zero, 128, "cpu")
    x, bias = cases.activations((tokens, SHAPE[1]), dtype), torch.randn(SHAPE[0])
    found = torch.ops.quantkit.w4a16(
        x, weight.packed, weight.scale, weight.zero, bias, weight.group_size, SHAPE[0]
    )
    assert found.dtype == dtype
    wanted = cases.expected(x, cases.decoded(codes, scale, zero), bias)
    # bfloat16 activations, sum and bias: three roundings.
    assert cases.relative_error(found, wanted) < 2 * ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("group", [32, 64, None], ids=str)
def test_the_cpu_op_pads_odd_shapes(group: int | None) -> None:
    shape = (37, 192 if group else 75)
    codes, scale, zero = cases.int_weight(shape, group, asym=True)
    weight = w4a16.pack(codes, scale, zero, group, "cpu")
    for x in (torch.randn(2, 3, shape[1]), torch.randn(shape[1], 6).t(), torch.randn(shape[1])):
        x = x.bfloat16()
        found = torch.ops.quantkit.w4a16(
            x, weight.packed, weight.scale, None, None, weight.group_size, shape[0]
        )
        wanted = cases.expected(x, cases.decoded(codes, scale, zero))
        assert found.shape == wanted.shape
        assert cases.relative_error(found, wanted) < 2 * ROUNDING[torch.bfloat16]


def test_no_rows_give_no_rows() -> None:
    codes, scale, _ = cases.int_weight((64, 128), 128)
    weight = w4a16.pack(codes, scale, None, 128, "cpu")
    x = torch.empty(0, 128, dtype=torch.bfloat16)
    out = torch.ops.quantkit.w4a16(x, weight.packed, weight.scale, None, None, 128, 64)
    assert out.shape == (0, 64)


@pytest.mark.parametrize("device", ["triton", "cpu"])
def test_the_op_is_well_formed(device: w4a16.Device) -> None:
    # Padded rows: what comes back must be contiguous, not a slice of more.
    codes, scale, zero = cases.int_weight((37, 128), 64, asym=True)
    weight = w4a16.pack(codes, scale, zero, 64, device)
    x = cases.activations((2, 3, 128), torch.bfloat16)
    for bias in (None, torch.randn(37)):
        arguments = (x, weight.packed, weight.scale, weight.zero, bias, weight.group_size, 37)
        torch.library.opcheck(torch.ops.quantkit.w4a16.default, arguments)


def test_the_reference_reads_both_layouts_alike() -> None:
    codes, scale, zero = cases.int_weight((64, 160), 32, asym=True)
    for device in ("triton", "cpu"):
        weight = w4a16.pack(codes, scale, zero, 32, device)  # type: ignore[arg-type]
        found = w4a16.dequantize(
            weight.packed, weight.scale, weight.zero, weight.group_size, (64, 160), torch.float32
        )
        # aten keeps (8 - zero) · scale in bfloat16.
        bound = 0.0 if device == "triton" else 2**-8 * 8 * 0.03
        assert (found - cases.decoded(codes, scale, zero)).abs().max() <= bound + 1e-7


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"bits": 3}, "3-bit"),
        ({"dtype": torch.float32}, "float32"),
        ({"group_size": 48}, "group size 48"),
    ],
    ids=["bits", "dtype", "group"],
)
def test_what_is_unsupported_is_said(changes: dict[str, object], word: str) -> None:
    wanted: dict[str, object] = {
        "bits": 4,
        "group_size": 128,
        "dtype": torch.bfloat16,
        "device": "cpu",
    }
    assert w4a16.supported(**wanted) is None  # type: ignore[arg-type]
    reason = w4a16.supported(**{**wanted, **changes})  # type: ignore[arg-type]
    assert reason is not None and word in reason
