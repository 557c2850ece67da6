"""AWQ's and SmoothQuant's searches against every candidate tried on the tokens themselves."""

from __future__ import annotations

import pytest
import torch
from reference import activations, stats_of, weights
from torch import Tensor

from quantkit.errors import RecipeError
from quantkit.methods.extent import extent_of, scale_and_zero, snap_rows
from quantkit.methods.feedback import factorize
from quantkit.methods.parts import Reader, make_part
from quantkit.methods.ranges.minmax import Minmax
from quantkit.methods.rounding.gptq import Gptq
from quantkit.methods.rounding.nearest import nearest_codes
from quantkit.methods.transforms.awq import Awq
from quantkit.methods.transforms.smoothquant import Smoothquant
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import decode_rows

COLUMNS = 64


def readers(scheme: Scheme, seed: int = 1) -> list[Reader]:
    return [
        Reader(name="gate", weight=weights(20, COLUMNS, seed), scheme=scheme),
        Reader(name="up", weight=weights(12, COLUMNS, seed + 1), scheme=scheme),
        Reader(name="router", weight=weights(4, COLUMNS, seed + 2), scheme=None),
    ]


def tokens(seed: int = 3, spread: float = 1.0) -> Tensor:
    return activations(200, COLUMNS, seed, spread=spread)


def nearest(weight: Tensor, scheme: Scheme) -> Tensor:
    found = Minmax()("w", weight, scheme, None)
    return decode_rows(
        nearest_codes(weight, scheme, found.coding, found.zero), found.coding, found.zero, scheme
    )


def awq_error(given: list[Reader], x: Tensor, scale: Tensor) -> float:
    """Squared output error of the quantized readers, from the tokens, in float64."""
    total = 0.0
    for reader in given:
        if reader.scheme is not None:
            values = nearest(reader.weight * scale, reader.scheme) / scale
            total += float((x.double() @ (values - reader.weight).double().T).square().sum())
    return total


def awq_candidates(given: list[Reader], x: Tensor, size: int) -> list[Tensor]:
    """s for every r and with and without the weight term, as the authors' code writes it."""
    found = []
    stacked = torch.cat([r.weight for r in given if r.scheme is not None])
    groups = stacked.view(-1, size).abs()
    relative = (groups / (groups.amax(1, keepdim=True) + 1e-6)).view(stacked.shape).mean(0)
    mean = x.abs().mean(0)
    for duo in (False, True):
        for k in range(20):
            scale = mean ** (k / 20)
            if duo:
                scale = scale / (relative ** (1 - k / 20) + 1e-4)
            scale = scale.clamp(min=1e-4)
            found.append(scale / (scale.max() * scale.min()).sqrt())
    return found


@pytest.mark.parametrize("name", ["w4a16_g16_asym", "w3a16_g32", "w4a16_row"])
@pytest.mark.parametrize("seed", [3, 13])
def test_awq_is_as_good_as_trying_all_candidates(name: str, seed: int) -> None:
    scheme, x = Scheme.parse(name), tokens(seed)
    given = readers(scheme, seed + 1)
    scale = Awq(rows=0)(given, stats_of(x), None)
    assert scale is not None
    candidates = awq_candidates(given, x, scheme.group_size or COLUMNS)
    errors = [awq_error(given, x, candidate) for candidate in candidates]
    # The walk may end in a neighbouring valley of a curve that is flat near its lowest point.
    assert awq_error(given, x, scale) <= min(errors) * 1.03
    closest = min(float((scale - candidate).abs().max()) for candidate in candidates)
    assert closest < 1e-4 * float(scale.max())


@pytest.mark.parametrize("duo", ["never", "always"])
def test_awq_tries_one_kind_only_if_asked(duo: str) -> None:
    scheme, x = Scheme.parse("w3a16_g16_asym"), tokens(5)
    given = readers(scheme)
    scale = make_part("transform", "awq", {"duo": duo})(given, stats_of(x), None)
    candidates = awq_candidates(given, x, 16)
    mine = candidates[20:] if duo == "always" else candidates[:20]
    assert min(float((scale - c).abs().max()) for c in mine) < 1e-4 * float(scale.max())


def test_awq_sample_of_rows_decides_nearly_as_well() -> None:
    scheme, x = Scheme.parse("w3a16_g16_asym"), tokens(6)
    given = [Reader(name="q", weight=weights(600, COLUMNS, 7), scheme=scheme)]
    everything = Awq(rows=0)(given, stats_of(x), None)
    sampled = Awq(rows=128)(given, stats_of(x), None)
    assert everything is not None and sampled is not None
    # A fifth of the rows may pick a neighbour on a flat curve.
    assert awq_error(given, x, sampled) <= 1.03 * awq_error(given, x, everything)


