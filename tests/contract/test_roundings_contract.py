"""What every rounding promises: the built-in ones, found by file name, and a third party's."""

from __future__ import annotations

import pytest
import torch
from reference import activations, output_error, stats_of, weights

from quantkit.methods.parts import Rounding, available, make_part
from quantkit.methods.ranges.minmax import Minmax
from quantkit.methods.rounding.nearest import nearest_codes
from quantkit.methods.stats import Needs, Stats
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import decode_rows

ROUNDINGS = [*available("rounding"), "third_party:Plain"]
SCHEMES = [
    "w4a16_g32",
    "w3a16_g16_asym",
    "w2a16_row",
    "w8a8_row",
    "w4a8_g32",
    "w4afp8_g32",
    "fp8a8_row",
    "nf4_b64",
    "fp4_b64",
]
COLUMNS = 128


@pytest.fixture(params=ROUNDINGS)
def part(request: pytest.FixtureRequest) -> Rounding:
    made: Rounding = make_part("rounding", request.param, {})
    return made


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return Scheme.parse(request.param)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return activations(400, COLUMNS, 1)


@pytest.fixture(scope="module")
def stats(tokens: torch.Tensor) -> Stats:
    return stats_of(tokens)


def test_codes_fit_the_grid_and_beat_or_equal_nearest(
    part: Rounding, scheme: Scheme, stats: Stats, tokens: torch.Tensor
) -> None:
    assert isinstance(part, Rounding)
    assert isinstance(part.needs(scheme), Needs)
    weight = weights(24, COLUMNS, 2)
    found = Minmax()("w", weight, scheme, None)
    rounded = part(weight, scheme, found.coding, found.zero, stats)
    assert rounded.codes.dtype == torch.uint8 and rounded.codes.shape == weight.shape
    assert int(rounded.codes.max()) < 2**scheme.bits
    assert rounded.degraded is None
    scale = found.coding if rounded.scale is None else rounded.scale
    values = decode_rows(rounded.codes, scale, found.zero, scheme)
    nearest = decode_rows(
        nearest_codes(weight, scheme, found.coding, found.zero), found.coding, found.zero, scheme
    )
    assert output_error(weight, values, tokens) <= output_error(weight, nearest, tokens)


def test_same_input_gives_same_bits_and_is_left_alone(
    part: Rounding, scheme: Scheme, stats: Stats
) -> None:
    weight = weights(8, COLUMNS, 3)
    before = weight.clone()
    found = Minmax()("w", weight, scheme, None)
    scale, zero = found.coding.clone(), None if found.zero is None else found.zero.clone()
    first, second = (part(weight, scheme, found.coding, found.zero, stats) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(weight, before) and torch.equal(found.coding, scale)
    assert zero is None or (found.zero is not None and torch.equal(found.zero, zero))


def test_stacked_weights_get_the_codes_they_get_alone(
    part: Rounding, scheme: Scheme, stats: Stats
) -> None:
    weight = weights(12, COLUMNS, 4)
    found = Minmax()("w", weight, scheme, None)
    whole = part(weight, scheme, found.coding, found.zero, stats).codes
    parts = []
    for start in (0, 6):
        rows = slice(start, start + 6)
        zero = None if found.zero is None else found.zero[rows]
        parts.append(part(weight[rows], scheme, found.coding[rows], zero, stats).codes)
    # Matrix products of other sizes may round differently and tip a code here and there.
    assert float((whole != torch.cat(parts)).float().mean()) < 0.002


def test_zeros_stay_zeros(part: Rounding, scheme: Scheme, stats: Stats) -> None:
    weight = weights(6, COLUMNS, 5)
    weight[3] = 0
    found = Minmax()("w", weight, scheme, None)
    rounded = part(weight, scheme, found.coding, found.zero, stats)
    scale = found.coding if rounded.scale is None else rounded.scale
    values = decode_rows(rounded.codes, scale, found.zero, scheme)
    assert torch.equal(values[3], torch.zeros(COLUMNS))


def test_small_weights_get_the_same_codes(part: Rounding, scheme: Scheme, stats: Stats) -> None:
    weight, small = weights(6, COLUMNS, 9), 2.0**-40
    found, tiny = (Minmax()("w", part, scheme, None) for part in (weight, weight * small))
    rounded = part(weight, scheme, found.coding, found.zero, stats)
    again = part(weight * small, scheme, tiny.coding, tiny.zero, stats)
    assert torch.equal(again.codes, rounded.codes)
    if rounded.scale is not None:
        assert again.scale is not None and torch.equal(again.scale, rounded.scale * small)


def test_without_tokens_it_rounds_to_nearest_and_says_so(part: Rounding, scheme: Scheme) -> None:
    weight = weights(6, COLUMNS, 6)
    found = Minmax()("w", weight, scheme, None)
    empty = Stats.empty(COLUMNS, Needs(moments=True, gram=-1))
    for stats in (empty, None):
        rounded = part(weight, scheme, found.coding, found.zero, stats)
        nearest = nearest_codes(weight, scheme, found.coding, found.zero)
        assert torch.equal(rounded.codes, nearest)
        if part.needs(scheme):
            assert rounded.degraded is not None and "nearest" in rounded.degraded


def test_few_tokens_and_dead_channels_are_handled(part: Rounding, scheme: Scheme) -> None:
    x = activations(3, COLUMNS, 7)
    x[:, ::5] = 0
    weight = weights(6, COLUMNS, 8)
    found = Minmax()("w", weight, scheme, None)
    rounded = part(weight, scheme, found.coding, found.zero, stats_of(x))
    assert int(rounded.codes.max()) < 2**scheme.bits
    if rounded.scale is None:
        nearest = nearest_codes(weight, scheme, found.coding, found.zero)
        # A channel calibration never saw keeps its nearest codes: nothing speaks for others.
        assert torch.equal(rounded.codes[:, ::5], nearest[:, ::5])
