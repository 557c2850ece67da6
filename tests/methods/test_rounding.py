"""GPTQ against its definition, the two bugs of the reference code, and every fallback."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from reference import (
    activations,
    decode,
    gptq_codes,
    output_error,
    snap_one,
    stats_of,
    weights,
)

from quantkit.errors import RecipeError
from quantkit.methods.extent import extent_of, scale_and_zero
from quantkit.methods.feedback import factorize, feedback_of
from quantkit.methods.parts import make_part
from quantkit.methods.ranges.minmax import Minmax
from quantkit.methods.ranges.weighted_mse import WeightedMse
from quantkit.methods.rounding.gptq import Gptq
from quantkit.methods.rounding.nearest import nearest_codes
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import decode_rows

SCHEMES = [
    "w2a16_g16_asym",
    "w3a16_row",
    "w4a16_g32",
    "w4a16_g16_asym",
    "w8a8_row",
    "nf4_b64",
    "fp4_b32_dq",
]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("act_order", [True, False], ids=["act_order", "in_order"])
def test_gptq_equals_its_definition(name: str, act_order: bool) -> None:
    scheme, x = Scheme.parse(name), activations(150, 64, 1)
    x[:, 9] = 0
    stats, weight = stats_of(x), weights(5, 64, 2)
    found = Minmax()("w", weight, scheme, None)
    rounded = Gptq(act_order=act_order)(weight, scheme, found.coding, found.zero, stats)
    assert stats.gram is not None
    expected = gptq_codes(
        weight, stats.gram, scheme, found.coding, found.zero, damp=0.01, act_order=act_order
    )
    # float32 against float64 may tip a tie; one code that tips moves a few others of its row.
    assert float((rounded.codes != expected).float().mean()) < 0.01
    error = output_error(weight, decode_rows(rounded.codes, found.coding, found.zero, scheme), x)
    wanted = output_error(weight, decode(expected, scheme, found.coding, found.zero), x)
    assert error == pytest.approx(wanted, rel=0.01)


def test_block_size_does_not_change_the_codes() -> None:
    scheme, weight = Scheme.parse("w4a16_g16_asym"), weights(40, 160, 3)
    stats = stats_of(activations(300, 160, 4))
    found = Minmax()("w", weight, scheme, None)
    codes = [
        Gptq(block=block)(weight, scheme, found.coding, found.zero, stats).codes
        for block in (1, 7, 32, 128, 1000)
    ]
    for other in codes[1:]:
        # Sums in another order differ in the last bit, which tips a tie now and then.
        assert float((codes[0] != other).float().mean()) < 0.002


def test_rows_are_solved_alike_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, weight = Scheme.parse("w4a16_g32"), weights(50, 64, 5)
    stats = stats_of(activations(200, 64, 6))
    scale = Minmax()("w", weight, scheme, None).coding
    whole = Gptq(sweeps=1)(weight, scheme, scale, None, stats)
    monkeypatch.setattr("quantkit.methods.rounding.gptq._CHUNK_ROWS", 16)
    chunked = Gptq(sweeps=1)(weight, scheme, scale, None, stats)
    assert float((whole.codes != chunked.codes).float().mean()) < 0.002


def test_trap_a_one_signed_group_is_not_clipped() -> None:
    """The reference code keeps xmin = 0 there and clips above 7/15 of the maximum."""
    scheme, weight = Scheme.parse("w4a16_g32"), torch.linspace(0.1, 1.0, 32).repeat(3, 1)
    found = Minmax()("w", weight, scheme, None)
    stats = stats_of(activations(100, 32, 7, spread=0.1))
    rounded = Gptq()(weight, scheme, found.coding, None, stats)
    values = decode_rows(rounded.codes, found.coding, None, scheme)
    assert float(found.coding[0, 0]) == pytest.approx(-2 / 15, rel=2**-8)
    assert float(values.max()) > 0.9


@pytest.mark.parametrize("group", [16, 32, 64])
def test_trap_b_dynamic_groups_see_corrections_inside_the_block(group: int) -> None:
    """The reference code takes a group's range from weights that lack the block's corrections."""
    scheme, weight = Scheme.parse(f"w3a16_g{group}"), weights(6, 64, 8)
    x = activations(200, 64, 9)
    stats = stats_of(x)
    first = Minmax()("w", weight, scheme, None)
    rounded = Gptq(act_order=False, groups="dynamic", block=64)(
        weight, scheme, first.coding, None, stats
    )
    assert rounded.scale is not None and stats.gram is not None
    expected = _dynamic_scales(weight, stats.gram, scheme, group)
    # Scales are bfloat16; float32 against float64 may round one to its neighbour.
    torch.testing.assert_close(rounded.scale, expected, rtol=2**-7, atol=0)
    assert float((rounded.scale != expected).float().mean()) < 0.05
    assert torch.equal(rounded.scale[:, 0], first.coding[:, 0])
    if group < 64:
        assert not torch.equal(rounded.scale[:, 1:], first.coding[:, 1:])


def _dynamic_scales(
    weight: torch.Tensor, gram: torch.Tensor, scheme: Scheme, group: int
) -> torch.Tensor:
    """Scales of groups taken from the corrected weights, column by column in float64."""
    hessian = gram.double().clone()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse, work = torch.linalg.inv(hessian), weight.double().clone()
    rows, columns = weight.shape
    scales = torch.zeros(rows, columns // group)
    for i in range(columns):
        if i % group == 0:
            extent = extent_of(work[:, i : i + group].float())
            scales[:, i // group] = scale_and_zero(extent, scheme)[0][:, 0]
        for o in range(rows):
            scale = float(scales[o, i // group])
            value = snap_one(float(work[o, i]), scheme, scale, None)[1]
            work[o, i + 1 :] -= (work[o, i] - value) / inverse[i, i] * inverse[i, i + 1 :]
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1, :] / inverse[i, i]
    return scales


def test_dynamic_asymmetric_zeros_follow_their_scales() -> None:
    scheme, weight = Scheme.parse("w4a16_g16_asym"), weights(8, 64, 10)
    x = activations(200, 64, 11)
    first = Minmax()("w", weight, scheme, None)
    rounded = Gptq(act_order=False, groups="dynamic")(
        weight, scheme, first.coding, first.zero, stats_of(x)
    )
    assert rounded.scale is not None and rounded.zero is not None
    assert int(rounded.zero.min()) >= 1 and int(rounded.zero.max()) <= 15
    values = decode_rows(rounded.codes, rounded.scale, rounded.zero, scheme)
    nearest = decode_rows(
        nearest_codes(weight, scheme, first.coding, first.zero), first.coding, first.zero, scheme
    )
    assert output_error(weight, values, x) < output_error(weight, nearest, x)


@pytest.mark.parametrize("name", ["w3a16_g16", "w4a16_g32_asym", "w4a16_row", "nf4_b64"])
def test_sweeps_lower_the_error_every_time(name: str) -> None:
    scheme, weight, x = Scheme.parse(name), weights(20, 64, 12), activations(300, 64, 13)
    stats = stats_of(x)
    found = WeightedMse()("w", weight, scheme, stats)
    errors = []
    for sweeps in (0, 1, 3):
        rounded = Gptq(sweeps=sweeps, damp=1e-6)(weight, scheme, found.coding, found.zero, stats)
        scale = found.coding if rounded.scale is None else rounded.scale
        zero = found.zero if rounded.zero is None else rounded.zero
        if scheme.kind == "int":
            assert torch.equal(scale.bfloat16().float(), scale)
        errors.append(output_error(weight, decode_rows(rounded.codes, scale, zero, scheme), x))
    assert errors[0] > errors[1] >= errors[2]


def test_sweeps_end_where_no_single_code_can_improve() -> None:
    scheme, weight, x = Scheme.parse("w3a16_row"), weights(4, 24, 14), activations(200, 24, 15)
    stats = stats_of(x)
    scale = Minmax()("w", weight, scheme, None).coding
    rounded = Gptq(sweeps=30, damp=0.0)(weight, scheme, scale, None, stats)
    codes, scale = rounded.codes, scale if rounded.scale is None else rounded.scale
    least = output_error(weight, decode_rows(codes, scale, None, scheme), x)
    for o in range(4):
        for i in range(24):
            for step in (-1, 1):
                changed = codes.clone().to(torch.int16)
                changed[o, i] += step
                if 0 <= int(changed[o, i]) <= 7:
                    values = decode_rows(changed.to(torch.uint8), scale, None, scheme)
                    # Equal up to float32 rounding of the running residual.
                    assert output_error(weight, values, x) >= least * (1 - 1e-4)


def test_nested_scales_are_left_alone_by_sweeps() -> None:
    scheme, weight = Scheme.parse("nf4_b64_dq"), weights(8, 64, 16)
    stats = stats_of(activations(100, 64, 17))
    found = WeightedMse()("w", weight, scheme, stats)
    assert Gptq(sweeps=2)(weight, scheme, found.coding, None, stats).scale is None


def test_feedback_is_gptqs_inverse_factor() -> None:
    """Column-scaled factors of H and of its inverse are each other's inverse."""
    gram = stats_of(activations(100, 24, 18)).gram
    assert gram is not None
    feedback = factorize(gram, damp=0.01, act_order=False)
    assert feedback is not None
    hessian = gram.double() / gram.diagonal().mean()
    hessian.diagonal().add_(0.01)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    unit = upper / upper.diagonal()[:, None]
    forward = feedback.lower.flip(0, 1).double()
    # float32 against float64 on a matrix of condition number about 1e3.
    torch.testing.assert_close(torch.linalg.inv(unit), forward, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        feedback.loss.flip(0).double(), 1 / upper.diagonal().square(), rtol=1e-3, atol=0
    )


