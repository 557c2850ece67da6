"""Blocks fitted to weights, codes by GPTQ, and which type each tensor gets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.errors import SchemeError
from quantkit.formats.gguf.mixes import RECIPES, Choice, Weight, check_recipe, choose_types
from quantkit.methods.feedback import feedback_of
from quantkit.methods.recipe import load_recipe
from quantkit.methods.rounding.gptq import Gptq
from quantkit.methods.stats import Needs, Stats
from quantkit.methods.superblock import fit, steps_and_minima
from quantkit.model.refs import WeightRef
from quantkit.numbers.scheme import BLOCKS, Scheme
from quantkit.numbers.superblock import BLOCK_TYPES, BlockScale, BlockType
from quantkit.pipeline.solve import Solved, quantize_weights

KINDS = list(BLOCK_TYPES.values())
DAMP = Gptq().damp


def solve(
    weight: torch.Tensor, kind: BlockType, stats: Stats | None, method: str = "gptq"
) -> Solved:
    """A weight on a block type's grid, as a built-in method solves it."""
    recipe = load_recipe(method, scheme=kind.name.lower())
    ref = WeightRef(name="w", block=0, shape=(24, 256), parameter="w", input="x")
    (found,) = quantize_weights(
        [ref],
        [weight],
        recipe.scheme,
        stats,
        target=None,
        range_part=recipe.make_range(),
        rounding=recipe.make_rounding(),
        dtype=torch.float32,
    )
    return found


def test_schemes_say_of_block_types_what_these_are() -> None:
    assert {kind.name.lower() for kind in KINDS} == set(BLOCKS)
    for kind in KINDS:
        assert BLOCKS[kind.name.lower()] == (kind.bits, kind.group_size, not kind.minimum)


def weight_and_stats(rows: int = 24, columns: int = 256) -> tuple[torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    mix += 0.7 * torch.eye(columns)
    x = torch.randn(1000, columns, generator=generator) @ mix
    x *= torch.exp(0.7 * torch.randn(columns, generator=generator))
    stats = Stats.empty(columns, Needs(moments=True, gram=-1))
    stats.update_(x, name="x")
    stats.finish_()
    return torch.randn(rows, columns, generator=generator) * 0.03, stats


def output_error(delta: torch.Tensor, stats: Stats) -> float:
    assert stats.gram is not None
    return float((delta @ stats.gram * delta).sum())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_gptq_on_the_grid_costs_less_than_nearest(kind: BlockType) -> None:
    weight, stats = weight_and_stats()
    plain = fit(weight, kind, stats.mean_sq / stats.mean_sq.mean()).values().view(weight.shape)
    solved = solve(weight, kind, stats)
    assert solved.degraded is None
    better = output_error(weight - solved.tensor.dequantize(), stats)
    # Seen: 0.33 (Q6_K) to 0.63 (Q2_K).
    assert better < 0.8 * output_error(weight - plain, stats)
    # Sweeps of coordinate descent never raise it.
    swept = solve(weight, kind, stats, "best").tensor.dequantize()
    assert output_error(weight - swept, stats) <= better


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_fit_is_no_worse_than_the_owners_rounding(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    weight, _ = weight_and_stats()
    theirs = gguf.GGMLQuantizationType[name]
    owner = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), theirs), theirs))
    ours = fit(weight, BLOCK_TYPES[name], torch.ones(256)).values().view(weight.shape)
    assert float((weight - ours).square().sum()) <= float((weight - owner).square().sum())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_gptq_is_the_slow_loop(kind: BlockType) -> None:
    """Channel by channel with the whole remaining row corrected each time, in float64."""
    weight, stats = weight_and_stats(rows=3)
    grid = fit(weight, kind, torch.ones(256))
    feedback = feedback_of(stats, damp=DAMP, act_order=True, keep=True)
    assert feedback is not None
    step, low = (part.reshape(3, -1).double() for part in steps_and_minima(grid))
    order, lower = feedback.order, feedback.lower.double()
    ordered = weight.double()[:, order]
    target, codes = ordered.clone(), torch.zeros(3, 256)
    for index in range(255, -1, -1):
        group = int(order[index]) // kind.group_size
        code = ((target[:, index] - low[:, group]) / step[:, group]).round() + kind.center
        code = code.clamp(0, 2**kind.bits - 1)
        error = ordered[:, index] - ((code - kind.center) * step[:, group] + low[:, group])
        target[:, :index] += error[:, None] * lower[index, :index]
        codes[:, order[index]] = code.float()
    scheme, scale = Scheme.parse(kind.name.lower()), BlockScale.of(grid, 3)
    rounded = Gptq()(weight, scheme, scale.values(), scale.minima(), stats)
    fast = rounded.codes.float()
    # float32 against float64: a code here and there falls on the other side of a tie.
    assert float((fast != codes).float().mean()) < 0.02


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("value", [0.0, 0.25, -0.25, 1e-30])
def test_constant_weights_decode_to_themselves_nearly(kind: BlockType, value: float) -> None:
    weight = torch.full((2, 256), value)
    found = fit(weight, kind, torch.ones(256)).values()
    assert bool(torch.isfinite(found).all())
    assert float((found - value).abs().max()) <= abs(value) * 0.02 + 1e-7


