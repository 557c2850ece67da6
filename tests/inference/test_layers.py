"""QuantLinear and QuantExperts against slow, obvious references."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantkit.inference.layers import QuantExperts, QuantLinear, int8_matmul
from quantkit.numbers.activations import fake_quantize_activation, quantize_activation
from quantkit.numbers.grid import blocks, grid_of, store_scale, unblocks
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import (
    DividedScale,
    NestedScale,
    PlainScale,
    QuantizedTensor,
    Scale,
    tensors_of,
)

SCHEMES = [
    "w4a16_g32",
    "w4a16_g32_asym",
    "w2a16_g16",
    "w3a16_row",
    "w8a16_row",
    "w5a16_g16_asym",
    "w8a8_row",
    "w4a8_g32",
    "w4afp8_g32",
    "w4a8_row",
    "fp8a8_row",
    "fp8a16_row",
    "nf4_b64",
    "nf4_b64_dq",
    "mxfp4a16",
    "nvfp4a16",
]


def make_tensor(
    name: str, shape: tuple[int, int], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> QuantizedTensor:
    """A random weight rounded to the nearest codes of a scheme."""
    scheme = Scheme.parse(name)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.1
    grouped = blocks(weight, scheme)
    zero = None
    absmax = grouped.abs().amax(dim=1, keepdim=True)
    step = absmax if scheme.flat else store_scale(absmax * 2 / (2**scheme.bits - 1))
    if scheme.kind == "mxfp4":
        step = torch.exp2((absmax / 6).log2().ceil())
    elif scheme.kind == "nvfp4":
        step = DividedScale.of(absmax / 6, 300.0).values()
    if not scheme.symmetric:
        zero = torch.full_like(step, 2 ** (scheme.bits - 1) - 1)
    codes = unblocks(grid_of(scheme).encode(grouped, step, zero), shape).to(torch.uint8)
    straddles = scheme.flat and shape[1] % (scheme.group_size or 1) != 0
    scale_shape = (-1,) if straddles else (shape[0], -1)
    values = step.view(scale_shape)
    scale: Scale = PlainScale(tensor=values)
    if scheme.kind == "nvfp4":
        scale = DividedScale.of(values, 300.0)
    if scheme.double_quant:
        count = step.numel()
        scale = NestedScale(
            codes=torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8),
            table=torch.linspace(-1, 1, 256),
            absmax=torch.rand(-(-count // 256), generator=generator) * 0.01,
            offset=torch.tensor(0.2),
            shape=tuple(values.shape),
        )
    return QuantizedTensor(
        codes=codes,
        scale=scale,
        zero=None if zero is None else zero.view(shape[0], -1).to(torch.uint8),
        scheme=scheme,
        dtype=dtype,
    )


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    """Of any dtype: torch compares no float8."""
    return numbers.reshape(-1).contiguous().view(torch.uint8)


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether two tensors hold the same numbers, bit for bit."""
    found, wanted = tensors_of(a.scale), tensors_of(b.scale)
    assert type(a.scale) is type(b.scale) and found.keys() == wanted.keys()
    parts = [(a.codes, b.codes), *((found[name], wanted[name]) for name in found)]
    if isinstance(a.scale, NestedScale):
        assert isinstance(b.scale, NestedScale)
        assert (a.scale.shape, a.scale.block) == (b.scale.shape, b.scale.block)
    if a.zero is not None:
        assert b.zero is not None
        parts.append((a.zero, b.zero))
    equal = all(x.dtype == y.dtype and torch.equal(_bytes(x), _bytes(y)) for x, y in parts)
    return equal and (a.scheme, a.dtype) == (b.scheme, b.dtype)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(24, 64), (7, 160), (1, 32)], ids=str)
def test_the_canonical_tensor_comes_back_bit_for_bit(name: str, shape: tuple[int, int]) -> None:
    tensor = make_tensor(name, shape)
    assert same(QuantLinear(tensor).quantized_tensor, tensor)


def test_odd_columns_are_kept_unpacked() -> None:
    tensor = make_tensor("w4a16_row", (6, 33))
    layer = QuantLinear(tensor)
    assert same(layer.quantized_tensor, tensor)
    x = torch.randn(3, 33)
    assert torch.equal(layer(x), x @ tensor.dequantize().t())


@pytest.mark.parametrize(
    ("name", "bytes_per_weight"), [("w4a16_row", 0.5), ("w2a16_row", 0.25), ("w8a16_row", 1.0)]
)
def test_codes_take_the_memory_of_their_bits(name: str, bytes_per_weight: float) -> None:
    layer = QuantLinear(make_tensor(name, (16, 256)))
    assert layer.kernel.codes.nbytes == 16 * 256 * bytes_per_weight


