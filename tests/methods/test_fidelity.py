"""Errors set against the grid's own, and numbers that a file cannot hold."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from reference import activations, stats_of, weights
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.methods.extent import extent_of
from quantkit.methods.fidelity import cost_of, unheld_groups
from quantkit.methods.ranges.minmax import Minmax
from quantkit.methods.recipe import load_recipe
from quantkit.methods.rounding.gptq import Gptq
from quantkit.methods.stats import Stats
from quantkit.model.fold import in_dtype
from quantkit.model.refs import WeightRef
from quantkit.numbers.grid import blocks
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale
from quantkit.pipeline.solve import Solved, quantize_weights

COLUMNS = 256
SCHEMES = [
    "w2a16_g32_asym",
    "w3a16_row",
    "w4a16_g128",
    "w5a16_g64_asym",
    "w6a16_g128",
    "w8a16_row",
    "w8a8_row",
    "fp8a8_row",
    "nf4_b64_dq",
    "fp4_b64",
]


def solve(
    weight: Tensor, scheme: Scheme, stats: Stats | None = None, method: str = "rtn"
) -> Solved:
    recipe = load_recipe(method)
    ref = WeightRef(name="up", parameter="up", block=0, input="x", shape=(len(weight), COLUMNS))
    (solved,) = quantize_weights(
        [ref],
        [weight],
        scheme,
        stats,
        target=None,
        range_part=recipe.make_range(),
        rounding=recipe.make_rounding(),
        dtype=torch.float32,
    )
    return solved


def unheld(weight: Tensor, scheme: Scheme) -> str | None:
    return unheld_groups(extent_of(blocks(weight, scheme)), scheme)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_expected_error_is_that_of_full_ranges_and_nearest_codes(name: str) -> None:
    scheme, weight = Scheme.parse(name), weights(64, COLUMNS, 0)
    cost = solve(weight, scheme).cost
    # Left over are the rounding of scales, and the second level of nested ones.
    assert cost.error == pytest.approx(cost.expected, rel=0.03, abs=2.0**-18)
    assert cost.note is None


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "best", "gptq_nf4"])
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("tokens", [4, 600])
def test_no_method_is_called_degraded_for_its_error(method: str, name: str, tokens: int) -> None:
    x = activations(tokens, COLUMNS, 1, spread=1.5)
    weight = weights(48, COLUMNS, 2)
    # Heavy tails: half of what makes coarse grids coarse.
    weight[:, 5] *= 20
    cost = solve(weight, Scheme.parse(name), stats_of(x), method).cost
    assert cost.note is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_error_beyond_the_grids_own_is_degraded(bits: int) -> None:
    scheme, weight = Scheme.parse(f"w{bits}a16_g32"), weights(64, COLUMNS, 3)
    solved = solve(weight, scheme)
    # As if every group had been given a step three times too small.
    scale = PlainScale(tensor=solved.tensor.scale.values() / 3)
    clipped = dataclasses.replace(solved.tensor, scale=scale)
    note = cost_of(weight, clipped, None).note
    assert note is not None and "far beyond" in note


@pytest.mark.parametrize("name", ["w4a16_g128", "w8a16_row", "w8a8_row", "fp8a16_row"])
@pytest.mark.parametrize("exponent", [0, -10, -20, -60, 20])
def test_small_weights_keep_their_error(name: str, exponent: int) -> None:
    scheme, weight = Scheme.parse(name), weights(64, COLUMNS, 4)
    for stats in (None, stats_of(activations(300, COLUMNS, 5))):
        whole = solve(weight, scheme, stats)
        scaled = solve(weight * 2.0**exponent, scheme, stats)
        assert scaled.degraded is None
        assert torch.equal(scaled.tensor.codes, whole.tensor.codes)
        # The same numbers in other units; the error's last bits are those of a sum.
        assert scaled.cost.error == pytest.approx(whole.cost.error, rel=1e-5)


@pytest.mark.parametrize("name", ["w2a16_g32", "w4a16_g128", "w4a16_g32_asym", "w8a16_row"])
def test_what_float16_scales_lose_is_told(name: str) -> None:
    scheme = dataclasses.replace(Scheme.parse(name), half_scales=True)
    weight = weights(64, COLUMNS, 6)
    whole = solve(weight, scheme).cost.error
    told = 0
    for exponent in range(0, -30, -2):
        solved = solve(weight * 2.0**exponent, scheme)
        assert not solved.tensor.scheme.half_scales
        values = solved.tensor.scale.values()
        assert torch.equal(values.half().float(), values)
        if solved.cost.error > 1.2 * whole:
            assert solved.degraded is not None and "float16 does not hold" in solved.degraded
            told += 1
    assert told > 0


def test_groups_that_a_file_cannot_hold_are_counted() -> None:
    scheme = dataclasses.replace(Scheme.parse("w4a16_g32"), half_scales=True)
    weight = weights(4, COLUMNS, 7)
    assert unheld(weight, scheme) is None
    weight[1, 32:64] *= 1e-6
    weight[2, :32] = 0
    weight[3, :32] *= 1e9
    note = unheld(weight, scheme)
    assert note is not None and note.startswith("2 of 32 groups need scales from")
    assert unheld(weight, Scheme.parse("w4a16_g32")) is None
    assert unheld(weight, Scheme.parse("nf4_b64")) is None


@pytest.mark.parametrize(
    "part", [Gptq(sweeps=2), Gptq(groups="dynamic", act_order=False)], ids=["sweeps", "dynamic"]
)
def test_scales_that_gptq_chooses_are_stored_alike(part: Gptq) -> None:
    scheme, weight = Scheme.parse("w4a16_g32"), weights(16, COLUMNS, 8)
    stats, small = stats_of(activations(400, COLUMNS, 9)), 2.0**-11
    first, second, half = (
        part(w, s, Minmax()("w", w, s, None).coding, None, stats)
        for w, s in (
            (weight, scheme),
            (weight * small, scheme),
            (weight * small, dataclasses.replace(scheme, half_scales=True)),
        )
    )
    assert first.scale is not None and second.scale is not None and half.scale is not None
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale * small, second.scale)
    assert torch.equal(half.scale.half().float(), half.scale)


def test_folding_out_of_a_dtype_is_an_error() -> None:
    weight = weights(16, COLUMNS, 10)
    assert torch.equal(in_dtype("w", weight, torch.float16), weight.half())
    assert torch.equal(in_dtype("w", weight * 1e-12, torch.bfloat16), (weight * 1e-12).bfloat16())
    with pytest.raises(NumericsError, match=r"w: rescaled to .* it overflows float16"):
        in_dtype("w", weight * 1e8, torch.float16)
    with pytest.raises(NumericsError, match=r"w: rescaled to .* it underflows float16"):
        in_dtype("w", weight * 1e-4, torch.float16)