def test_without_statistics_codes_are_the_nearest_ones() -> None:
    weight, _ = weight_and_stats()
    tensor = solve(weight, BLOCK_TYPES["Q4_K"], None, "rtn").tensor
    assert isinstance(tensor.scale, BlockScale)
    blocks = tensor.scale.blocks(tensor.codes)
    step, low = (part[..., None] for part in steps_and_minima(blocks))
    x = weight.view(-1, 8, 32)
    nearest = ((x - low) / step).round().clamp(0, 15).view(-1, 256)
    assert np.array_equal(blocks.codes.numpy(), nearest.numpy())


def test_an_expert_that_no_token_reached_says_so() -> None:
    weight, _ = weight_and_stats()
    empty = Stats.empty(256, Needs(moments=True, gram=-1))
    assert "no calibration token" in str(solve(weight, BLOCK_TYPES["Q6_K"], empty).degraded)


def types_of(recipe: str, *, columns: int = 256, tied: bool = False) -> dict[str, Choice]:
    weights = [Weight(name="token_embd.weight", stem="token_embd", block=-1, columns=columns)]
    if not tied:
        weights.append(Weight(name="output.weight", stem="output", block=-1, columns=columns))
    for block in range(16):
        for stem in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            name = f"blk.{block}.{stem}.weight"
            weights.append(Weight(name=name, stem=stem, block=block, columns=columns))
    return choose_types(
        recipe, weights, layers=16, heads=8, key_value_heads=4, experts=0, tied=tied
    )


def test_q4_k_m_gives_more_bits_to_sensitive_tensors() -> None:
    types = types_of("q4_k_m")
    more = [b for b in range(16) if types[f"blk.{b}.ffn_down.weight"].type == "Q6_K"]
    # The first two, the last two, and every third between: llama-quantize's own choice.
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    assert types["output.weight"].type == "Q6_K"
    assert types["token_embd.weight"].type == "Q4_K"
    assert types["blk.3.attn_q.weight"].type == "Q4_K"
    assert types_of("q4_k_m", tied=True)["token_embd.weight"].type == "Q6_K"


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_that_do_not_fit_fall_back_as_told(recipe: str) -> None:
    base = RECIPES[recipe][0]
    odd = types_of(recipe, columns=288)["blk.3.ffn_up.weight"]
    expected = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
    assert odd.type == expected.get(base, base)
    assert odd.fallback == (base if base in expected else None)
    assert types_of(recipe, columns=40)["blk.3.ffn_up.weight"].type == "F16"


def test_an_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(SchemeError, match="q4_k_m"):
        check_recipe("w4a16_g32")
