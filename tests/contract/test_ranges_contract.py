"""What every range promises: the built-in ones, found by file name, and a third party's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from reference import activations, stats_of, weights
from torch import Tensor

from quantkit.methods.parts import GroupRange, Range, available, make_part
from quantkit.methods.rounding.nearest import nearest_codes
from quantkit.methods.stats import Needs, Stats
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import QuantizedTensor

RANGES = [*available("range"), "third_party:Tighter"]
SCHEMES = [
    "w4a16_g32",
    "w4a16_g16_asym",
    "w2a16_g32_asym",
    "w3a16_row",
    "w8a16_row_asym",
    "w8a8_row",
    "w4a8_g32",
    "w4afp8_g32",
    "fp8a8_row",
    "nf4_b64",
    "nf4_b64_dq",
    "fp4_b32_dq",
]
COLUMNS = 128


@pytest.fixture(params=RANGES)
def part(request: pytest.FixtureRequest) -> Range:
    made: Range = make_part("range", request.param, {})
    return made


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return Scheme.parse(request.param)


@pytest.fixture(scope="module")
def stats() -> Stats:
    return stats_of(activations(300, COLUMNS, 1))


def values(weight: Tensor, scheme: Scheme, found: GroupRange) -> Tensor:
    """What nearest rounding in this range decodes to."""
    codes = nearest_codes(weight, scheme, found.coding, found.zero)
    zero = None if found.zero is None else found.zero.to(torch.uint8)
    tensor = QuantizedTensor(
        codes=codes, scale=found.scale, zero=zero, scheme=scheme, dtype=torch.float32
    )
    tensor.check("w")
    return tensor.dequantize()


def test_answer_has_the_promised_shapes_and_values(
    part: Range, scheme: Scheme, stats: Stats
) -> None:
    assert isinstance(part, Range)
    assert isinstance(part.needs(scheme), Needs)
    weight = weights(24, COLUMNS, 2)
    found = part("layers.0.mlp.up_proj.weight", weight, scheme, stats)
    groups = (24, COLUMNS // (scheme.group_size or COLUMNS))
    assert found.scale.values().shape == found.coding.shape == groups
    assert found.coding.dtype == torch.float32
    signed = scheme.kind == "int" and scheme.symmetric and scheme.bits < 8
    assert bool((found.coding.abs() if signed else found.coding).gt(0).all())
    if scheme.symmetric:
        assert found.zero is None
    else:
        assert found.zero is not None and found.zero.shape == groups
        assert torch.equal(found.zero, found.zero.round())
        # GPTQ's first file format stores zero - 1, so zero itself must not be 0.
        assert int(found.zero.min()) >= 1 and int(found.zero.max()) < 2**scheme.bits
    if scheme.kind == "int":
        assert torch.equal(found.scale.values(), found.coding)
        assert torch.equal(found.coding.bfloat16().float(), found.coding)
    # A range that fits keeps most of the weight at four bits and more.
    kept = 1 - float((values(weight, scheme, found) - weight).square().mean() / weight.var())
    assert kept > (0.97 if scheme.bits >= 4 else 0.5)


def test_same_input_gives_same_bits_and_is_left_alone(
    part: Range, scheme: Scheme, stats: Stats
) -> None:
    weight = weights(8, COLUMNS, 3)
    before, gram = weight.clone(), stats.gram
    first, second = (part("w", weight, scheme, stats) for _ in range(2))
    assert torch.equal(first.coding, second.coding)
    assert torch.equal(weight, before)
    assert stats.gram is gram


def test_rows_do_not_depend_on_each_other(part: Range, scheme: Scheme, stats: Stats) -> None:
    if scheme.double_quant:
        pytest.skip("nested scales share a mean")
    weight = weights(10, COLUMNS, 4)
    whole = part("w", weight, scheme, stats)
    pieces = [part("w", rows, scheme, stats) for rows in weight.split(4)]
    assert torch.equal(whole.coding, torch.cat([piece.coding for piece in pieces]))


def test_group_of_zeros_decodes_to_zeros(part: Range, scheme: Scheme, stats: Stats) -> None:
    weight = weights(6, COLUMNS, 5)
    weight[2] = 0
    decoded = values(weight, scheme, part("w", weight, scheme, stats))
    assert torch.equal(decoded[2], torch.zeros(COLUMNS))
    nothing = torch.zeros(6, COLUMNS)
    assert torch.equal(values(nothing, scheme, part("w", nothing, scheme, stats)), nothing)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
def test_group_of_one_sign_is_covered(
    part: Range, scheme: Scheme, stats: Stats, sign: float
) -> None:
    weight = sign * torch.linspace(0.1, 1.0, COLUMNS).repeat(4, 1)
    decoded = values(weight, scheme, part("w", weight, scheme, stats))
    # Clipping at 7/15 of the maximum (the trap of one-signed groups) would lose over a half.
    assert float((decoded - weight).abs().max()) < (0.35 if scheme.bits >= 3 else 0.55)


def test_single_outlier_and_tiny_weights_stay_finite(
    part: Range, scheme: Scheme, stats: Stats
) -> None:
    weight = weights(6, COLUMNS, 6)
    weight[0, 5] = 1e4
    weight[1] *= 1e-12
    weight[2, 7] = -3e4
    decoded = values(weight, scheme, part("w", weight, scheme, stats))
    assert bool(torch.isfinite(decoded).all())


def test_small_weights_have_the_same_range(part: Range, scheme: Scheme, stats: Stats) -> None:
    weight, small = weights(6, COLUMNS, 12), 2.0**-40
    found, tiny = part("w", weight, scheme, stats), part("w", weight * small, scheme, stats)
    assert torch.equal(tiny.coding, found.coding * small)
    assert torch.equal(tiny.scale.values(), found.scale.values() * small)
    if found.zero is not None:
        assert tiny.zero is not None and torch.equal(tiny.zero, found.zero)


@pytest.mark.parametrize("size", [1e4, 1.0, 2.0**-12, 2.0**-20, 2.0**-30])
def test_half_scales_are_those_that_float16_holds(
    part: Range, scheme: Scheme, stats: Stats, size: float
) -> None:
    weight = weights(6, COLUMNS, 13) * size
    half = part("w", weight, dataclasses.replace(scheme, half_scales=True), stats)
    wide = part("w", weight, scheme, stats)
    if scheme.flat:
        # Block scales are float32 in every format.
        assert torch.equal(half.coding, wide.coding)
        return
    assert torch.equal(half.coding.half().float(), half.coding)
    assert torch.equal(half.coding.bfloat16().float(), half.coding)
    if float(wide.coding.abs().min()) >= 2.0**-17:
        assert torch.equal(half.coding, wide.coding)


def test_without_tokens_it_still_answers(part: Range, scheme: Scheme) -> None:
    weight = weights(6, COLUMNS, 7)
    empty = Stats.empty(COLUMNS, Needs(moments=True, gram=-1, sample=True))
    found = part("w", weight, scheme, empty)
    assert bool(torch.isfinite(values(weight, scheme, found)).all())
    if part.needs(scheme):
        assert found.degraded is not None and "calibration" in found.degraded


def test_dead_channels_do_not_spoil_the_range(part: Range, scheme: Scheme) -> None:
    x = activations(200, COLUMNS, 8)
    x[:, :40] = 0
    weight = weights(6, COLUMNS, 9)
    found = part("w", weight, scheme, stats_of(x))
    error = (values(weight, scheme, found) - weight).square().mean() / weight.var()
    assert float(error) < (0.05 if scheme.bits >= 4 else 0.6)


@pytest.mark.parametrize("name", ["nf4_b64", "fp4_b64_dq"])
def test_blocks_that_straddle_rows(part: Range, name: str) -> None:
    scheme, weight = Scheme.parse(name), weights(7, 40, 10)
    found = part("w", weight, scheme, stats_of(activations(100, 40, 11)))
    assert found.coding.shape == (scheme.num_groups((7, 40)),)
    error = (values(weight, scheme, found) - weight).square().mean() / weight.var()
    assert float(error) < 0.05