def test_rank_deficient_gram_is_solved_by_damping() -> None:
    scheme, weight = Scheme.parse("w4a16_g32"), weights(8, 64, 19)
    x = activations(5, 64, 20)
    scale = Minmax()("w", weight, scheme, None).coding
    rounded = Gptq()(weight, scheme, scale, None, stats_of(x))
    assert rounded.degraded is None
    nearest = decode_rows(nearest_codes(weight, scheme, scale, None), scale, None, scheme)
    values = decode_rows(rounded.codes, scale, None, scheme)
    assert output_error(weight, values, x) < 0.5 * output_error(weight, nearest, x)


def test_indefinite_gram_raises_the_damping_and_says_so() -> None:
    stats, weight = stats_of(activations(100, 32, 21)), weights(4, 32, 22)
    assert stats.gram is not None
    scheme = Scheme.parse("w4a16_g32")
    scale = Minmax()("w", weight, scheme, None).coding
    stats.gram -= 0.05 * stats.gram.diagonal().mean() * torch.eye(32)
    rounded = Gptq()(weight, scheme, scale, None, stats)
    assert rounded.degraded is not None and "damping raised to 0.1" in rounded.degraded


def test_hopeless_gram_rounds_to_nearest_and_says_so() -> None:
    stats, weight = stats_of(activations(100, 32, 23)), weights(4, 32, 24)
    assert stats.gram is not None
    stats.gram[3, 4] = stats.gram[4, 3] = -1e6 * stats.gram.abs().max()
    scheme = Scheme.parse("w4a16_g32")
    scale = Minmax()("w", weight, scheme, None).coding
    rounded = Gptq()(weight, scheme, scale, None, stats)
    assert rounded.degraded is not None and "nearest" in rounded.degraded
    assert torch.equal(rounded.codes, nearest_codes(weight, scheme, scale, None))


