"""Intervals and tests against scipy, published examples and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from quantkit_eval.figures.statistics import (
    bootstrap_mean,
    clustered_mean,
    detectable_drop,
    holm,
    mcnemar,
    paired_drop,
    t_quantile,
    wilson,
)
from scipy import stats


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30, 255, 1999, 2001, 10**6])
def test_t_quantiles_are_scipys(freedom: int) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_equal_windows_give_the_plain_t_interval() -> None:
    means = torch.randn(23, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, interval = clustered_mean(means * 7, torch.full((23,), 7))
    expected = stats.t.interval(0.95, 22, loc=means.mean(), scale=stats.sem(means.numpy()))
    assert mean == pytest.approx(means.mean().item())
    assert (interval.low, interval.high) == pytest.approx(expected)


def test_unequal_windows_weigh_by_their_tokens() -> None:
    mean, interval = clustered_mean(torch.tensor([3.0, 20.0]), torch.tensor([1, 9]))
    assert mean == pytest.approx(2.3)
    assert interval.low < mean < interval.high


def test_one_window_tells_nothing_about_spread() -> None:
    mean, interval = clustered_mean(torch.tensor([3.0]), torch.tensor([2]))
    assert (mean, interval.low, interval.high) == (1.5, -math.inf, math.inf)


def test_interval_over_windows_covers_what_it_says() -> None:
    # KL divergences of tokens: skewed, with a level of each window's own.
    random = np.random.default_rng(0)
    windows, tokens, runs = 40, 50, 2000
    level = random.gamma(4.0, 0.25, size=(runs, windows, 1))
    sums = (random.exponential(0.01, size=(runs, windows, tokens)) * level).sum(-1)
    counts = torch.full((windows,), tokens)
    found = [clustered_mean(torch.from_numpy(row), counts)[1] for row in sums]
    covered = np.mean([interval.low <= 0.01 <= interval.high for interval in found])
    assert 0.93 <= covered <= 0.97


def test_intervals_over_tokens_would_not_cover() -> None:
    # The negative control: taking tokens for independent, the same data give too narrow intervals.
    random = np.random.default_rng(0)
    level = random.gamma(4.0, 0.25, size=(500, 40, 1))
    values = (random.exponential(0.01, size=(500, 40, 50)) * level).reshape(500, -1)
    half = 1.96 * values.std(1) / math.sqrt(values.shape[1])
    assert np.mean(abs(values.mean(1) - 0.01) <= half) < 0.90


def test_wilson_matches_published_values_and_scipy() -> None:
    # Newcombe (1998), table I: 81/263 and 0/20, method 3.
    got = wilson(81, 263)
    assert (round(got.low, 4), round(got.high, 4)) == (0.2553, 0.3662)
    got = wilson(0, 20)
    assert (round(got.low, 4), round(got.high, 4)) == (0.0, 0.1611)
    for hits, count in ((1, 7), (50, 100), (999, 1000)):
        expected = stats.binomtest(hits, count).proportion_ci(method="wilson")
        got = wilson(hits, count)
        assert (got.low, got.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("lost", "gained"), [(0, 0), (0, 5), (1, 9), (9, 1), (4, 4), (59, 16), (150, 86)]
)
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_holds_for_thousands_of_flips() -> None:
    assert mcnemar(2000, 2000) == 1.0
    assert mcnemar(1900, 2100) == pytest.approx(stats.binomtest(1900, 4000).pvalue, rel=1e-9)


def test_paired_interval_is_bonett_and_prices() -> None:
    # By hand, n = 98, 20 lost, 8 gained: (21 - 9) / 100 ± 1.96 sqrt((0.30 - 0.12²) / 100).
    got = paired_drop(20, 8, 98)
    half = 1.959964 * math.sqrt((0.30 - 0.0144) / 100)
    assert (got.low, got.high) == pytest.approx((0.12 - half, 0.12 + half), abs=1e-6)
    assert paired_drop(0, 0, 50).high > 0.0, "no flips do not mean no doubt"


@pytest.mark.parametrize(
    ("count", "lost", "gained"), [(200, 0.06, 0.02), (200, 0.1, 0.1), (1000, 0.03, 0.01)]
)
def test_paired_interval_covers_what_it_says(count: int, lost: float, gained: float) -> None:
    random = np.random.default_rng(1)
    drawn = random.multinomial(count, [lost, gained, 1 - lost - gained], size=4000)
    found = [paired_drop(int(b), int(c), count) for b, c, _ in drawn]
    covered = np.mean([i.low <= lost - gained <= i.high for i in found])
    assert 0.93 <= covered <= 0.97


def test_detectable_drop_is_found_four_times_in_five() -> None:
    # 2.8016 = z_0.975 + z_0.8; the example of 1000 questions with 8 % flips.
    assert detectable_drop(80, 1000) == pytest.approx(2.80159 * math.sqrt(0.08 / 1000), rel=1e-5)
    drop, flips, count = detectable_drop(100, 1000), 0.1, 1000
    random = np.random.default_rng(2)
    shares = [(flips + drop) / 2, (flips - drop) / 2, 1 - flips]
    drawn = random.multinomial(count, shares, size=2000)
    power = np.mean([mcnemar(int(b), int(c)) < 0.05 for b, c, _ in drawn])
    # The exact test is a little conservative against the normal approximation.
    assert 0.74 <= power <= 0.86


def test_holm_equals_the_published_procedure() -> None:
    # Holm (1979) by hand: 4 · 0.01, then 3 · 0.02, 2 · 0.03, 1 · 0.04, never falling.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx((0.06, 0.04, 0.06, 0.06))
    assert holm([0.5, 0.9]) == pytest.approx((1.0, 1.0))
    assert holm([]) == ()


def test_bootstrap_interval_has_the_width_of_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 3
    got = bootstrap_mean(values)
    width = 2 * 1.96 * values.std().item() / 20
    # 10,000 resamples place a 2.5 % quantile within a few percent.
    assert got.high - got.low == pytest.approx(width, rel=0.06)
    assert got == bootstrap_mean(values)
    assert got.low < values.mean() < got.high
