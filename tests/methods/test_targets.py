"""Targets: what is to be come near to, against the least squares problem written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from reference import activations, weights
from torch import Tensor

from quantkit.errors import RecipeError
from quantkit.methods.parts import make_part
from quantkit.methods.ranges.minmax import Minmax
from quantkit.methods.recipe import load_recipe
from quantkit.methods.rounding.gptq import Gptq
from quantkit.methods.stats import Needs, Stats
from quantkit.methods.targets.qronos import Qronos
from quantkit.numbers.grid import grid_of
from quantkit.numbers.scheme import Scheme

ROWS, COLUMNS, TOKENS = 12, 48, 400


def drifted(x_TI: Tensor, seed: int = 5) -> Tensor:
    """The inputs with an error that follows them in part, as that of quantized weights does."""
    return 0.9 * x_TI + 0.1 * x_TI.roll(1, 1) + 0.1 * activations(*x_TI.shape, seed)


def stats_of_both(original: Tensor, quantized: Tensor, batches: int = 1) -> Stats:
    stats = Stats.empty(COLUMNS, Needs(moments=True, gram=-1, drift=True))
    for x, y in zip(original.chunk(batches), quantized.chunk(batches), strict=True):
        stats.update_(y, name="x", original=x)
    stats.finish_()
    return stats


def least_squares(weight: Tensor, original: Tensor, quantized: Tensor, damp: float) -> Tensor:
    """argmin of ‖X w - Y v‖² + λ‖w - v‖² per row, as one system of equations in float64."""
    w, x, y = (t.to(torch.float64) for t in (weight, original, quantized))
    root = (damp * (y.T @ y).diagonal().mean()).sqrt() * torch.eye(COLUMNS, dtype=torch.float64)
    left, right = torch.cat([y, root]), torch.cat([x @ w.T, root @ w.T])
    return torch.linalg.lstsq(left, right).solution.T


@pytest.mark.parametrize("damp", [1e-4, 0.01, 0.5])
def test_qronos_is_the_least_squares_solution(damp: float) -> None:
    x, w = activations(TOKENS, COLUMNS, 1), weights(ROWS, COLUMNS, 2)
    y = drifted(x)
    found = Qronos(damp=damp)(w, stats_of_both(x, y, batches=4))
    assert found.degraded is None and found.weight.dtype == torch.float32
    expected = least_squares(w, x, y, damp).to(torch.float32)
    # Normal equations in float32 lose half the digits of a system of moderate condition.
    torch.testing.assert_close(found.weight, expected, rtol=2e-3, atol=2e-3 * float(w.std()))
    assert output_error(x @ w.T, y @ found.weight.T) < 0.5 * output_error(x @ w.T, y @ w.T)


def output_error(wanted: Tensor, found: Tensor) -> float:
    return float((wanted - found).square().sum())


def test_inputs_that_did_not_drift_leave_the_weight_to_the_bit() -> None:
    x, w = activations(TOKENS, COLUMNS, 1), weights(ROWS, COLUMNS, 2)
    assert torch.equal(Qronos()(w, stats_of_both(x, x)).weight, w)


def test_a_share_goes_part_of_the_way() -> None:
    x, w = activations(TOKENS, COLUMNS, 1), weights(ROWS, COLUMNS, 2)
    stats = stats_of_both(x, drifted(x))
    whole, half = Qronos()(w, stats).weight, Qronos(share=0.5)(w, stats).weight
    assert torch.equal(Qronos(share=0.0)(w, stats).weight, w)
    torch.testing.assert_close(half, (w + whole) / 2)


def test_codes_for_the_target_come_nearer_to_the_originals_outputs() -> None:
    scheme = Scheme.parse("w3a16_g16")
    x, w = activations(TOKENS, COLUMNS, 1), weights(ROWS, COLUMNS, 2)
    y = drifted(x)
    stats = stats_of_both(x, y)
    errors = []
    for target in (w, Qronos()(w, stats).weight):
        chosen = Minmax()("w", target, scheme, stats)
        codes = Gptq()(target, scheme, chosen.coding, None, stats).codes
        values = grid_of(scheme).decode(codes.view(ROWS, -1, 16), chosen.coding[..., None], None)
        errors.append(output_error(x @ w.T, y @ values.reshape(w.shape).T))
    assert errors[1] < 0.8 * errors[0]


def test_drift_adds_up_and_is_rescaled() -> None:
    x = activations(TOKENS, COLUMNS, 1)
    y = drifted(x)
    found = stats_of_both(x, y, batches=5)
    part = stats_of_both(x[:160], y[:160])
    part.merge_(stats_of_both(x[160:], y[160:]))
    assert found.drift is not None and part.drift is not None
    expected = (y.double().T @ (x - y).double()).float()
    torch.testing.assert_close(found.drift, expected, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(part.drift, expected, rtol=1e-4, atol=1e-2)
    scale = torch.linspace(0.5, 2, COLUMNS)
    rescaled, anew = found.rescaled(scale).drift, stats_of_both(x / scale, y / scale).drift
    torch.testing.assert_close(rescaled, anew, rtol=1e-4, atol=1e-2)


def test_the_last_matrix_makes_up_for_what_the_output_lacks() -> None:
    x, w = activations(TOKENS, COLUMNS, 1), weights(ROWS, COLUMNS, 2)
    y = drifted(x)
    # Hidden states that came astray beside the matrix, in part as its inputs say.
    beside = 0.1 * y[:, :ROWS] + 0.05 * activations(TOKENS, ROWS, 7)
    lack = x @ w.T - y @ w.T - beside
    stats = Stats.empty(COLUMNS, Needs(gram=-1, drift=True))
    for part in (slice(0, 150), slice(150, TOKENS)):
        stats.update_(y[part], name="x", lack_TO=lack[part])
    stats.finish_()
    assert stats.drift is None
    found = Qronos()(w, stats).weight
    double = y.double()
    matrix = double.T @ double
    matrix += 0.01 * matrix.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    expected = w.double() + torch.linalg.solve(matrix, double.T @ lack.double()).T
    # As above: float32 against float64.
    torch.testing.assert_close(found, expected.float(), rtol=2e-3, atol=2e-3 * float(w.std()))
    errors = [
        output_error(x @ w.T, y @ v.T + beside)
        for v in (w, Qronos(share=0.5)(w, stats).weight, found)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_tokens_without_their_original_end_the_drift() -> None:
    x = activations(TOKENS, COLUMNS, 1)
    stats = Stats.empty(COLUMNS, Needs(gram=-1, drift=True))
    stats.update_(x[:100], name="x", original=x[:100])
    stats.update_(x[100:], name="x")
    stats.finish_()
    w = weights(ROWS, COLUMNS, 2)
    assert stats.drift is None and Qronos()(w, stats).weight is w


def test_an_input_that_was_never_active_says_what_was_done() -> None:
    zeros, w = torch.zeros(TOKENS, COLUMNS), weights(ROWS, COLUMNS, 2)
    found = Qronos()(w, stats_of_both(zeros, zeros))
    assert torch.equal(found.weight, w)
    assert found.degraded is not None and "its own outputs" in found.degraded


@pytest.mark.parametrize("options", [{"damp": 0.0}, {"damp": 2.0}, {"share": -0.1}, {"share": 2}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=r"damp|share"):
        make_part("target", "qronos", options)


def test_a_target_needs_statistics_of_the_quantized_model() -> None:
    with pytest.raises(RecipeError, match="target qronos needs `propagate: true`"):
        dataclasses.replace(load_recipe("best"), propagate=False)


def test_every_rounding_may_follow_a_target() -> None:
    recipe = load_recipe("rtn", overrides=("target=qronos",))
    assert recipe.calibrated and recipe.needs(recipe.scheme).drift
    assert not load_recipe("rtn").calibrated
