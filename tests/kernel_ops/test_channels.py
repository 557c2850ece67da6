"""The kernel that rounds channels in turn, in the interpreter, against the loop over channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.methods.columns import ColumnRounder, column_rounder
from quantkit.methods.extent import extent_of, scale_and_zero
from quantkit.numbers.scheme import Scheme

ROWS, CHANNELS, GROUP = 37, 21, 7
SCHEMES = ["w4a16_g32", "w3a16_g32_asym", "w8a8_row", "nf4_b64", "nvfp4a16", "fp8a16_row", "q4_k"]


def rounder(name: str, draw: torch.Generator) -> ColumnRounder:
    """Of three groups whose scales are powers of two, so that no sum below is ever rounded."""
    scheme = Scheme.parse(name)
    shape = (ROWS, CHANNELS // GROUP)
    scale = torch.exp2(torch.randint(-4, -1, shape, generator=draw).float())
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(0, 8, shape, generator=draw).float()
    if scheme.kind == "ggml":
        zero = torch.randint(-8, 8, shape, generator=draw).float() / 8
        scale[::5, 1] = 0
    return column_rounder(scheme, scale, zero)


def problem(draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, weights [B, R] and factors [B, B] of few bits."""
    weights = torch.randint(-64, 65, (CHANNELS, ROWS), generator=draw).float() / 32
    targets = weights + torch.randint(-8, 9, weights.shape, generator=draw).float() / 64
    factors = torch.randint(-2, 3, (CHANNELS, CHANNELS), generator=draw).float() / 4
    # Errors that are passed on again and again would need more and more bits.
    return targets, weights, factors * (torch.rand(factors.shape, generator=draw) < 0.15)


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_kernel_rounds_like_the_loop(name: str, down: bool) -> None:
    draw = torch.Generator().manual_seed(len(name))
    plain = rounder(name, draw)
    targets, weights, factors = problem(draw)
    groups = (torch.arange(CHANNELS) * 5 % CHANNELS // GROUP).to(torch.int32)
    errors, codes = torch.empty_like(weights), torch.empty_like(weights, dtype=torch.uint8)
    plain.solve(groups, targets.clone(), weights, errors, codes, factors, down=down)
    # The same rounder, as if its tensors were a GPU's.
    plain._grid = plain._fused(torch.device("cpu"))
    found = torch.full_like(weights, torch.nan), torch.full_like(codes, 255)
    plain.solve(groups, targets.clone(), weights, *found, factors, down=down)
    assert torch.equal(found[1], codes)
    assert torch.allclose(found[0], errors, rtol=0, atol=2e-6)


def test_ties_and_limits_are_those_of_the_loop() -> None:
    """Halves, what lies beyond the grid, and what is too large to be rounded by adding."""
    numbers = torch.tensor([0.5, 1.5, -0.5, 2.5, 7.5, 8.5, -8.5, 3e9, -3e9, 5.0, 0.25, -0.75])
    for name in SCHEMES:
        scheme = Scheme.parse(name)
        scale = torch.ones(len(numbers), 1)
        zero = torch.full_like(scale, 3.0) if not scheme.symmetric else None
        plain = column_rounder(scheme, scale, zero)
        groups, factors = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1)
        found = []
        for grid in (None, plain._fused(torch.device("cpu"))):
            plain._grid = grid
            error, codes = torch.empty(1, 12), torch.empty(1, 12, dtype=torch.uint8)
            plain.solve(
                groups, numbers[None].clone(), numbers[None], error, codes, factors, down=True
            )
            found.append(codes)
        assert torch.equal(*found), name


def test_a_group_gets_a_new_scale_in_the_kernel_too() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    scheme = Scheme.parse("w4a16_g32_asym")
    scale, zero = scale_and_zero(extent_of(weight[:, None, :]), scheme)
    plain = column_rounder(scheme, torch.ones(8, 2), torch.zeros(8, 2))
    assert zero is not None
    plain.set_group_(1, scale[:, 0, 0], zero[:, 0, 0])
    targets, groups = weight.t().contiguous(), torch.ones(16, dtype=torch.int32)
    found = []
    for grid in (None, plain._fused(torch.device("cpu"))):
        plain._grid = grid
        errors, codes = torch.empty(16, 8), torch.empty(16, 8, dtype=torch.uint8)
        zeros = torch.zeros(16, 16)
        plain.solve(groups, targets.clone(), targets, errors, codes, zeros, down=True)
        found.append(codes)
    assert torch.equal(*found) and len(found[0].unique()) > 8
