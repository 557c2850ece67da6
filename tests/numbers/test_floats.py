"""Floats with coarse scales: e2m1 and e4m3 numbers, scales that are powers of two or e4m3."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from quantkit.errors import NumericsError, SchemeError
from quantkit.methods.extent import Extent, scale_and_zero, share_scales
from quantkit.methods.parts import GroupRange
from quantkit.methods.ranges.minmax import Minmax
from quantkit.methods.ranges.mse import Mse
from quantkit.methods.ranges.weighted_mse import WeightedMse
from quantkit.methods.rounding.gptq import Gptq
from quantkit.methods.stats import Needs, Stats
from quantkit.numbers.activations import fake_quantize_activation, static_input_scale
from quantkit.numbers.grid import E2M1_VALUES, Float4Grid, float_scale, grid_of
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import DividedScale, PlainScale, QuantizedTensor, decode_rows

MAGNITUDES = E2M1_VALUES[:8]
COARSE = ["mxfp8a16", "mxfp4a16", "nvfp4a16"]
NAMES = ["fp8a8_b128", "fp8a8_tensor", "mxfp8a8", "mxfp4a4", "nvfp4a4", *COARSE]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest_e2m1(value: float) -> float:
    """By looking at all eight; a tie goes to the one whose code is even."""
    size = min(abs(value), 6.0)
    best = min(range(8), key=lambda code: (abs(MAGNITUDES[code] - size), code % 2))
    return math.copysign(MAGNITUDES[best], value)


def power_of_two(magnitude: float, highest: int) -> float:
    """The scale of a group, by the number's exponent and its last quarter."""
    fraction, exponent = math.frexp(magnitude)  # fraction in 0.5..1
    return 2.0 ** (exponent - 1 + (fraction >= 0.875) - highest)


def e4m3_values() -> list[float]:
    """All positive e4m3 numbers."""
    codes = torch.arange(1, 127, dtype=torch.uint8)
    return [float(value) for value in codes.view(torch.float8_e4m3fn).float()]


@pytest.mark.parametrize("name", NAMES)
def test_a_scheme_is_its_name(name: str) -> None:
    scheme = Scheme.parse(name)
    assert scheme.name == name
    assert scheme.static_input == (name in ("nvfp4a4", "fp8a8_tensor"))


def test_forms_that_do_not_exist_are_refused_with_those_that_do() -> None:
    with pytest.raises(SchemeError, match="nvfp4a16"):
        Scheme(kind="nvfp4", bits=4, group_size=32)
    with pytest.raises(SchemeError, match="fp8a8_b128"):
        Scheme(kind="fp8", bits=8, group_size=64, activation_bits=8, share="block")
    with pytest.raises(SchemeError, match="w8a8_row"):
        Scheme(kind="int", bits=4, group_size=None, activation_bits=4)


def test_e2m1_numbers_are_the_nearest_with_ties_to_even() -> None:
    ties = [(a + b) / 2 for a, b in itertools.pairwise(MAGNITUDES)]
    values = torch.tensor([*ties, *(-tie for tie in ties), 7.0, -9.0, *(normal(999) * 3).tolist()])
    scale = torch.tensor(0.75)
    grid = Float4Grid()
    expected = torch.tensor([nearest_e2m1(float(value)) for value in values]) * scale
    codes = grid.encode(values * scale, scale, None)
    assert torch.equal(grid.snap(values * scale, scale, None), expected)
    assert torch.equal(grid.decode(codes, scale, None), expected)
    assert 8 not in codes.tolist()


def test_power_of_two_scales_follow_the_exponent_of_the_largest() -> None:
    magnitude = (normal(500).abs() * torch.logspace(-6, 6, 500)).clamp(min=1e-9)
    for name, highest in (("mxfp4a16", 2), ("mxfp8a16", 8)):
        expected = [power_of_two(float(value), highest) for value in magnitude]
        assert float_scale(magnitude, Scheme.parse(name)).tolist() == expected
        # Zero and what is next to nothing get the smallest scale, not zero.
        tiny = float_scale(torch.tensor([0.0, 1e-44]), Scheme.parse(name))
        assert tiny.tolist() == [2.0**-126] * 2


