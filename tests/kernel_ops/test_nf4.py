"""quantkit::nf4: the Triton kernels in the interpreter and the CPU path against float64."""

from __future__ import annotations

from typing import Any

import kernel_cases as cases
import pytest
import torch
from quantkit_kernels.gpu.tuning import Tile
from quantkit_kernels.ops import nf4
from quantkit_kernels.ops.codebook import NF4
from torch import Tensor

TILE = Tile(rows=64, tokens=16, split=2, warps=4, stages=2)
SHAPE = (70, 320)


def make(nested: bool) -> tuple[Tensor, Tensor, nf4.Nested | None, Tensor]:
    """Codes, stored scales [N, G], what nests them, and the weight in float64."""
    draw = cases.generator(0)
    codes = torch.randint(0, 16, SHAPE, generator=draw, dtype=torch.uint8)
    groups = SHAPE[1] // nf4.BLOCK
    count = SHAPE[0] * groups
    stored, parts = torch.rand(SHAPE[0], groups, generator=draw) + 0.1, None
    values = stored.double()
    if nested:
        stored = torch.randint(0, 256, (SHAPE[0], groups), generator=draw, dtype=torch.uint8)
        parts = nf4.Nested(
            table=torch.linspace(-1, 1, 256),
            absmax=torch.rand(-(-count // 256), generator=draw),
            offset=torch.tensor(0.3),
        )
        outer = parts.absmax.double().repeat_interleave(256)[:count].view(stored.shape)
        values = parts.table.double()[stored.long()] * outer + 0.3
    weight = torch.tensor(NF4).double()[codes.long()] * values.repeat_interleave(nf4.BLOCK, 1)
    return codes, stored, parts, weight


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_the_kernels_equal_float64(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit_kernels.gpu.fused import Weight, dequantize, matmul

    codes, stored, parts, exact = make(nested)
    packed = nf4.pack(codes, stored, "triton", parts)
    assert packed.nested is None
    weight = Weight(
        kind="nf4", packed=packed.packed, scale=packed.scale, zero=None, group=nf4.BLOCK
    )
    x, bias = cases.activations((3, SHAPE[1]), torch.float16), torch.randn(SHAPE[0])
    cases.poison(monkeypatch)
    found = matmul(x, weight, bias, SHAPE[0], TILE, use_asm=False)
    assert cases.relative_error(found, cases.expected(x, exact, bias)) < 2**-11
    decoded = dequantize(weight, SHAPE, torch.float32, use_asm=False)
    # Two float32 products and a sum.
    torch.testing.assert_close(decoded.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", ["triton", "cpu"])
def test_packing_has_an_inverse(device: Any) -> None:
    codes, stored, _, _ = make(False)
    assert torch.equal(nf4.unpack(nf4.pack(codes, stored, device).packed, SHAPE), codes)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_cpu_op_equals_float64(
    dtype: torch.dtype, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tiles of a few rows: nested scales count from the tile's first row.
    monkeypatch.setattr("quantkit_kernels.cpu.tiled.ELEMENTS", 3 * SHAPE[1])
    codes, stored, parts, exact = make(nested)
    packed = nf4.pack(codes, stored, "cpu", parts)
    assert packed.nested is parts
    x, bias = cases.activations((2, 3, SHAPE[1]), dtype), torch.randn(SHAPE[0])
    found = torch.ops.quantkit.nf4(x, packed.packed, packed.scale, *packed.nest, bias, SHAPE[0])
    bound = 2**-7 if dtype == torch.bfloat16 else 1e-5
    assert cases.relative_error(found, cases.expected(x, exact, bias)) < bound
    empty = torch.ops.quantkit.nf4(x[:0], packed.packed, packed.scale, *packed.nest, bias, SHAPE[0])
    assert empty.shape == (0, 3, SHAPE[0])


@pytest.mark.parametrize("device", ["triton", "cpu"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_the_op_is_well_formed(nested: bool, device: Any) -> None:
    codes, stored, parts, exact = make(nested)
    packed = nf4.pack(codes, stored, device, parts)
    x = cases.activations((2, SHAPE[1]), torch.bfloat16)
    arguments = (x, packed.packed, packed.scale, *packed.nest, None, SHAPE[0])
    torch.library.opcheck(torch.ops.quantkit.nf4.default, arguments)
    found = nf4.reference(*arguments)
    # Weights and result rounded to bfloat16.
    assert cases.relative_error(found, cases.expected(x, exact)) < 2**-7


def test_what_is_unsupported_is_said() -> None:
    wanted: dict[str, Any] = {
        "block": 64,
        "shape": (8, 128),
        "dtype": torch.bfloat16,
        "device": "cpu",
    }
    assert nf4.supported(**wanted) is None
    assert "straddle" in str(nf4.supported(**{**wanted, "shape": (8, 96)}))
    assert "blocks of 128" in str(nf4.supported(**{**wanted, "block": 128}))
