"""Ranges against loops over groups and candidates, and against bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import activations, best_factor, output_error, snap_one, stats_of, weights
from torch import Tensor

from quantkit.errors import RecipeError
from quantkit.methods.extent import Extent, extent_of, scale_and_zero
from quantkit.methods.feedback import factorize
from quantkit.methods.parts import GroupRange, make_part
from quantkit.methods.ranges.clip import Clip
from quantkit.methods.ranges.minmax import Minmax
from quantkit.methods.ranges.mse import Mse
from quantkit.methods.ranges.weighted_mse import WeightedMse
from quantkit.methods.rounding.nearest import nearest_codes
from quantkit.methods.stats import Needs
from quantkit.numbers.grid import store_scale
from quantkit.numbers.nested import dynamic_map, nest
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import NestedScale, decode_rows

SCHEMES = ["w4a16_g16", "w3a16_g16_asym", "w4a16_g32_asym", "nf4_b32", "fp4_b16"]


def stored(value: float) -> float:
    """A scale as files hold it."""
    return float(store_scale(torch.tensor(value)))


def plain(group: Tensor, scheme: Scheme, low: float, high: float) -> tuple[float, float | None]:
    """Scale and zero for one group's extent, by the formulas."""
    if scheme.kind != "int":
        return max(-low, high), None
    top = 2**scheme.bits - 1
    if scheme.symmetric:
        sign = -1.0 if high > -low and scheme.bits < 8 else 1.0
        return sign * stored(2 * max(-low, high) / top), None
    low = min(low, -high / (top - 1))
    scale = stored((high - low) / top)
    return scale, float(min(max(round(-low / scale), 1), top))


def shrunk(group: Tensor, scheme: Scheme, factor: float) -> tuple[float, float | None]:
    """Scale and zero of a group whose extent is shrunk at both ends."""
    low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
    return plain(group, scheme, low * factor, high * factor)


def clipped(group: Tensor, scheme: Scheme, factor: float) -> tuple[float, float | None]:
    """Scale and zero of a group whose weights are clipped at a part of the largest magnitude."""
    limit = float(group.abs().max()) * factor
    cut = group.clamp(-limit, limit)
    return plain(group, scheme, min(float(cut.min()), 0.0), max(float(cut.max()), 0.0))


