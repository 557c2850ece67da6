"""Intervals and tests for paired measurements; every interval covers 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

RESAMPLES = 10_000
_BOOTSTRAP_SEED = 0
_Z_95 = 1.959963984540054
# Resamples drawn at a time, in elements: bounds memory for many windows.
_CHUNK_ELEMENTS = 1 << 22
_NEWTON_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float


def clustered_mean(sums_N: Tensor, counts_N: Tensor) -> tuple[float, Interval]:
    """Σ sums / Σ counts, the mean over all tokens, and Student's t interval of it over windows.

    Tokens of one window depend on each other, so windows are what varies: the ratio estimator's
    residuals (Cochran, Sampling Techniques, 1977, section 6.3); with equal counts the plain t
    interval of the windows' means.  Pairing is the caller's: pass sums of differences.  One window
    gives an infinite interval, because its spread is unknown.
    """
    sums, counts = sums_N.to(torch.float64).cpu(), counts_N.to(torch.float64).cpu()
    number = sums.numel()
    mean = (sums.sum() / counts.sum()).item()
    if number < 2:
        return mean, Interval(low=-math.inf, high=math.inf)
    residuals = (sums - mean * counts) / counts.mean()
    deviation = math.sqrt(residuals.square().sum().item() / (number - 1))
    half = t_quantile(0.975, number - 1) * deviation / math.sqrt(number)
    return mean, Interval(low=mean - half, high=mean + half)


def bootstrap_mean(values_N: Tensor) -> Interval:
    """Percentile-bootstrap interval of the mean of independent values, with a fixed seed.

    values_N: any float dtype.  Pairing is the caller's: pass differences.  One value gives an
    interval of no width, which says nothing; below 30 values it is too narrow: see clustered_mean.
    Efron, "Bootstrap methods: another look at the jackknife", 1979.
    """
    values = values_N.to(torch.float64).cpu()
    count = values.numel()
    generator = torch.Generator().manual_seed(_BOOTSTRAP_SEED)
    step = max(1, _CHUNK_ELEMENTS // count)
    means = []
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        chosen = torch.randint(count, (rows, count), generator=generator)
        means.append(values[chosen].mean(dim=1))
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), quantiles).tolist()
    return Interval(low=low, high=high)


def wilson(successes: int, count: int) -> Interval:
    """The score interval of a proportion.  Wilson, JASA 22 (1927).  Trials count as independent."""
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"{successes} of {count} is no proportion")
    share = successes / count
    spread = _Z_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = _Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return Interval(low=max(0.0, centre - half), high=min(1.0, centre + half))


def paired_drop(lost: int, gained: int, count: int) -> Interval:
    """Interval of (lost - gained) / count, the drop in accuracy of the same items asked twice.

    Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions
    based on paired data", J. Educ. Behav. Stat. 37 (2012): one flip of each kind and two items are
    added, so that no flips do not mean no doubt.
    """
    if min(lost, gained) < 0 or lost + gained > count or count == 0:
        raise ValueError(f"{lost} lost and {gained} gained of {count} items")
    down, up = (lost + 1) / (count + 2), (gained + 1) / (count + 2)
    half = _Z_95 * math.sqrt((down + up - (down - up) ** 2) / (count + 2))
    return Interval(low=max(-1.0, down - up - half), high=min(1.0, down - up + half))


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p that flips either way are equally likely.  McNemar, Psychometrika 1947.

    lost: right before and wrong after; gained: the other way.
    """
    flips = lost + gained
    tail = term = 1
    for k in range(min(lost, gained)):
        term = term * (flips - k) // (k + 1)
        tail += term
    # Integers of any size divide exactly; as floats they would overflow past 1000 flips.
    return min(1.0, 2 * tail / 2**flips)


def detectable_drop(flips: int, count: int, *, power: float = 0.8) -> float:
    """The smallest drop in accuracy that a two-sided test at 5 % finds with this power.

    (z_0.975 + z_power) · sqrt(share of flips / items), the normal approximation of McNemar's test
    (Connor, Biometrics 43 (1987), with the drop small against the flips).  Without any flip one is
    assumed.
    """
    total = _Z_95 + NormalDist().inv_cdf(power)
    return min(1.0, total * math.sqrt(max(flips, 1) / count / count))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """p values adjusted for their number, in the given order.  Holm, Scand. J. Stat. 6 (1979)."""
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return tuple(adjusted)


def t_quantile(share: float, freedom: int) -> float:
    """The quantile of Student's t distribution for a share in 0.5..1 and degrees of freedom >= 1.

    Newton's method on the exact distribution function; relative error below 1e-9.
    """
    if freedom > 10_000_000:
        return NormalDist().inv_cdf(share)
    # For one and two degrees the tails are too heavy for the start below, but closed forms exist.
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) / math.sqrt(2 * share * (1 - share))
    t = NormalDist().inv_cdf(share)
    for _ in range(_NEWTON_STEPS):
        step = (_t_cdf(t, freedom) - share) / _t_density(t, freedom)
        t -= step
        if abs(step) < 1e-12 * max(abs(t), 1.0):
            break
    return t


def _t_density(t: float, freedom: int) -> float:
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    tail = -(freedom + 1) / 2 * math.log1p(t * t / freedom)
    return math.exp(log_scale + tail) / math.sqrt(freedom * math.pi)


def _t_cdf(t: float, freedom: int) -> float:
    """Abramowitz and Stegun 26.7.3 and 26.7.4: finite sums, exact for whole degrees of freedom."""
    if freedom > 2000:
        # Their sums grow long; Hill's (1970) normal expansion is exact to 1e-12 there.
        a, b = freedom - 0.5, 48 * (freedom - 0.5) ** 2
        z = math.sqrt(a * math.log1p(t * t / freedom))
        z += ((z * z + 3) * z) / b - (4 * z**7 + 33 * z**5 + 240 * z**3 + 855 * z) / (
            10 * b * (b + 0.8 * z**4 + 100)
        )
        return NormalDist().cdf(math.copysign(z, t))
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle) ** 2
    if freedom % 2:
        term = total = math.cos(angle)
        for k in range(3, freedom - 1, 2):
            term *= cosine * (k - 1) / k
            total += term
        within = 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))
    else:
        term = total = 1.0
        for k in range(2, freedom - 1, 2):
            term *= cosine * (k - 1) / k
            total += term
        within = math.sin(angle) * total
    return (1 + within) / 2
