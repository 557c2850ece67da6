"""bitsandbytes: bytes as bitsandbytes 0.50.2 `quantize_4bit` gives them, and its config."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from format_samples import MemorySource, planned

from quantkit.errors import CheckpointError, FormatError
from quantkit.formats.registry import make_format
from quantkit.numbers.grid import grid_of
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import NestedScale, PlainScale, QuantizedTensor

# quantize_4bit(linspace(-1, 1, 64) with 0.3, -0.3, 0.01 in front, blocksize=64), then dequantized.
_PACKED = {
    "nf4": "b4700111111112222233344445556667788899aaabbbccccddddeeeeeeefffff",
    "fp4": "4c1bbbaaaaaaaadddddccccffeeee99911166667744445555522222222333333",
}
_DECODED = {
    "nf4": [0.33791524171829224, -0.28444138169288635, 0.0, -0.6961928009986877, 1.0],
    "fp4": [0.3333333432674408, -0.3333333432674408, 0.0052083334885537624, -0.6666666865348816, 1],
}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bytes_are_those_of_bitsandbytes(kind: str) -> None:
    chosen = make_format("bitsandbytes")
    values = torch.linspace(-1, 1, 64)
    values[:3] = torch.tensor([0.3, -0.3, 0.01])
    scheme = Scheme.parse(f"{kind}_b64")
    codes = grid_of(scheme).encode(values.view(1, 64), torch.ones(1, 1), None)
    tensor = QuantizedTensor(
        codes=codes.to(torch.uint8).view(2, 32),
        scale=PlainScale(tensor=torch.ones(1)),
        zero=None,
        scheme=scheme,
        dtype=torch.float32,
    )
    packed = chosen.pack(planned("a.weight", (2, 32), scheme), tensor)
    assert bytes(packed["a.weight"].flatten().tolist()).hex() == _PACKED[kind]
    source = MemorySource(config={}, tensors=packed)
    back = chosen.unpack(chosen.weights(source)["a.weight"], source).dequantize().flatten()
    assert back[[0, 1, 2, 10, 63]].tolist() == torch.tensor(_DECODED[kind]).tolist()
    # FP4's second zero is a positive one in the owner's table, which is compared as bytes.
    assert not bool(torch.signbit(packed["a.weight.quant_map"][8])) or kind == "nf4"


def test_bitsandbytes_puts_the_first_code_into_the_high_nibble() -> None:
    scheme = Scheme.parse("nf4_b64")
    codes = torch.arange(64).remainder(16).to(torch.uint8).view(2, 32)
    tensor = QuantizedTensor(
        codes=codes,
        scale=PlainScale(tensor=torch.tensor([3.0])),
        zero=None,
        scheme=scheme,
        dtype=torch.bfloat16,
    )
    packed = make_format("bitsandbytes").pack(planned("a.weight", (2, 32), "nf4_b64"), tensor)
    assert tuple(packed["a.weight"].shape) == (32, 1)
    assert bytes(packed["a.weight"].flatten().tolist()).hex() == "0123456789abcdef" * 4
    assert packed["a.weight.absmax"].tolist() == [3.0]
    assert packed["a.weight.quant_map"][[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]
    state = bytes(packed["a.weight.quant_state.bitsandbytes__nf4"].tolist())
    assert state == (
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 32]}'
    )


def nested(offset: float) -> QuantizedTensor:
    """6 x 32 weights in blocks of 64 with the scales bitsandbytes gave them."""
    table = torch.linspace(-1, 1, 256)
    scale = NestedScale(
        codes=torch.tensor([43, 28, 255], dtype=torch.uint8),
        table=table,
        absmax=torch.tensor([1.4572426080703735]),
        offset=torch.tensor(offset),
        shape=(3,),
    )
    return QuantizedTensor(
        codes=torch.full((6, 32), 7, dtype=torch.uint8),
        scale=scale,
        zero=None,
        scheme=Scheme.parse("nf4_b64_dq"),
        dtype=torch.float32,
    )


@pytest.mark.parametrize("offset", [1.5427573919296265, 0.0, -1.1754943508222875e-38, 3.4e38])
def test_quant_state_has_one_length_whatever_the_offset(offset: float) -> None:
    chosen = make_format("bitsandbytes")
    weight = planned("a.weight", (6, 32), "nf4_b64_dq")
    key = "a.weight.quant_state.bitsandbytes__nf4"
    packed = chosen.pack(weight, nested(offset))
    assert {i.name: i.shape for i in chosen.layout(weight, torch.float32)}[key] == tuple(
        packed[key].shape
    )
    state = bytes(packed[key].tolist())
    assert torch.tensor(json.loads(state)["nested_offset"]) == torch.tensor(offset)
    if offset == 1.5427573919296265:
        assert state.rstrip() == (
            b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [6, 32], '
            b'"nested_blocksize": 256, "nested_dtype": "float32", '
            b'"nested_offset": 1.5427573919296265}'
        )


def test_bitsandbytes_own_unpadded_description_is_read() -> None:
    chosen = make_format("bitsandbytes")
    weight = planned("a.weight", (6, 32), "nf4_b64_dq")
    packed = chosen.pack(weight, nested(1.5427573919296265))
    key = "a.weight.quant_state.bitsandbytes__nf4"
    trimmed = bytes(packed[key].tolist()).rstrip()
    packed[key] = torch.tensor(list(trimmed), dtype=torch.uint8)
    source = MemorySource(config={}, tensors=packed)
    tensor = chosen.unpack(chosen.weights(source)["a.weight"], source)
    assert isinstance(tensor.scale, NestedScale)
    assert float(tensor.scale.offset) == 1.5427573919296265


def test_odd_number_of_weights_pads_with_the_code_of_zero() -> None:
    chosen = make_format("bitsandbytes")
    tensor = QuantizedTensor(
        codes=torch.full((3, 3), 15, dtype=torch.uint8),
        scale=PlainScale(tensor=torch.ones(1)),
        zero=None,
        scheme=Scheme.parse("nf4_b32"),
        dtype=torch.float32,
    )
    packed = chosen.pack(planned("a.weight", (3, 3), "nf4_b32"), tensor)["a.weight"]
    assert packed.flatten().tolist() == [255, 255, 255, 255, 0xF7]


@pytest.mark.parametrize(
    "change",
    [
        {"blocksize": 48},
        {"blocksize": "64"},
        {"shape": [6]},
        {"shape": [6, -32]},
        {"shape": [6, True]},
        {"shape": [12, 32]},
        {"dtype": "int8"},
        {"quant_type": "fp4"},
        {"nested_blocksize": 128},
        {"nested_offset": "1"},
    ],
    ids=str,
)
def test_a_damaged_description_is_refused(change: dict[str, Any]) -> None:
    chosen = make_format("bitsandbytes")
    packed = chosen.pack(planned("a.weight", (6, 32), "nf4_b64_dq"), nested(1.5))
    key = "a.weight.quant_state.bitsandbytes__nf4"
    state = {**json.loads(bytes(packed[key].tolist())), **change}
    packed[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        chosen.weights(MemorySource(config={}, tensors=packed))


def test_skipped_modules_are_module_names_and_never_a_quantized_one() -> None:
    chosen = make_format("bitsandbytes")
    weights = [
        planned("h.0.c_attn.weight", (32, 64), "nf4_b64_dq", module="transformer.h.0.c_attn"),
        planned("h.1.c_attn.weight", (32, 64), None, module="transformer.h.1.c_attn"),
        planned("lm_head.weight", (99, 64), None),
    ]
    config = chosen.config(weights, model_type="gpt2", dtype=torch.bfloat16)
    assert config["llm_int8_skip_modules"] == ["transformer.h.1.c_attn", "lm_head"]
    assert config["bnb_4bit_quant_type"] == "nf4"
    assert config["bnb_4bit_use_double_quant"] is True
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"
    weights.append(planned("attn.weight", (32, 64), None))
    with pytest.raises(FormatError, match=r"h\.0\.c_attn\.weight: .*keep both"):
        chosen.config(weights, model_type="gpt2", dtype=torch.bfloat16)