def test_scales_of_nvfp4_have_four_significant_bits() -> None:
    magnitude = normal(500).abs() + 0.01
    found = float_scale(magnitude, Scheme.parse("nvfp4a16"))
    mantissa, exponent = torch.frexp(magnitude.double() / 6)
    expected = torch.ldexp(torch.round(mantissa * 16) / 16, exponent)
    # The quotient is rounded to float32 first, which no sample sees.
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("name", [*COARSE, "fp8a8_b128", "fp8a8_tensor"])
@pytest.mark.parametrize("part", [Minmax(), Mse(steps=6)], ids=["minmax", "mse"])
def test_ranges_share_what_the_scheme_shares(name: str, part: Minmax | Mse) -> None:
    scheme, weight = Scheme.parse(name), normal(300, 256) * normal(300, 1, seed=1).abs()
    found = part("a", weight, scheme, None)
    scale = found.scale.values()
    assert scale.shape == (300, 256 // (scheme.group_size or 256))
    rows = {"group": 1, "block": 128, "tensor": 300}[scheme.share]
    for start in range(0, 300, rows):
        block = scale[start : start + rows]
        assert torch.equal(block, block[:1].expand_as(block))
        groups = weight[start : start + rows].unflatten(1, (scale.shape[1], -1))
        if isinstance(part, Minmax):
            largest = groups.abs().amax((0, 2))[None, :, None]
            expected, _ = scale_and_zero(Extent(low=-largest, high=largest), scheme)
            assert torch.equal(block[0], expected[0, :, 0])


def test_the_search_of_nvfp4_is_as_good_as_trying_every_scale() -> None:
    scheme, weight = Scheme.parse("nvfp4a16"), normal(40, 64)
    stats = Stats.empty(64, Needs(moments=True))
    stats.update_(normal(200, 64, seed=1) * torch.linspace(0.1, 3, 64), name="x")
    found = WeightedMse()("a", weight, scheme, stats).scale.values()
    groups, importance = weight.view(40, 4, 16), stats.mean_sq.view(4, 16)
    grid = grid_of(scheme)

    def cost(scale: Tensor) -> Tensor:
        errors = grid.snap(groups, scale[..., None], None) - groups
        return (errors.square() * importance).sum(-1)

    best = torch.full((40, 4), float("inf"))
    for number in e4m3_values():
        best = torch.minimum(best, cost(torch.full((40, 4), number / 32)))
    absmax = cost(Minmax()("a", weight, scheme, None).scale.values())
    assert (cost(found) <= absmax).all()
    assert torch.equal(cost(found), best)
    assert float(best.sum()) < 0.8 * float(absmax.sum())
    # Some groups put their largest weight on 4 instead of 6.
    assert bool((found > 1.3 * groups.abs().amax(-1) / 6).any())


def test_weights_of_one_input_share_their_divisor_or_scale() -> None:
    for name in ("nvfp4a16", "fp8a8_tensor"):
        scheme = Scheme.parse(name)
        weights = [normal(8, 64, seed=k) * 10.0**-k for k in range(3)]
        alone = [Minmax()("a", weight, scheme, None) for weight in weights]
        found = share_scales(alone, scheme)
        if name == "nvfp4a16":
            scales = [one.scale for one in found]
            divisors = {float(one.divisor) for one in scales if isinstance(one, DividedScale)}
            assert len(scales) == 3 and len(divisors) == 1
            largest = max(float(one.coding.max()) for one in found)
            assert 224 < largest * divisors.pop() <= 448
            # 2^14 between the largest and the smallest that is exact; these are a hundred apart.
            for one, before in zip(found, alone, strict=True):
                assert torch.equal(one.coding, before.coding)
        else:
            assert {float(one.coding.max()) for one in found} == {
                max(float(one.coding.max()) for one in alone)
            }


def test_scales_far_below_the_largest_are_rounded_before_codes_are_chosen() -> None:
    scheme = Scheme.parse("nvfp4a16")
    coding = torch.tensor([[2.0**-3, 2.0**-20, 2.0**-40]])
    (found,) = share_scales(
        [GroupRange(scale=PlainScale(tensor=coding), zero=None, coding=coding)], scheme
    )
    # 2^-3 becomes 256, so 2^-9, the smallest number, is 2^-20.
    assert found.coding.tolist() == [[2.0**-3, 2.0**-20, 2.0**-20]]


@pytest.mark.parametrize("name", COARSE)
def test_gptq_rounds_on_these_grids_and_gains(name: str) -> None:
    scheme, weight = Scheme.parse(name), normal(24, 96)
    stats = Stats.empty(96, Needs(gram=-1, moments=True))
    stats.update_(normal(400, 96, seed=1) @ normal(96, 96, seed=2), name="x")
    stats.finish_()
    scale = Minmax()("a", weight, scheme, None).scale.values()
    grid = grid_of(scheme)
    nearest = grid.encode(weight.view(24, -1, scheme.group_size or 0), scale[..., None], None)
    codes = [nearest.view(24, 96).to(torch.uint8)]
    codes += [Gptq(sweeps=n)(weight, scheme, scale, None, stats).codes for n in (0, 2)]
    errors = [decode_rows(each, scale, None, scheme) - weight for each in codes]
    costs = [float(((error @ stats.gram) * error).sum()) for error in errors]
    assert costs[1] < 0.9 * costs[0] and costs[2] <= costs[1]


@pytest.mark.parametrize("name", ["mxfp8a8", "mxfp4a4", "nvfp4a4", "fp8a8_b128", "fp8a8_tensor"])
def test_inputs_are_rounded_group_by_group(name: str) -> None:
    scheme, x = Scheme.parse(name), normal(3, 5, 256) * torch.logspace(-2, 2, 256)
    static = None
    if scheme.static_input:
        static = torch.tensor(static_input_scale(float(x.abs().max()), scheme))
    found = fake_quantize_activation(x, scheme, static)
    numbers = torch.tensor(e4m3_values())
    size = scheme.group_size or 256
    for row, rounded in zip(x.reshape(-1, size), found.reshape(-1, size), strict=True):
        largest = float(row.abs().max())
        if scheme.kind in ("mxfp8", "mxfp4"):
            scale = power_of_two(largest, 8 if scheme.kind == "mxfp8" else 2)
        elif scheme.kind == "nvfp4":
            assert static is not None
            wanted = torch.tensor(largest) / 6 * static
            scale = float(numbers[(numbers - wanted).abs().argmin()] / static)
        else:
            scale = float(static) if static is not None else float(torch.tensor(largest) / 448)
        if scheme.kind in ("mxfp4", "nvfp4"):
            expected = torch.tensor([nearest_e2m1(float(v)) for v in row / scale])
        else:
            expected = (row / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        assert torch.equal(rounded, expected * scale)


def test_static_scales_clip_nothing_and_survive_casts() -> None:
    for largest in (normal(50).abs() * 30 + 0.01).tolist():
        fp8, nvfp4 = (
            static_input_scale(largest, Scheme.parse(name)) for name in ("fp8a8_tensor", "nvfp4a4")
        )
        assert largest / fp8 <= 448 and largest / 6 * nvfp4 <= 448
        assert largest / 6 * nvfp4 > 224 and math.frexp(nvfp4)[0] == 0.5
        for value in (fp8, nvfp4):
            assert float(torch.tensor(value).to(torch.bfloat16)) == value
    assert static_input_scale(0.0, Scheme.parse("nvfp4a4")) == 1.0


def test_zero_scales_are_named() -> None:
    tensor = QuantizedTensor(
        codes=torch.zeros(2, 16, dtype=torch.uint8),
        scale=DividedScale(
            tensor=torch.tensor([[1.0], [0.0]]).to(torch.float8_e4m3fn), divisor=torch.tensor(4.0)
        ),
        zero=None,
        scheme=Scheme.parse("nvfp4a16"),
        dtype=torch.bfloat16,
    )
    with pytest.raises(NumericsError, match=r"layers\.0\.q: a scale is zero"):
        tensor.check("layers.0.q")
