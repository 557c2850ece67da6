"""What every transform promises: the built-in ones, found by file name, and a third party's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from reference import activations, stats_of, weights

from quantkit.methods.parts import Reader, Transform, available, make_part
from quantkit.methods.stats import Needs, Stats
from quantkit.numbers.scheme import Scheme

TRANSFORMS = [*available("transform"), "third_party:HalfWay"]
SCHEMES = ["w4a16_g32_asym", "w3a16_row", "w8a8_row", "w4a8_g32", "nf4_b64_dq"]
COLUMNS = 128


@pytest.fixture(params=TRANSFORMS)
def part(request: pytest.FixtureRequest) -> Transform:
    made: Transform = make_part("transform", request.param, {})
    return made


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return Scheme.parse(request.param)


def readers(scheme: Scheme | None, seed: int = 2) -> list[Reader]:
    return [
        Reader(name="q", weight=weights(24, COLUMNS, seed), scheme=scheme),
        Reader(name="router", weight=weights(4, COLUMNS, seed + 1), scheme=None),
        Reader(name="k", weight=weights(8, COLUMNS, seed + 2), scheme=scheme),
    ]


def planted(seed: int = 1) -> torch.Tensor:
    x = activations(300, COLUMNS, seed, spread=0.3)
    x[:, 7] *= 60
    x[:, 50] *= 30
    return x


def check(scale: torch.Tensor | None) -> None:
    if scale is not None:
        assert scale.dtype == torch.float32 and scale.shape == (COLUMNS,)
        assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())


def test_answer_is_none_or_positive_and_repeatable(part: Transform, scheme: Scheme) -> None:
    assert isinstance(part, Transform)
    assert isinstance(part.needs(scheme), Needs)
    stats, given = stats_of(planted()), readers(scheme)
    before = [reader.weight.clone() for reader in given]
    first, second = (part(given, stats, None) for _ in range(2))
    check(first)
    assert (first is None) == (second is None)
    assert first is None or second is None or torch.equal(first, second)
    for reader, weight in zip(given, before, strict=True):
        assert torch.equal(reader.weight, weight)


def test_channels_of_one_producer_share_a_scale(part: Transform, scheme: Scheme) -> None:
    channel_map = torch.arange(COLUMNS) // 32 * 16 + torch.arange(COLUMNS) % 16
    scale = part(readers(scheme), stats_of(planted(3)), channel_map)
    check(scale)
    if scale is not None:
        for channel in channel_map.unique():
            assert len(scale[channel_map == channel].unique()) == 1


def test_small_weights_and_activations_get_the_same_proportions(
    part: Transform, scheme: Scheme
) -> None:
    given = readers(scheme, 6)
    small = [dataclasses.replace(r, weight=r.weight * 2.0**-30) for r in given]
    found = part(given, stats_of(planted(5)), None)
    for others, stats in ((small, planted(5)), (given, planted(5) * 2.0**-20)):
        again = part(others, stats_of(stats), None)
        assert (again is None) == (found is None)
        if found is not None and again is not None:
            # A method may balance weights against activations; the channels' proportions stay.
            torch.testing.assert_close(again / again.mean(), found / found.mean())


def test_dead_channels_and_zero_weights(part: Transform, scheme: Scheme) -> None:
    x = planted(4)
    x[:, 10:20] = 0
    given = readers(scheme, 5)
    for reader in given:
        reader.weight[:, 30:40] = 0
    check(part(given, stats_of(x), None))
    nothing = [Reader(name="q", weight=torch.zeros(8, COLUMNS), scheme=scheme)]
    check(part(nothing, stats_of(x), None))
    check(part(given, stats_of(torch.zeros(20, COLUMNS)), None))


def test_nothing_to_do(part: Transform, scheme: Scheme) -> None:
    empty = Stats.empty(COLUMNS, Needs(moments=True, gram=-1, sample=True))
    assert part(readers(scheme), empty, None) is None
    assert part(readers(None), stats_of(planted()), None) is None
