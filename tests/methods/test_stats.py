"""Statistics are sums: whatever the batches or parts, they are those of all tokens at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.methods.stats import SAMPLE_ROWS, Needs, Stats

ALL = Needs(moments=True, gram=-1, sample=True)


def activations(tokens: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(features, generator=generator) * 3
    return torch.randn(tokens, features, generator=generator) * scale


def gathered(batches: list[Tensor], needs: Needs = ALL) -> Stats:
    stats = Stats.empty(batches[0].shape[1], needs)
    for batch in batches:
        stats.update_(batch, name="x")
    stats.finish_()
    return stats


def same(a: Stats, b: Stats) -> None:
    assert a.count == b.count
    torch.testing.assert_close(a.sum_abs, b.sum_abs)
    torch.testing.assert_close(a.sum_sq, b.sum_sq)
    assert torch.equal(a.max_abs, b.max_abs)
    if a.gram is not None and b.gram is not None:
        # Float32 sums in another order.
        torch.testing.assert_close(a.gram, b.gram, rtol=1e-4, atol=1e-3)
    if a.sample is not None and b.sample is not None:
        assert torch.equal(a.sample, b.sample)


# 520 columns take two of the tiles that the product is computed in.
@pytest.mark.parametrize("features", [7, 64, 520])
def test_sums_are_those_of_the_definition(features: int) -> None:
    x = activations(100, features)
    stats = gathered([x])
    exact = x.double().T @ x.double()
    assert stats.gram is not None
    torch.testing.assert_close(stats.gram, exact.float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(stats.sum_abs, x.double().abs().sum(0))
    # Squares are taken in float32.
    torch.testing.assert_close(stats.sum_sq, x.double().square().sum(0), rtol=1e-6, atol=0)
    assert torch.equal(stats.max_abs, x.abs().amax(0))
    torch.testing.assert_close(stats.mean_abs, x.abs().mean(0))
    torch.testing.assert_close(stats.mean_sq, x.square().mean(0))


def test_a_block_diagonal_gram_is_part_of_the_whole() -> None:
    x = activations(50, 96)
    whole, blocks = gathered([x]).gram, gathered([x], Needs(gram=32)).gram
    assert whole is not None and blocks is not None and blocks.shape == (3, 32, 32)
    for index, block in enumerate(blocks):
        part = slice(32 * index, 32 * index + 32)
        torch.testing.assert_close(block, whole[part, part], rtol=1e-4, atol=1e-3)


def test_bfloat16_activations_are_summed_in_float32() -> None:
    x = activations(200, 48).to(torch.bfloat16)
    stats = gathered([x])
    assert stats.gram is not None
    torch.testing.assert_close(stats.gram, x.float().T @ x.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", [300, 1500], ids=["all sampled", "some sampled"])
def test_batches_do_not_matter(tokens: int) -> None:
    x = activations(tokens, 24)
    whole = gathered([x])
    same(gathered(list(x.split(7))), whole)
    same(gathered(list(x.split(599))), whole)
    assert whole.sample is not None and len(whole.sample) == min(tokens, SAMPLE_ROWS)
    assert all(bool((x == row).all(1).any()) for row in whole.sample[:5])


def test_the_sample_is_spread_over_all_tokens() -> None:
    x = torch.arange(20_000.0)[:, None]
    sample = gathered([x], Needs(sample=True)).sample
    assert sample is not None and len(set(sample[:, 0].tolist())) == SAMPLE_ROWS
    counts = torch.histc(sample, 4, 0, 20_000)
    # 128 a quarter are expected, with a standard deviation of 10.
    assert bool(((counts - 128).abs() < 50).all())


def test_parts_add_up() -> None:
    x = activations(100, 24)
    needs = Needs(moments=True, gram=-1)
    first, second = (Stats.empty(24, needs) for _ in range(2))
    first.update_(x[:30], name="x")
    second.update_(x[30:], name="x")
    first.merge_(second)
    first.finish_()
    same(first, gathered([x], needs))


def test_a_merged_sample_keeps_its_size() -> None:
    x = activations(1600, 4)
    first, second = gathered([x[:800]]), gathered([x[800:]])
    first.merge_(second)
    assert first.sample is not None and first.sample_keys is not None
    assert len(first.sample) == SAMPLE_ROWS
    assert bool((first.sample_keys.diff() >= 0).all())


@pytest.mark.parametrize("needs", [ALL, Needs(moments=True, gram=8, sample=True)], ids=str)
def test_rescaled_statistics_are_those_of_rescaled_activations(needs: Needs) -> None:
    x = activations(90, 24)
    scale = torch.rand(24, generator=torch.Generator().manual_seed(3)) + 0.2
    rescaled = gathered([x], needs).rescaled(scale)
    expected = gathered([x / scale], needs)
    assert rescaled.count == expected.count
    torch.testing.assert_close(rescaled.sum_abs, expected.sum_abs, rtol=1e-6, atol=0)
    torch.testing.assert_close(rescaled.sum_sq, expected.sum_sq, rtol=1e-5, atol=0)
    torch.testing.assert_close(rescaled.max_abs, expected.max_abs)
    torch.testing.assert_close(rescaled.gram, expected.gram, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rescaled.sample, expected.sample)


def test_rescaling_leaves_the_original_as_it_was() -> None:
    stats = gathered([activations(40, 8)])
    assert stats.gram is not None
    before = stats.gram.clone()
    stats.rescaled(torch.full((8,), 2.0))
    assert torch.equal(stats.gram, before)


def test_no_tokens_are_no_division_by_zero() -> None:
    stats = Stats.empty(4, ALL)
    stats.update_(torch.empty(0, 4), name="x")
    stats.finish_()
    assert stats.count == 0
    assert torch.equal(stats.mean_sq, torch.zeros(4))
    assert torch.equal(stats.mean_abs, torch.zeros(4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_names_the_input(value: float) -> None:
    x = activations(10, 4)
    x[7, 2] = value
    stats = Stats.empty(4, ALL)
    with pytest.raises(NumericsError, match=r"layers\.3\.mlp: an activation is NaN or infinite"):
        stats.update_(x, name="layers.3.mlp")
    assert stats.count == 0


def test_needs_add_up() -> None:
    assert not Needs()
    assert (Needs(gram=32) | Needs(gram=-1)).gram == -1
    assert (Needs(gram=-1) | Needs(moments=True)) == Needs(gram=-1, moments=True)
    assert (Needs(sample=True) | Needs(gram=64)) == Needs(sample=True, gram=64)


@pytest.mark.parametrize(("tokens", "features"), [(1, 64), (300, 129), (2048, 576), (7, 1000)])
def test_sums_have_the_bits_of_one_sum_over_all_tokens(tokens: int, features: int) -> None:
    x = activations(tokens, features)
    stats = gathered([x], Needs(moments=True))
    assert torch.equal(stats.sum_abs, x.abs().sum(0, dtype=torch.float64))
    assert torch.equal(stats.sum_sq, (x * x).sum(0, dtype=torch.float64))


@pytest.mark.parametrize("features", [64, 192, 193, 576])
def test_the_gram_matrix_is_the_product_of_all_tokens(features: int) -> None:
    x = activations(300, features).to(torch.bfloat16)
    gram = gathered([x], Needs(gram=-1)).gram
    assert gram is not None and torch.equal(gram, gram.T)
    # Sums of 300 float32 products.
    torch.testing.assert_close(gram, (x.double().T @ x.double()).float(), rtol=1e-4, atol=1e-3)
