"""The kernel of calibration's moments, interpreted, against plain PyTorch and a sum in turn."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from quantkit_kernels.gpu import moments

SHAPES = [(1, 1), (3, 130), (256, 128), (257, 576), (700, 37)]


def activations(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    x = torch.randn(shape, generator=generator)
    # An outlier channel and a tiny one.
    x[:, -1] *= 300
    x[:, 0] *= 1e-6
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_are_those_of_plain_pytorch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = activations(shape, dtype)
    found, wanted = moments.column_moments(x), moments.reference(x)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == (shape[1],)
    assert torch.equal(found[2], wanted[2])
    for one, other in zip(found[:2], wanted[:2], strict=True):
        # Positive float64 numbers, a thousand of them at most, in another order.
        assert ((one - other).abs() <= 2**-43 * other).all()


def test_additions_have_one_order() -> None:
    x = activations((700, 5), torch.float32)
    found = moments.column_moments(x)
    again = moments.column_moments(x.t().contiguous().t())
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    # Parts of 256 tokens, one after the other; more tokens do not change what was added before.
    parts = [moments.column_moments(part)[0] for part in x.split(moments.PART)]
    assert torch.equal(found[0], (parts[0] + parts[1]) + parts[2])


def test_sums_are_as_good_as_exact_ones() -> None:
    x = activations((513, 3), torch.float32)
    exact = [math.fsum(abs(value) for value in column) for column in x.t().tolist()]
    found = moments.column_moments(x)[0].tolist()
    assert all(abs(a - b) <= 2**-45 * b for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_shows_in_its_channel_alone(bad: float) -> None:
    x = activations((300, 130), torch.bfloat16)
    x[290, 129] = bad
    largest = moments.column_moments(x)[2]
    assert not largest[129].isfinite() and largest[:129].isfinite().all()


def test_rows_may_lie_apart() -> None:
    wide = activations((40, 200), torch.float16)
    found, wanted = moments.column_moments(wide[:, 30:97]), moments.reference(wide[:, 30:97])
    assert torch.equal(found[2], wanted[2])
    assert ((found[0] - wanted[0]).abs() <= 2**-45 * wanted[0]).all()