def test_blocks_that_straddle_rows_round_to_nearest_and_say_so() -> None:
    scheme, weight = Scheme.parse("nf4_b64"), weights(5, 40, 25)
    found = Minmax()("w", weight, scheme, None)
    rounded = Gptq()(weight, scheme, found.coding, None, stats_of(activations(50, 40, 26)))
    assert rounded.degraded is not None and "straddle" in rounded.degraded
    assert torch.equal(rounded.codes, nearest_codes(weight, scheme, found.coding, None))


def test_range_and_rounding_share_one_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: object, **options: object) -> object:
        calls.append(options)
        return factorize(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("quantkit.methods.feedback.factorize", counted)
    scheme, weight = Scheme.parse("w4a16_g32"), weights(6, 64, 27)
    stats = stats_of(activations(100, 64, 28))
    found = [WeightedMse(metric="pivot")("w", rows, scheme, stats) for rows in weight.split(3)]
    assert stats.factor is not None
    Gptq()(weight, scheme, torch.cat([f.coding for f in found]), None, stats)
    assert len(calls) == 1 and stats.factor is None
    feedback_of(stats, damp=0.02, act_order=True, keep=True)
    feedback_of(stats, damp=0.03, act_order=True, keep=False)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"damp": 2.0},
        {"block": 0},
        {"sweeps": -1},
        {"groups": "both"},
        {"groups": "dynamic"},
        {"dmap": 0.01},
    ],
    ids=str,
)
def test_bad_options_are_recipe_errors(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="gptq"):
        make_part("rounding", "gptq", options)


def test_nearest_codes_in_bounded_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, weight = Scheme.parse("w4a16_g16_asym"), weights(33, 64, 29)
    found = Minmax()("w", weight, scheme, None)
    whole = nearest_codes(weight, scheme, found.coding, found.zero)
    monkeypatch.setattr("quantkit.methods.rounding.nearest._CHUNK_ELEMENTS", 200)
    assert torch.equal(nearest_codes(weight, scheme, found.coding, found.zero), whole)
    assert found.zero is not None
    for o, i in ((0, 0), (7, 33), (32, 63)):
        scale, zero = float(found.coding[o, i // 16]), float(found.zero[o, i // 16])
        assert int(whole[o, i]) == snap_one(float(weight[o, i]), scheme, scale, zero)[0]


def test_parts_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Gptq().damp = 0.5  # type: ignore[misc]
