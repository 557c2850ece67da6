"""Quantized tensors decode to exactly what their parts say."""

from __future__ import annotations

import pytest
import torch
from quantkit_kernels.ops.codebook import NF4

import quantkit.numbers.tensor
from quantkit.errors import NumericsError
from quantkit.numbers.nested import nest
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor, decode_rows


def integer(name: str = "w4a16_g32_asym", rows: int = 6) -> QuantizedTensor:
    scheme = Scheme.parse(name)
    generator = torch.Generator().manual_seed(0)
    groups = 64 // (scheme.group_size or 64)
    codes = torch.randint(1, 2**scheme.bits, (rows, 64), generator=generator)
    zero = torch.randint(1, 2**scheme.bits, (rows, groups), generator=generator)
    scale = torch.rand(rows, groups, generator=generator).to(torch.bfloat16).float()
    return QuantizedTensor(
        codes=codes.to(torch.uint8),
        scale=PlainScale(tensor=scale),
        zero=None if scheme.symmetric else zero.to(torch.uint8),
        scheme=scheme,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("name", ["w4a16_g32_asym", "w4a16_g32", "w8a16_row", "w2a16_g32"])
def test_a_weight_is_code_less_zero_times_scale(name: str) -> None:
    tensor = integer(name)
    scale = tensor.scale.values()
    found = tensor.dequantize(torch.float32)
    size = 64 // scale.shape[1]
    for row in range(6):
        for column in range(64):
            group = column // size
            zero = 2 ** (tensor.scheme.bits - 1)
            if tensor.zero is not None:
                zero = int(tensor.zero[row, group])
            value = (int(tensor.codes[row, column]) - zero) * float(scale[row, group])
            assert float(found[row, column]) == pytest.approx(value, rel=1e-7)
    assert torch.equal(tensor.dequantize(), found.to(torch.bfloat16))
    assert tensor.dequantize().dtype == torch.bfloat16
    assert tensor.shape == (6, 64)


def test_decoding_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = integer(rows=37)
    whole = tensor.dequantize()
    monkeypatch.setattr(quantkit.numbers.tensor, "_DECODE_ELEMENTS", 5 * 64 + 1)
    assert torch.equal(tensor.dequantize(), whole)
    assert tensor.zero is not None
    rows = slice(3, 5)
    scale = tensor.scale.values()[rows]
    part = decode_rows(tensor.codes[rows], scale, tensor.zero[rows], tensor.scheme)
    assert torch.equal(part.to(torch.bfloat16), whole[rows])


@pytest.mark.parametrize("columns", [64, 33], ids=["within rows", "straddling rows"])
def test_flat_blocks_follow_the_row_major_order(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (5, columns), generator=generator).to(torch.uint8)
    count = -(-5 * columns // 64)
    scale = torch.rand(count, generator=generator)
    tensor = QuantizedTensor(
        codes=codes,
        scale=PlainScale(tensor=scale.view(5, 1) if columns == 64 else scale),
        zero=None,
        scheme=Scheme.parse("nf4_b64"),
        dtype=torch.float32,
    )
    flat = tensor.dequantize().view(-1)
    for index in range(5 * columns):
        value = NF4[int(codes.view(-1)[index])] * float(scale[index // 64])
        assert float(flat[index]) == pytest.approx(value, rel=1e-6, abs=1e-9)


def test_nested_scales_give_back_about_what_they_hold() -> None:
    scale = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) + 0.5
    nested = nest(scale)
    assert nested.codes.dtype == torch.uint8 and nested.codes.shape == (1200,)
    assert nested.absmax.shape == (5,)
    assert nested.values().shape == (40, 30)
    outer = nested.absmax.repeat_interleave(256)[:1200].view(40, 30)
    by_hand = nested.table[nested.codes.long()].view(40, 30) * outer + nested.offset
    assert torch.equal(nested.values(), by_hand)
    # The dynamic map's widest gap is 0.0141 of the block's largest deviation, 0.5; half of it.
    assert float((nested.values() - scale).abs().max()) < 0.0075 * 0.51


def test_constant_scales_nest_exactly() -> None:
    scale = torch.full((300,), 0.37)
    torch.testing.assert_close(nest(scale).values(), scale)


def test_a_check_names_the_weight() -> None:
    integer().check("w")
    broken = integer()
    assert isinstance(broken.scale, PlainScale)
    broken.scale.tensor[2, 1] = float("inf")
    with pytest.raises(NumericsError, match=r"layers\.0\.up_proj: a scale is NaN or infinite"):
        broken.check("layers.0.up_proj")
    broken = integer("w2a16_g32")
    broken.codes[0, 0] = 4
    with pytest.raises(NumericsError, match="w: code 4 does not fit 2 bits"):
        broken.check("w")
