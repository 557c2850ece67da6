"""The sixteen values that 4-bit codes index (no torch: the package reads them at its start)."""

from __future__ import annotations

# Sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
E2M1 = tuple(
    sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
)
# Quantiles of N(0, 1), normalised to [-1, 1] (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
