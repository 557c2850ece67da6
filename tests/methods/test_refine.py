"""Codes and scales learned from what outputs lack: slopes, limits, and what may never happen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import pytest
import torch
from reference import activations, weights
from torch import Tensor

from quantkit.errors import RecipeError
from quantkit.methods.parts import Refine, Refined, available, make_part
from quantkit.methods.ranges.minmax import Minmax
from quantkit.methods.recipe import load_recipe
from quantkit.methods.refine.learned import Learned, _Latent
from quantkit.methods.rounding.nearest import nearest_codes
from quantkit.numbers.grid import store_scale
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

ROWS, COLUMNS, TOKENS, BATCHES = 7, 576, 90, 6
SCHEMES = ["w2a16_g32", "w3a16_g64_asym", "w3a16_row"]


def quantized(name: str, seed: int = 0) -> tuple[Tensor, QuantizedTensor]:
    """A weight and its nearest codes."""
    scheme, weight = Scheme.parse(name), weights(ROWS, COLUMNS, seed)
    found = Minmax()("w", weight, scheme, None)
    zero = found.zero
    return weight, QuantizedTensor(
        codes=nearest_codes(weight, scheme, found.coding, zero),
        scale=found.scale,
        zero=None if zero is None else zero.to(torch.uint8),
        scheme=scheme,
        dtype=torch.float32,
    )


class Product:
    """Outputs of one linear layer, by plain matrix products."""

    def __init__(self, weight: Tensor, *, noise: float = 0.0) -> None:
        self.batches = BATCHES
        self._x = [activations(TOKENS, COLUMNS, 10 + k) for k in range(BATCHES)]
        draw = torch.Generator().manual_seed(0)
        self._y = [x @ weight.T for x in self._x]
        self._y = [y + noise * torch.randn(y.shape, generator=draw) for y in self._y]
        self.weight = weight

    def put_(self, weights: Iterable[Tensor]) -> None:
        (self.weight,) = tuple(weights)

    def losses(self, batches: Sequence[int]) -> list[float]:
        return [float(self._lack(self.weight, batch)) for batch in batches]

    def slopes(self, batch: int) -> tuple[float, list[Tensor]]:
        leaf = self.weight.clone().requires_grad_(True)
        with torch.enable_grad():
            loss = self._lack(leaf, batch)
            loss.backward()
        assert leaf.grad is not None
        return float(loss.detach()), [leaf.grad]

    def _lack(self, weight: Tensor, batch: int) -> Tensor:
        lack = self._x[batch] @ weight.T - self._y[batch]
        return lack.square().sum() / self._y[batch].square().sum()


@pytest.mark.parametrize("part", available("refine"))
@pytest.mark.parametrize("name", SCHEMES)
def test_built_in_refinements_lower_the_loss_and_are_repeatable(part: str, name: str) -> None:
    made: Refine = make_part("refine", part, {})
    assert isinstance(made, Refine) and made.takes(Scheme.parse(name))
    weight, given = quantized(name)
    codes, scale = given.codes.clone(), given.scale.values().clone()
    first, second = (made([given], Product(weight)) for _ in range(2))
    assert isinstance(first, Refined) and first.after < first.before
    (tensor,) = first.tensors
    assert torch.equal(tensor.codes, second.tensors[0].codes)
    assert torch.equal(tensor.scale.values(), second.tensors[0].scale.values())
    assert torch.equal(given.codes, codes) and torch.equal(given.scale.values(), scale)
    tensor.check("w")
    # What was measured last is what the answer decodes to.
    judge, product = made, Product(weight)
    assert isinstance(judge, Learned)
    product.put_([tensor.dequantize(torch.float32)])
    last = range(BATCHES - judge.judges(BATCHES), BATCHES)
    assert sum(product.losses(last)) / len(last) == pytest.approx(first.after, rel=1e-6)


@pytest.mark.parametrize("half", [False, True], ids=["bfloat16", "float16"])
def test_scales_are_those_that_a_file_holds(half: bool) -> None:
    weight, given = quantized("w2a16_g32")
    given = dataclasses.replace(given, scheme=dataclasses.replace(given.scheme, half_scales=half))
    answer = Learned(iterations=20, scales=0.01)([given], Product(weight))
    scale = answer.tensors[0].scale
    assert isinstance(scale, PlainScale) and not torch.equal(scale.values(), given.scale.values())
    assert torch.equal(scale.values(), store_scale(scale.values(), half=half))


@pytest.mark.parametrize("name", SCHEMES)
def test_slopes_are_those_of_codes_and_scales_that_are_not_rounded(name: str) -> None:
    """Against central differences in float64 of the loss as a function of real codes and scales."""
    _, given = quantized(name)
    product = Product(weights(ROWS, COLUMNS, 3))
    groups = given.scale.values().shape[1]
    shift = 2.0 ** (given.scheme.bits - 1) if given.zero is None else given.zero.double()[..., None]
    codes = given.codes.double().view(ROWS, groups, -1)
    growth = torch.zeros(ROWS, groups, dtype=torch.float64)
    product._x = [x.double() for x in product._x]
    product._y = [y.double() for y in product._y]

    def loss(codes: Tensor, growth: Tensor) -> float:
        scale = given.scale.values().double() * growth.exp()
        value = ((codes - shift) * scale[..., None]).view(ROWS, COLUMNS)
        return float(product._lack(value, 0))

    latent = _Latent(given)
    product.weight = latent.decoded().double()
    _, (slope,) = product.slopes(0)
    by_code = latent.slope(slope.float()).view(ROWS, groups, -1)
    by_scale = latent.scale_slope(slope.float())
    for place in ((0, 0, 0), (3, groups - 1, 5), (6, groups // 2, 31)):
        step = torch.zeros_like(codes)
        step[place] = 1e-3
        expected = (loss(codes + step, growth) - loss(codes - step, growth)) / 2e-3
        # The slope was rounded to float32.
        assert float(by_code[place]) == pytest.approx(expected, rel=1e-4, abs=1e-9)
        more = torch.zeros_like(growth)
        more[place[:2]] = 1e-4
        expected = (loss(codes, growth + more) - loss(codes, growth - more)) / 2e-4
        assert float(by_scale[place[:2]]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_what_only_fits_noise_is_not_taken() -> None:
    """Outputs of noise alone: text that judges gains nothing, and the start stays."""
    weight, given = quantized("w2a16_g32")
    product = Product(torch.zeros_like(weight), noise=1.0)
    exact = dataclasses.replace(given, codes=torch.full_like(given.codes, 2))
    answer = Learned(iterations=40, codes=0.2)([exact], product)
    assert answer.after == answer.before
    assert torch.equal(answer.tensors[0].codes, exact.codes)


def test_codes_move_where_they_may_only() -> None:
    weight, given = quantized("w2a16_g32")
    kept = Learned(iterations=20, codes=0.0)([given], Product(weight))
    assert torch.equal(kept.tensors[0].codes, given.codes)
    # One code in sixteen is off by two.
    wrong = given.codes.clone()
    wrong[:, ::16] = (wrong[:, ::16] + 2) % 4
    start = dataclasses.replace(given, codes=wrong)
    moved = Learned(iterations=100, codes=0.05, scales=0.0, looks=20)([start], Product(weight))
    assert torch.equal(moved.tensors[0].scale.values(), given.scale.values())
    assert moved.after < 0.85 * moved.before
    assert float((moved.tensors[0].codes != wrong)[:, ::16].float().mean()) > 0.3


@pytest.mark.parametrize("name", ["w4a16_g32", "w8a8_row", "nf4_b64", "q4_k", "nvfp4a16"])
def test_other_schemes_are_left_alone(name: str) -> None:
    assert not Learned().takes(Scheme.parse(name))
    assert Learned(bits=4).takes(Scheme.parse(name)) == (name == "w4a16_g32")


@pytest.mark.parametrize(
    "override", ["iterations=0", "looks=0", "codes=-1", "scales=-0.1", "held_out=0", "seed=1"]
)
def test_options_are_checked(override: str) -> None:
    with pytest.raises(RecipeError, match="refine 'learned'"):
        load_recipe("best", overrides=("refine=learned", f"refine.{override}")).make_refine()
