"""What stands in the place of a fused parameter answers as the decoded parameter would."""

from __future__ import annotations

import copy

import pytest
import torch
from format_samples import quantized
from torch import Tensor, nn

from quantkit.inference.layers import QuantExperts, QuantLinear
from quantkit.inference.slices import SlicedWeight
from quantkit.numbers.scheme import Scheme

# Of float32 sums of 32 products of up to 64 each, in another order.
_TOLERANCE = 1e-3
_SCHEME = Scheme.parse("w4a16_g32")
_E, _T, _O, _I = 3, 5, 48, 32


class Own(nn.Module):
    """Experts of a class that keeps to no interface, with every call that one was seen to make."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)

    def forward(self, x_ETI: Tensor, call: str) -> Tensor:
        if call == "linear":
            return torch.stack(
                [nn.functional.linear(x, self.weight[e]) for e, x in enumerate(x_ETI)]
            )
        if call == "turned":
            number = torch.tensor(1)
            return x_ETI[1] @ self.weight[number].t()
        if call == "matmul":
            return torch.stack([x @ self.weight[e] for e, x in enumerate(x_ETI)])
        if call == "bmm":
            return torch.bmm(x_ETI.view(self.weight.shape[0], -1, x_ETI.shape[2]), self.weight)
        if call == "einsum":
            return torch.einsum("eti,eoi->eto", x_ETI, self.weight)
        return torch.bmm(x_ETI, self.weight.transpose(1, 2))


def both(*, transposed: bool) -> tuple[Own, QuantExperts]:
    """Own code on decoded values, and on what stands for them; gate and up are two pieces."""
    tensors = [
        [quantized(_SCHEME, (_O // 2, _I), torch.float32, 2 * e + part) for part in range(2)]
        for e in range(_E)
    ]
    values = torch.stack([torch.cat([t.dequantize() for t in pieces]) for pieces in tensors])
    plain = Own(*(values.transpose(1, 2) if transposed else values).shape)
    layer = QuantExperts(
        copy.deepcopy(plain), {"weight": [[QuantLinear(t) for t in pieces] for pieces in tensors]}
    )
    plain.weight.copy_(values.transpose(1, 2) if transposed else values)
    return plain, layer


@pytest.mark.parametrize(
    ("call", "transposed"),
    [
        ("linear", False),
        ("turned", False),
        ("einsum", False),
        ("bmm of a view", False),
        ("matmul", True),
        ("bmm", True),
    ],
)
def test_own_code_computes_what_it_would_on_decoded_values(call: str, transposed: bool) -> None:
    plain, layer = both(transposed=transposed)
    x = torch.randn(_E, _T, _I, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x, call), plain(x, call), rtol=0, atol=_TOLERANCE)
    torch.testing.assert_close(
        copy.deepcopy(layer)(x, call), plain(x, call), rtol=0, atol=_TOLERANCE
    )


def test_known_products_decode_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = both(transposed=True)

    def fail(self: SlicedWeight) -> Tensor:
        raise AssertionError("decoded")

    monkeypatch.setattr(SlicedWeight, "decoded", fail)
    assert layer(torch.ones(_E, _T, _I), "bmm").shape == (_E, _T, _O)
    with pytest.raises(AssertionError, match="decoded"):
        layer(torch.ones(_E, _T, _I), "einsum")


def test_the_place_shows_shape_and_dtype_and_no_parameter() -> None:
    _, layer = both(transposed=True)
    weight = layer.base.weight
    assert isinstance(weight, SlicedWeight)
    assert (weight.shape, len(weight)) == ((_E, _I, _O), _E)
    assert (weight.dtype, weight.transposed) == (torch.float32, True)
    assert not list(layer.base.parameters())
