"""Grids: codes of the nearest value, values exact in every runtime's dtype."""

from __future__ import annotations

import math

import pytest
import torch
from quantkit_kernels.ops.codebook import NF4
from torch import Tensor

from quantkit.methods.extent import extent_of, scale_and_zero
from quantkit.numbers.grid import (
    FP4_VALUES,
    HALF_MAX,
    HALF_MIN,
    SCALE_MAX,
    SCALE_MIN,
    CodebookGrid,
    IntegerGrid,
    blocks,
    grid_of,
    store_scale,
    unblocks,
)
from quantkit.numbers.scheme import Scheme

INTEGERS = ["w2a16_g32", "w3a16_g32_asym", "w4a16_g32", "w4a16_g32_asym", "w8a16_row", "w8a8_row"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ranged(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """Groups [N, B] of a weight with the scale and zero that cover them."""
    groups = blocks(weight, scheme)
    scale, zero = scale_and_zero(extent_of(groups), scheme)
    return groups, scale, zero


@pytest.mark.parametrize(
    ("name", "low", "high", "center"),
    [
        ("w4a16_g32", 0, 15, 8),
        ("w2a16_g32", 0, 3, 2),
        ("w8a16_row", 0, 255, 128),
        ("w8a8_row", 1, 255, 128),
    ],
)
def test_integer_codes(name: str, low: int, high: int, center: int) -> None:
    assert grid_of(Scheme.parse(name)) == IntegerGrid(low=low, high=high, center=center)


@pytest.mark.parametrize("name", INTEGERS)
def test_codes_are_those_of_the_nearest_value(name: str) -> None:
    scheme = Scheme.parse(name)
    grid = grid_of(scheme)
    assert isinstance(grid, IntegerGrid)
    groups, scale, zero = ranged(normal(6, 64), scheme)
    codes = grid.encode(groups, scale, zero)
    assert torch.equal(codes, codes.round())
    assert grid.low <= codes.min() and codes.max() <= grid.high
    every = torch.arange(grid.low, grid.high + 1.0)
    values = grid.decode(
        every[None, None, :], scale[..., None], None if zero is None else zero[..., None]
    )
    nearest = (groups[..., None] - values).abs().amin(-1)
    error = (groups - grid.decode(codes, scale, zero)).abs()
    torch.testing.assert_close(error, nearest, rtol=0, atol=1e-6)
    assert torch.equal(grid.snap(groups, scale, zero), grid.decode(codes, scale, zero))


@pytest.mark.parametrize("name", INTEGERS)
def test_a_full_range_clips_by_less_than_a_step(name: str) -> None:
    scheme = Scheme.parse(name)
    for weight in (normal(6, 64), normal(6, 64).abs(), -normal(6, 64).abs() - 3):
        groups, scale, zero = ranged(weight, scheme)
        error = (groups - grid_of(scheme).snap(groups, scale, zero)).abs()
        # Half a step, and what rounding the scale to bfloat16 takes off the far end.
        steps = 2**scheme.bits - 1
        assert bool((error <= scale.abs() * (0.5 + steps * 2**-9) + 1e-6).all())


def test_a_group_without_negative_weights_is_not_clipped() -> None:
    scheme = Scheme.parse("w4a16_g32")
    groups, scale, zero = ranged(normal(4, 32).abs(), scheme)
    # Negative: the longer side of the grid lies where the weights are.
    assert torch.equal(scale, -store_scale(groups.amax(-1, keepdim=True) * 2 / 15))
    assert bool(((groups - grid_of(scheme).snap(groups, scale, zero)) / scale).abs().max() < 0.54)


@pytest.mark.parametrize("name", ["w4a16_g32_asym", "w3a16_g32_asym", "w8a16_g32_asym"])
def test_zeros_lie_where_every_format_can_hold_them(name: str) -> None:
    scheme = Scheme.parse(name)
    for shift in (-5.0, -0.5, 0.0, 0.5, 5.0):
        _, _, zero = ranged(normal(8, 32) + shift, scheme)
        assert zero is not None and torch.equal(zero, zero.round())
        assert zero.min() >= 1 and zero.max() <= 2**scheme.bits - 1


@pytest.mark.parametrize("name", [*INTEGERS, "nf4_b64", "fp4_b64"])
def test_a_group_of_zeros_decodes_to_zeros(name: str) -> None:
    scheme = Scheme.parse(name)
    groups, scale, zero = ranged(torch.zeros(2, 64), scheme)
    assert not grid_of(scheme).snap(groups, scale, zero).any()


def test_stored_scales_are_the_nearest_bfloat16_values() -> None:
    given = normal(1000) * torch.logspace(-30, 30, 1000)
    scale = store_scale(given)
    assert torch.equal(scale, given.bfloat16().float())
    extremes = store_scale(torch.tensor([1e-45, -1e-40, 3e38, 0.0]))
    assert torch.equal(extremes, torch.tensor([SCALE_MIN, -SCALE_MIN, SCALE_MAX, 2.0**-14]))


def test_scales_for_float16_are_exact_in_every_dtype() -> None:
    given = normal(1000) * torch.logspace(-9, 9, 1000)
    scale = store_scale(given, half=True)
    assert scale.dtype == torch.float32
    assert scale.abs().min() == HALF_MIN and scale.abs().max() == HALF_MAX
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(scale.to(dtype).float(), scale)
    assert torch.equal(store_scale(scale, half=True), scale)
    # From 2^-17 on float16 has all of bfloat16's bits, below it is off by half of 2^-24 at most.
    exact = (given.abs() >= 2.0**-17) & (given.abs() <= HALF_MAX)
    assert torch.equal(scale[exact], store_scale(given)[exact])
    small = (given.abs() >= HALF_MIN) & (given.abs() < 2.0**-17)
    rounding = HALF_MIN / 2 + given.abs() * 2.0**-8
    assert bool(((scale - given).abs() <= rounding)[small].all()) and int(small.sum()) > 50


@pytest.mark.parametrize(("name", "values"), [("nf4_b64", NF4), ("fp4_b64", FP4_VALUES)])
def test_codebooks_give_the_nearest_value(name: str, values: tuple[float, ...]) -> None:
    grid = grid_of(Scheme.parse(name))
    assert isinstance(grid, CodebookGrid) and len(values) == 16
    x = normal(50, 64)
    scale = x.abs().amax(1, keepdim=True)
    table = torch.tensor(values)
    error = (x - grid.decode(grid.encode(x, scale, None), scale, None)).abs()
    nearest = (x[..., None] - table * scale[..., None]).abs().amin(-1)
    torch.testing.assert_close(error, nearest, rtol=0, atol=1e-6)
    assert torch.equal(
        grid.snap(x, scale, None), grid.decode(grid.encode(x, scale, None), scale, None)
    )
    exact = table[None].expand(3, 16)
    assert torch.equal(grid.snap(exact, torch.ones(3, 1), None), exact)


def test_nf4_reaches_the_error_that_bitsandbytes_tests_for() -> None:
    scheme = Scheme.parse("nf4_b64")
    groups = blocks(normal(1024, 1024), scheme)
    scale = groups.abs().amax(1, keepdim=True)
    error = float((groups - grid_of(scheme).snap(groups, scale, None)).abs().mean())
    # bitsandbytes' own gate: 0.072798 with a standard deviation of 0.000074 over its seeds.
    assert math.isclose(error, 0.072798, abs_tol=3 * 0.000074)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [("w4a16_g32", (3, 64), 6), ("w4a16_row", (3, 50), 3), ("nf4_b64", (5, 33), 3)],
)
def test_blocks_and_back(name: str, shape: tuple[int, int], count: int) -> None:
    scheme = Scheme.parse(name)
    weight = normal(*shape)
    grouped = blocks(weight, scheme)
    assert grouped.shape == (count, scheme.group_size or shape[1])
    assert torch.equal(unblocks(grouped, shape), weight)
    assert not grouped.reshape(-1)[weight.numel() :].any()


def test_fp8_encodes_every_e4m3_number_as_itself() -> None:
    """Against the definition: sign, exponent bias 7, three mantissa bits, no infinities."""
    grid = grid_of(Scheme.parse("fp8a16_row"))
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F])
    exponent, mantissa = codes >> 3 & 15, (codes & 7) / 8
    magnitude = torch.where(exponent == 0, mantissa * 2**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    values = torch.where(codes > 127, -magnitude, magnitude)
    scale = torch.tensor(0.25)
    assert torch.equal(grid.decode(codes, scale, None), values * 0.25)
    assert torch.equal(grid.encode(values * 0.25, scale, None).long(), codes)
    assert grid.decode(codes, scale, None).max() == 448 * 0.25


def test_fp8_takes_the_nearest_number_and_saturates() -> None:
    grid = grid_of(Scheme.parse("fp8a8_row"))
    table = grid.decode(torch.arange(127), torch.ones(1), None)
    x = normal(1000) * 100
    found = grid.snap(x, torch.ones(1), None)
    nearest = (x.abs()[:, None] - table).abs().amin(1)
    assert torch.equal((x - found).abs(), nearest)
    assert torch.equal(found, grid.decode(grid.encode(x, torch.ones(1), None), torch.ones(1), None))
    assert grid.snap(torch.tensor([1e6, -449.0]), torch.ones(1), None).tolist() == [448.0, -448.0]