@pytest.mark.parametrize("name", [n for n in SCHEMES if Scheme.parse(n).activation_bits == 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_equals_a_linear_on_the_decoded_weight(name: str, dtype: torch.dtype) -> None:
    tensor = make_tensor(name, (24, 160))
    bias = torch.randn(24)
    x = torch.randn(2, 5, 160).to(dtype)
    expected = nn.functional.linear(x, tensor.dequantize(dtype), bias.to(dtype))
    assert torch.equal(QuantLinear(tensor, bias)(x), expected)


def test_a_large_weight_is_decoded_in_row_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = make_tensor("w4a16_g32_asym", (24, 64))
    x, bias = torch.randn(3, 64), torch.randn(24)
    whole = QuantLinear(tensor, bias)(x)
    monkeypatch.setattr("quantkit.inference.reference._ROWS_ELEMENTS", 5 * 64)
    # Chunks of rows may be blocked differently by the matmul: the last bits of float32.
    torch.testing.assert_close(QuantLinear(tensor, bias)(x), whole, atol=1e-5, rtol=0)


def test_casting_a_model_leaves_scales_as_stored() -> None:
    tensor = make_tensor("nf4_b64_dq", (24, 128))
    model = nn.Sequential(QuantLinear(tensor, torch.randn(24))).to(torch.bfloat16)
    layer = model[0]
    assert isinstance(layer, QuantLinear)
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16
    assert same(layer.quantized_tensor, tensor)


def test_state_dict_round_trip() -> None:
    source = QuantLinear(make_tensor("w4a16_g32_asym", (24, 64), seed=1))
    target = QuantLinear(make_tensor("w4a16_g32_asym", (24, 64), seed=2))
    target.load_state_dict(source.state_dict())
    assert same(target.quantized_tensor, source.quantized_tensor)


def test_integer_product_is_exact_beyond_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (3, 5000), generator=generator, dtype=torch.int8)
    codes = torch.randint(1, 256, (9, 5000), generator=generator, dtype=torch.uint8)
    x[0], codes[0] = 127, 255  # 127 · 127 · 5000 > 2^24
    expected = x.to(torch.int64) @ (codes.to(torch.int64) - 128).t()
    assert torch.equal(int8_matmul(x, codes).to(torch.int64), expected)


def test_int8_layer_equals_integer_arithmetic_in_float64() -> None:
    tensor = make_tensor("w8a8_row", (24, 64))
    bias = torch.randn(24)
    x = torch.randn(2, 5, 64)
    codes, scale = quantize_activation(x)
    product = codes.to(torch.float64) @ (tensor.codes.to(torch.float64) - 128).t()
    expected = product * scale * tensor.scale.values().view(-1) + bias
    # Two float32 products and a sum: three roundings of 2^-24 each.
    torch.testing.assert_close(
        QuantLinear(tensor, bias)(x).to(torch.float64), expected, rtol=1e-6, atol=1e-6
    )


def test_int8_layer_agrees_with_the_fake_quantization_of_the_pipeline() -> None:
    tensor = make_tensor("w8a8_row", (24, 64))
    x = torch.randn(5, 64)
    simulated = nn.functional.linear(
        fake_quantize_activation(x, Scheme.parse("w8a8_row")), tensor.dequantize()
    )
    # The same codes; float32 sums of 64 products in another order.
    torch.testing.assert_close(QuantLinear(tensor)(x), simulated, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["w4a8_g32", "w4afp8_g32"])
def test_4_bit_layers_round_their_input_as_the_pipeline_does(name: str) -> None:
    tensor = make_tensor(name, (24, 160))
    x = torch.randn(5, 160)
    # By hand: each token's largest number becomes the largest code.
    scale = x.abs().amax(dim=1, keepdim=True) / (448 if "fp8" in name else 127)
    codes = x / scale
    rounded = codes.to(torch.float8_e4m3fn).float() if "fp8" in name else codes.round()
    expected = nn.functional.linear(rounded * scale, tensor.dequantize())
    torch.testing.assert_close(QuantLinear(tensor)(x), expected, rtol=1e-5, atol=1e-6)


def test_activation_codes_round_half_to_even_and_stay_within_127() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    codes, scale = quantize_activation(x)
    assert codes.tolist() == [[127, 0, 2, -2, -127], [0, 0, 0, 0, 0]]
    assert scale[0].item() == 1.0
    assert torch.equal(fake_quantize_activation(x, Scheme.parse("w8a8_row"))[1], torch.zeros(5))


def test_a_non_finite_activation_shows_in_the_output() -> None:
    layer = QuantLinear(make_tensor("w8a8_row", (24, 64)))
    x = torch.randn(2, 64)
    x[0, 3] = float("nan")
    out = layer(x)
    assert not torch.isfinite(out[0]).any()
    assert torch.isfinite(out[1]).all()


class Experts(nn.Module):
    """A fused experts layer with the attributes transformers gives its own."""

    has_gate, has_bias, is_transposed = True, True, False

    def __init__(self, num_experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * inner, hidden) * 0.1)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(num_experts, 2 * inner))
        self.down_proj = nn.Parameter(torch.randn(num_experts, hidden, inner) * 0.1)
        self.down_proj_bias = nn.Parameter(torch.randn(num_experts, hidden))

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def test_quantized_experts_equal_the_fused_loop_on_decoded_weights() -> None:
    torch.manual_seed(0)
    experts, hidden, inner, tokens = 3, 32, 64, 11
    base = Experts(experts, hidden, inner)
    index = torch.randint(0, experts, (tokens, 2))
    routing = torch.rand(tokens, 2)
    x = torch.randn(tokens, hidden)
    pieces: list[list[nn.Module]] = []
    fused = base.gate_up_proj.detach().clone()
    for expert in range(experts):
        gate = make_tensor("w4a16_g32", (inner, hidden), seed=expert)
        kept = nn.Linear(hidden, inner, bias=False)
        kept.weight.data = fused[expert, inner:]
        fused[expert, :inner] = gate.dequantize()
        pieces.append([QuantLinear(gate), kept])
    expected = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for slot in range(2):
            e = int(index[token, slot])
            mid = base._apply_gate(fused[e] @ x[token] + base.gate_up_proj_bias[e])
            out = base.down_proj[e] @ mid + base.down_proj_bias[e]
            expected[token] += routing[token, slot] * out
    quantized = QuantExperts(base, {"gate_up_proj": pieces})
    with torch.no_grad():
        # Sums over 64 products in another order.
        torch.testing.assert_close(quantized(x, index, routing), expected, atol=1e-5, rtol=1e-5)
    assert base.gate_up_proj is None