def check_against_loops(
    found: GroupRange,
    weight: Tensor,
    scheme: Scheme,
    factors: list[float],
    candidate: Callable[[Tensor, Scheme, float], tuple[float, float | None]],
    cost_of_group: Callable[[int], Callable[[Tensor], float]],
) -> None:
    size = scheme.group_size or weight.shape[1]
    wrong = 0
    for o in range(weight.shape[0]):
        for g in range(weight.shape[1] // size):
            group, cost = weight[o, g * size : (g + 1) * size], cost_of_group(g)
            factor = best_factor(group, scheme, factors, lambda w, f: candidate(w, scheme, f), cost)
            scale, zero = candidate(group, scheme, factor)
            wrong += float(found.coding[o, g]) != pytest.approx(scale, rel=1e-6)
            wrong += found.zero is not None and float(found.zero[o, g]) != zero
    # Two candidates may cost the same up to float32 rounding.
    assert wrong <= 0.03 * found.coding.numel()


@pytest.mark.parametrize("name", SCHEMES)
def test_mse_finds_what_loops_find(name: str) -> None:
    scheme, weight = Scheme.parse(name), weights(6, 64, 1)
    check_against_loops(
        Mse(steps=8)("w", weight, scheme, None),
        weight,
        scheme,
        [1 - 0.5 * k / 8 for k in range(8)],
        shrunk,
        lambda g: lambda d: float(d.square().sum()),
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_weighted_mse_finds_what_loops_find(name: str) -> None:
    scheme, weight, x = Scheme.parse(name), weights(6, 64, 2), activations(80, 64, 3)
    size, importance = scheme.group_size or 64, x.double().square().mean(0)
    check_against_loops(
        WeightedMse(steps=8)("w", weight, scheme, stats_of(x)),
        weight,
        scheme,
        [1 - 0.5 * k / 8 for k in range(8)],
        shrunk,
        lambda g: lambda d: float((d.square() * importance[g * size : (g + 1) * size]).sum()),
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_gram_metric_finds_the_least_output_error(name: str) -> None:
    scheme, weight, x = Scheme.parse(name), weights(6, 64, 4), activations(80, 64, 5)
    size = scheme.group_size or 64
    tokens = x.double()
    check_against_loops(
        WeightedMse(metric="gram", steps=8)("w", weight, scheme, stats_of(x)),
        weight,
        scheme,
        [1 - 0.5 * k / 8 for k in range(8)],
        shrunk,
        lambda g: lambda d: float((tokens[:, g * size : (g + 1) * size] @ d).square().sum()),
    )


@pytest.mark.parametrize("name", [*SCHEMES, "w3a16_row_asym"])
def test_clip_finds_the_least_output_error_of_clipped_weights(name: str) -> None:
    scheme, weight, x = Scheme.parse(name), weights(6, 64, 6), activations(80, 64, 7)
    size, tokens = scheme.group_size or 64, x.double()
    check_against_loops(
        Clip()("layers.0.mlp.up_proj.weight", weight, scheme, stats_of(x)),
        weight,
        scheme,
        [1 - 0.5 * k / 10 for k in range(10)],
        clipped,
        lambda g: lambda d: float((tokens[:, g * size : (g + 1) * size] @ d).square().sum()),
    )


def test_pivot_metric_weighs_by_the_factorisation() -> None:
    scheme, weight, x = Scheme.parse("w3a16_g16"), weights(6, 64, 8), activations(300, 64, 9)
    stats = stats_of(x)
    assert stats.gram is not None
    feedback = factorize(stats.gram, damp=0.01, act_order=True)
    assert feedback is not None
    importance = torch.zeros(64, dtype=torch.float64)
    importance[feedback.order] = feedback.loss.double()
    check_against_loops(
        WeightedMse(metric="pivot", steps=8)("w", weight, scheme, stats),
        weight,
        scheme,
        [1 - 0.5 * k / 8 for k in range(8)],
        shrunk,
        lambda g: lambda d: float((d.square() * importance[g * 16 : (g + 1) * 16]).sum()),
    )


def test_every_search_beats_the_full_range_at_its_own_measure() -> None:
    scheme, weight = Scheme.parse("w3a16_g32_asym"), weights(40, 128, 10)
    weight[:, ::31] *= 4
    x = activations(300, 128, 11)
    stats = stats_of(x)

    def error(found: GroupRange) -> float:
        codes = nearest_codes(weight, scheme, found.coding, found.zero)
        return output_error(weight, decode_rows(codes, found.coding, found.zero, scheme), x)

    full = error(Minmax()("w", weight, scheme, stats))
    for part in (Clip(), WeightedMse(), WeightedMse(metric="gram")):
        assert error(part("w", weight, scheme, stats)) < full


def test_clip_skips_queries_and_keys() -> None:
    scheme, weight = Scheme.parse("w4a16_g16_asym"), weights(8, 64, 12)
    stats = stats_of(activations(80, 64, 13))
    full = Minmax()("w", weight, scheme, stats)
    for name in (
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.3.self_attn.k_proj.weight",
    ):
        assert torch.equal(Clip()(name, weight, scheme, stats).coding, full.coding)
    other = Clip()("model.layers.3.self_attn.v_proj.weight", weight, scheme, stats)
    assert not torch.equal(other.coding, full.coding)


def test_group_blocks_and_full_gram_give_the_same_range() -> None:
    scheme, weight, x = Scheme.parse("w4a16_g16"), weights(8, 64, 14), activations(80, 64, 15)
    full = stats_of(x)
    for size in (16, 32):
        small = type(full).empty(64, Needs(moments=True, gram=size))
        small.update_(x, name="x")
        for part in (Clip(), WeightedMse(metric="gram")):
            torch.testing.assert_close(
                part("w", weight, scheme, small).coding, part("w", weight, scheme, full).coding
            )


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, weight = Scheme.parse("w4a16_g16_asym"), weights(30, 64, 16)
    stats = stats_of(activations(80, 64, 17))
    whole = [p("w", weight, scheme, stats) for p in (Minmax(), Mse(), WeightedMse(), Clip())]
    monkeypatch.setattr("quantkit.methods.extent._CHUNK_ELEMENTS", 300)
    parts = [p("w", weight, scheme, stats) for p in (Minmax(), Mse(), WeightedMse(), Clip())]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.coding, other.coding)
        assert one.zero is not None and other.zero is not None
        assert torch.equal(one.zero, other.zero)


def test_symmetric_scale_uses_the_whole_grid() -> None:
    extent = Extent(low=torch.tensor([-3.0]), high=torch.tensor([3.0]))
    assert float(scale_and_zero(extent, Scheme.parse("w4a16_g32"))[0]) == stored(6 / 15)
    assert float(scale_and_zero(extent, Scheme.parse("w8a8_row"))[0]) == stored(3 / 127)
    assert float(scale_and_zero(extent, Scheme.parse("w8a16_row"))[0]) == stored(6 / 255)


@pytest.mark.parametrize("low, high, sign", [(-3.0, 2.0, 1), (-2.0, 3.0, -1), (0.0, 3.0, -1)])
def test_the_longer_side_of_a_symmetric_grid_is_where_the_largest_weight_is(
    low: float, high: float, sign: int
) -> None:
    extent, scheme = Extent(low=torch.tensor([low]), high=torch.tensor([high])), "w4a16_g32"
    scale, _ = scale_and_zero(extent, Scheme.parse(scheme))
    assert float(scale) == sign * stored(6 / 15)
    largest = high if high > -low else low
    # Shrunk by a sixteenth, the range still ends at the largest weight.
    shrunk_scale = stored(float(scale) * 15 / 16)
    assert snap_one(largest, Scheme.parse(scheme), shrunk_scale, None) == (0, largest)
    # At 8 bits a step more is worth nothing, and some formats hold absmax.
    for name in ("w8a16_row", "w8a8_row"):
        assert float(scale_and_zero(extent, Scheme.parse(name))[0]) > 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_all_positive_group_keeps_its_top(bits: int) -> None:
    """Zero 1 leaves one step below zero, and the maximum is still the highest code."""
    scheme, weight = Scheme.parse(f"w{bits}a16_g16_asym"), torch.linspace(0.0, 1.0, 16)[None]
    scale, zero = scale_and_zero(extent_of(weight), scheme)
    assert zero is not None and float(zero) == 1
    code, value = snap_one(1.0, scheme, float(scale), 1.0)
    assert code == 2**bits - 1
    assert value == pytest.approx(1.0, rel=2**-8)


def test_dynamic_map_is_bitsandbytes_code() -> None:
    """A few of the 256 values that bitsandbytes 0.50.2 `create_dynamic_map()` prints."""
    table = dynamic_map()
    assert table.shape == (256,) and bool((table[1:] > table[:-1]).all())
    expected = {0: -0.99296880, 127: 0.0, 128: 5.5e-07, 254: 0.99296880, 255: 1.0}
    for index, value in expected.items():
        assert float(table[index]) == pytest.approx(value, rel=1e-6)


def test_nested_scales_follow_their_definition() -> None:
    generator = torch.Generator().manual_seed(18)
    scale = torch.rand(700, generator=generator) * 0.1 + 0.02
    found = nest(scale)
    assert found.offset == scale.mean() and found.absmax.shape == (3,)
    centered = scale - scale.mean()
    table = dynamic_map()
    wrong = 0
    for k in range(700):
        block = centered[k // 256 * 256 : (k // 256 + 1) * 256]
        unit = float(centered[k] / block.abs().max())
        nearest = int((table - unit).abs().argmin())
        wrong += int(found.codes[k]) != nearest
    # The lookup's 65536 steps put a value on the other side of a threshold now and then.
    assert wrong <= 7
    # An 8-bit code of 0.1 decades: the largest step is 1.4 % of the largest deviation.
    worst = (found.values() - scale).abs().max() / centered.abs().max()
    assert float(worst) < 0.0072


def test_nested_scales_equal_bitsandbytes() -> None:
    """Codes that bitsandbytes 0.50.2 `quantize_blockwise` gives on a CPU for these numbers."""
    scale = torch.tensor([0.5, 0.25, 0.375, 0.3125, 0.4375, 0.28125, 0.4, 0.3])
    found = nest(scale)
    assert found.codes.tolist() == [255, 17, 192, 48, 223, 33, 205, 42]
    assert float(found.absmax[0]) == 0.14296874403953552


def test_nf4_codes_come_before_nesting_as_in_bitsandbytes() -> None:
    scheme, weight = Scheme.parse("nf4_b64_dq"), weights(8, 128, 19)
    found = Minmax()("w", weight, scheme, None)
    assert isinstance(found.scale, NestedScale)
    assert torch.equal(found.coding, weight.view(8, 2, 64).abs().amax(-1))
    assert not torch.equal(found.coding, found.scale.values())
    searched = Mse()("w", weight, scheme, None)
    assert torch.equal(searched.coding, searched.scale.values())


def test_nf4_error_is_bitsandbytes_own_gate() -> None:
    """Mean |error| on N(0, 1) at block 64 is 0.072798 ± 0.000074 (bitsandbytes' own test)."""
    scheme = Scheme.parse("nf4_b64")
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(20))
    found = Minmax()("w", weight, scheme, None)
    codes = nearest_codes(weight, scheme, found.coding, None)
    error = (decode_rows(codes, found.coding, None, scheme) - weight).abs().mean()
    assert abs(float(error) - 0.072798) < 0.000074 * 7


def test_bitsandbytes_gives_the_same_bits() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            for shape in ((33, 96), (5, 7), (64, 128)):
                weight = weights(*shape, 21)
                packed, state = functional.quantize_4bit(
                    weight, blocksize=64, compress_statistics=double, quant_type=kind
                )
                scheme = Scheme.parse(f"{kind}_b64" + ("_dq" if double else ""))
                found = Minmax()("w", weight, scheme, None)
                codes = nearest_codes(weight, scheme, found.coding, None).flatten()
                theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()
                assert torch.equal(codes, theirs[: codes.numel()])
                if isinstance(found.scale, NestedScale):
                    assert torch.equal(found.scale.codes, state.absmax)
                else:
                    assert torch.equal(found.coding.flatten(), state.absmax)


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("mse", {"steps": 0}),
        ("clip", {"shrink": 1.0}),
        ("weighted_mse", {"metric": "hessian"}),
        ("minmax", {"steps": 3}),
    ],
)
def test_bad_options_are_recipe_errors(part: str, options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=part):
        make_part("range", part, options)


def test_needs_name_what_is_read() -> None:
    grouped, row = Scheme.parse("w4a16_g32"), Scheme.parse("w4a16_row")
    assert not Minmax().needs(grouped) and not Mse().needs(grouped)
    assert WeightedMse().needs(grouped) == Needs(moments=True)
    assert WeightedMse(metric="gram").needs(grouped).gram == 32
    assert WeightedMse(metric="pivot").needs(grouped).gram == -1
    assert Clip().needs(grouped).gram == 32 and Clip().needs(row).gram == -1


def test_needs_of_blocks_that_do_not_nest_ask_for_everything() -> None:
    assert (Needs(gram=32) | Needs(gram=128)).gram == 128
    assert (Needs(gram=96) | Needs(gram=128)).gram == -1
    assert (Needs() | Needs(gram=64)).gram == 64