def test_awq_leaves_alone_what_no_scale_improves() -> None:
    scheme = Scheme.parse("w4a16_g16_asym")
    exact = torch.arange(-8, 8).repeat(8, COLUMNS // 16) * 2.0**-6
    given = [Reader(name="q", weight=exact, scheme=scheme)]
    assert torch.equal(nearest(exact, scheme), exact)
    assert Awq()(given, stats_of(tokens()), None) is None


def test_awq_for_gptq_lowers_what_gptq_leaves() -> None:
    scheme, x = Scheme.parse("w3a16_g32_asym"), tokens(8)
    given = readers(scheme, 9)[:1]
    stats = stats_of(x)
    scale = Awq(metric="pivot", rows=0)(given, stats, None)
    assert scale is not None and stats.gram is not None
    feedback = factorize(stats.gram, damp=0.01, act_order=True)
    assert feedback is not None
    pivot = torch.zeros(COLUMNS)
    pivot[feedback.order] = feedback.loss

    def cost(s: Tensor) -> float:
        delta = snap_rows(given[0].weight * s, scheme) / s - given[0].weight
        return float((delta.square() * pivot).sum())

    candidates = awq_candidates(given, x, 32)
    assert cost(scale) <= 1.03 * min(cost(c) for c in candidates)

    def after_gptq(s: Tensor) -> float:
        weight, scaled = given[0].weight * s, stats_of(x / s)
        found = Minmax()("w", weight, scheme, None)
        codes = Gptq()(weight, scheme, found.coding, found.zero, scaled).codes
        values = decode_rows(codes, found.coding, found.zero, scheme) / s
        return float((x @ (values - given[0].weight).T).square().sum())

    assert after_gptq(scale) < after_gptq(torch.ones(COLUMNS))


def test_scaling_and_folding_cancel() -> None:
    scheme, x = Scheme.parse("w4a16_g16_asym"), tokens(10)
    given = readers(scheme)
    scale = Awq()(given, stats_of(x), None)
    assert scale is not None
    for reader in given:
        before, after = x @ reader.weight.T, (x / scale) @ (reader.weight * scale).T
        # Float32 products of the same numbers, scaled.
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def w8a8_error(given: list[Reader], x: Tensor, scale: Tensor) -> float:
    """Squared output error with int8 per token and int8 per row, one token at a time."""
    total = 0.0
    for reader in given:
        if reader.scheme is None:
            continue
        weight = reader.weight * scale
        extent = extent_of(weight)
        step, _ = scale_and_zero(extent, reader.scheme)
        integers = torch.round(weight / step).clamp(-127, 127)
        for token in x:
            smoothed = token / scale
            unit = smoothed.abs().max() / 127
            output = (integers @ torch.round(smoothed / unit)) * step[:, 0] * unit
            total += float((output - reader.weight @ token).square().sum())
    return total


def test_smoothquant_picks_the_best_alpha() -> None:
    scheme, x = Scheme.parse("w8a8_row"), tokens(11, spread=0.3)
    x[:, 5] *= 80
    given = readers(scheme)
    scale = Smoothquant()(given, stats_of(x), None)
    assert scale is not None
    weight_max = torch.cat([r.weight for r in given[:2]]).abs().amax(0)
    errors = {}
    for alpha in Smoothquant().alphas:
        candidate = x.abs().amax(0) ** alpha / weight_max ** (1 - alpha)
        errors[alpha] = w8a8_error(given, x, candidate)
    found = w8a8_error(given, x, scale)
    assert found == pytest.approx(min(errors.values()), rel=1e-3)
    # The outlier takes most of the grid without smoothing.
    assert found < 0.2 * w8a8_error(given, x, torch.ones(COLUMNS))


def test_smoothquant_is_for_eight_bit_activations_only() -> None:
    x = tokens(12)
    for name in ("w4a16_g16", "w8a16_row", "nf4_b64"):
        scheme = Scheme.parse(name)
        assert not Smoothquant().needs(scheme)
        assert Smoothquant()(readers(scheme), stats_of(x), None) is None


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("awq", {"grid": 0}),
        ("awq", {"duo": "maybe"}),
        ("awq", {"metric": "diagonal"}),
        ("awq", {"rows": -1}),
        ("smoothquant", {"alphas": []}),
        ("smoothquant", {"alphas": [1.5]}),
    ],
)
def test_bad_options_are_recipe_errors(part: str, options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=part):
        make_part("transform", part, options)
