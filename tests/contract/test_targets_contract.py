"""What every target promises: the built-in ones, found by file name."""

from __future__ import annotations

import pytest
import torch
from reference import activations, weights

from quantkit.methods.parts import Retargeted, Target, available, make_part
from quantkit.methods.stats import Needs, Stats
from quantkit.numbers.scheme import Scheme

ROWS, COLUMNS, TOKENS = 12, 576, 700
SCHEME = Scheme.parse("w4a16_g32_asym")


@pytest.fixture(params=available("target"))
def part(request: pytest.FixtureRequest) -> Target:
    made: Target = make_part("target", request.param, {})
    return made


def stats(part: Target, unit: float = 1.0, dead: int | None = None) -> Stats:
    found = Stats.empty(COLUMNS, part.needs(SCHEME))
    x = unit * activations(TOKENS, COLUMNS, 1)
    if dead is not None:
        x[:, dead] = 0
    found.update_(x + 0.1 * x.roll(1, 0), name="x", original=x)
    found.finish_()
    return found


def test_answer_is_a_finite_weight_and_repeatable(part: Target) -> None:
    assert isinstance(part, Target) and isinstance(part.needs(SCHEME), Needs)
    given, weight = stats(part), weights(ROWS, COLUMNS, 2)
    before = weight.clone()
    first, second = (part(weight, given) for _ in range(2))
    assert isinstance(first, Retargeted)
    assert first.weight.shape == weight.shape and first.weight.dtype == torch.float32
    assert first.weight.is_contiguous() and bool(torch.isfinite(first.weight).all())
    assert torch.equal(first.weight, second.weight) and torch.equal(weight, before)


def test_rows_are_independent(part: Target) -> None:
    given, weight = stats(part), weights(ROWS, COLUMNS, 2)
    both = part(weight, given).weight
    # Products of other shapes add up in another order.
    torch.testing.assert_close(part(weight[3:5], given).weight, both[3:5], rtol=1e-4, atol=1e-6)


def test_without_statistics_the_weight_is_its_own_target(part: Target) -> None:
    weight = weights(ROWS, COLUMNS, 2)
    assert torch.equal(part(weight, None).weight, weight)
    nothing = Stats.empty(COLUMNS, part.needs(SCHEME))
    nothing.finish_()
    assert torch.equal(part(weight, nothing).weight, weight)


@pytest.mark.parametrize("unit", [2.0**-40, 2.0**20])
def test_weights_have_no_unit(part: Target, unit: float) -> None:
    given, weight = stats(part), weights(ROWS, COLUMNS, 2)
    assert torch.equal(part(unit * weight, given).weight, unit * part(weight, given).weight)


def test_activations_have_no_unit(part: Target) -> None:
    weight = weights(ROWS, COLUMNS, 2)
    small, plain = (part(weight, stats(part, unit)).weight for unit in (2.0**-20, 1.0))
    torch.testing.assert_close(small, plain, rtol=1e-4, atol=1e-6)


def test_a_dead_channel_keeps_its_weights(part: Target) -> None:
    weight = weights(ROWS, COLUMNS, 2)
    found = part(weight, stats(part, dead=7)).weight
    assert torch.equal(found[:, 7], weight[:, 7])
