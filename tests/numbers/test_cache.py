"""Keys and values in float8 against a slow reference that knows all its numbers."""

from __future__ import annotations

import pytest
import torch

from quantkit.errors import SchemeError
from quantkit.numbers.cache import CACHE_NAMES, CacheScheme


def nearest_e4m3(x: float) -> float:
    """The nearest of all e4m3 numbers, ties to the even code, by trying all."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    found = [(abs(x - n), code & 1, n) for code, n in enumerate(numbers) if n == n]
    return min(found)[2]


def test_a_layer_has_one_scale_or_one_for_each_head() -> None:
    largest = torch.tensor([1.0, 3.0, 0.5])
    whole, heads = (CacheScheme.parse(name).scale(largest) for name in CACHE_NAMES)
    assert whole.shape == (1,) and heads.shape == (3, 1, 1)
    assert torch.equal(whole[0], heads[1, 0, 0])
    # Twice the largest number is held, and little more; every reader's dtype has the scale.
    for scale, most in zip(heads.flatten().tolist(), largest.tolist(), strict=True):
        assert 2 * most <= 448 * scale <= 2 * most * (1 + 2**-7)
    assert torch.equal(heads, heads.bfloat16().float())


def test_a_head_of_zeros_has_a_scale_that_divides() -> None:
    scale = CacheScheme.parse("fp8_head").scale(torch.tensor([0.0, 1.0]))
    assert scale[0].item() == 1
    assert torch.isfinite(
        CacheScheme.parse("fp8_head").rounded(torch.zeros(1, 2, 3, 4), scale)
    ).all()


def test_numbers_come_back_as_the_nearest_there_are() -> None:
    scheme = CacheScheme.parse("fp8_head")
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * 3
    x[0, 1, 0, 0] = 1e6
    scale = torch.tensor([0.01, 0.5, 2.0]).reshape(3, 1, 1)
    found = scheme.rounded(x, scale)
    for place, value in zip(
        torch.cartesian_prod(*map(torch.arange, x.shape)), x.flatten(), strict=True
    ):
        head = scale[place[1], 0, 0]
        wanted = nearest_e4m3(max(-448.0, min(448.0, float(value / head)))) * head
        assert found[tuple(place)] == wanted
    assert scheme.rounded(x.bfloat16(), scale).dtype == torch.bfloat16


def test_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(SchemeError, match="fp8 or fp8_head"):
        CacheScheme.parse("int8")
