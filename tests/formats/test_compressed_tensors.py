"""compressed-tensors: bytes as its version 0.20 packs them, and its config."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from format_samples import MemorySource, hexes, integers, planned, quantized, stored
from torch import Tensor

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.errors import CheckpointError, NumericsError
from quantkit.formats.format import PlannedWeight
from quantkit.formats.registry import format_of, make_format
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import QuantizedTensor


def test_compressed_tensors_packs_as_its_owner_does() -> None:
    chosen = make_format("compressed-tensors")
    four = (torch.arange(20).reshape(2, 10) * 7 + 3) % 16
    packed = chosen.pack(planned("a.weight", (2, 10), "w4a16_row"), integers("w4a16_row", four))
    assert hexes(packed["a.weight_packed"]) == [["4d6f81a3", "2b"], ["a3c5e709", "81"]]
    assert packed["a.weight_shape"].tolist() == [2, 10]
    eight = (torch.arange(10).reshape(2, 5) * 53 + 11) % 256
    packed = chosen.pack(planned("a.weight", (2, 5), "w8a16_row"), integers("w8a16_row", eight))
    assert hexes(packed["a.weight_packed"]) == [["aa75400b", "df"], ["b37e4914", "e8"]]


def words_of(codes: list[int], bits: int) -> list[str]:
    """The codes as one long number, the first in its lowest bits, cut into 32-bit words."""
    stream = sum(code << (bits * place) for place, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [f"{stream >> (32 * word) & 0xFFFFFFFF:x}" for word in range(count)]


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_codes_of_any_width_lie_without_gaps(bits: int) -> None:
    scheme = f"w{bits}a16_row_asym"
    codes = (torch.arange(7 * 45).reshape(7, 45) * 53 + 11) % 2**bits
    zero = 1 + torch.arange(7)[:, None] % (2**bits - 1)
    packed = make_format("compressed-tensors").pack(
        planned("a.weight", (7, 45), scheme), integers(scheme, codes, zero)
    )
    assert hexes(packed["a.weight_packed"]) == [words_of(row, bits) for row in codes.tolist()]
    assert hexes(packed["a.weight_zero_point"].T) == [words_of(zero[:, 0].tolist(), bits)]


def test_words_with_gaps_of_older_releases_are_refused() -> None:
    chosen = make_format("compressed-tensors")
    weight = planned("m.0.a.weight", (32, 64), "w3a16_g32")
    packed = chosen.pack(weight, quantized(Scheme.parse("w3a16_g32"), (32, 64), torch.float16))
    # Ten codes of 3 bits in each word.
    packed["m.0.a.weight_packed"] = torch.zeros(32, 7, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"m\.0\.a\.weight_packed.*7"):
        chosen.weights(stored(chosen, [weight], packed, torch.float16))


def test_compressed_tensors_packs_zeros_along_rows() -> None:
    zero = torch.tensor([[1, 2], [3, 4], [15, 9]])
    tensor = integers("w4a16_g32_asym", torch.zeros(3, 64), zero)
    packed = make_format("compressed-tensors").pack(
        planned("a.weight", (3, 64), "w4a16_g32_asym"), tensor
    )
    assert hexes(packed["a.weight_zero_point"]) == [["f31", "942"]]


def test_w8a8_is_stored_as_signed_bytes_and_transposed_for_conv1d() -> None:
    chosen = make_format("compressed-tensors")
    tensor = integers("w8a8_row", torch.tensor([[1, 128, 255], [129, 127, 2]]))
    packed = chosen.pack(planned("a.weight", (2, 3), "w8a8_row"), tensor)
    assert packed["a.weight"].dtype == torch.int8
    assert packed["a.weight"].tolist() == [[-127, 0, 127], [1, -1, -126]]
    assert tuple(packed["a.weight_scale"].shape) == (2, 1)
    turned = planned("a.weight", (2, 3), "w8a8_row", transposed=True)
    assert torch.equal(chosen.pack(turned, tensor)["a.weight"], packed["a.weight"].T)
    assert chosen.layout(turned, torch.float32)[0].shape == (3, 2)


def test_w4a8_is_stored_as_signed_bytes_too() -> None:
    chosen = make_format("compressed-tensors")
    codes = torch.arange(2 * 64).reshape(2, 64) % 16
    tensor, weight = integers("w4a8_g32", codes), planned("a.weight", (2, 64), "w4a8_g32")
    packed = chosen.pack(weight, tensor)
    assert torch.equal(packed["a.weight"], (codes - 8).to(torch.int8))
    assert tuple(packed["a.weight_scale"].shape) == (2, 2)
    config = chosen.config([weight], model_type="llama", dtype=torch.float32)
    (group,) = config["config_groups"].values()
    assert group["format"] == "int-quantized"
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 32)
    activations = group["input_activations"]
    assert [activations[key] for key in ("num_bits", "strategy", "group_size", "dynamic")] == [
        *(8, "token", None, True)
    ]
    source = MemorySource(config={"quantization_config": config}, tensors=packed)
    (found,) = chosen.weights(source).values()
    assert found.scheme == tensor.scheme
    assert torch.equal(chosen.unpack(found, source).codes, tensor.codes)
    packed["a.weight"][1, 5] = 8
    with pytest.raises(NumericsError, match=r"a\.weight: code 16 does not fit 4 bits"):
        chosen.unpack(found, source)


def test_w4afp8_is_packed_beside_the_description_of_its_input() -> None:
    chosen = make_format("compressed-tensors")
    codes = torch.arange(2 * 64).reshape(2, 64) % 16
    tensor, weight = integers("w4afp8_g32", codes), planned("a.weight", (2, 64), "w4afp8_g32")
    packed = chosen.pack(weight, tensor)
    plain = chosen.pack(planned("a.weight", (2, 64), "w4a16_g32"), integers("w4a16_g32", codes))
    assert packed.keys() == plain.keys()
    assert all(torch.equal(packed[name], plain[name]) for name in plain)
    config = chosen.config([weight], model_type="llama", dtype=torch.float32)
    (group,) = config["config_groups"].values()
    assert group["format"] == config["format"] == "pack-quantized"
    activations = group["input_activations"]
    keys = ("num_bits", "type", "strategy", "group_size", "dynamic", "symmetric")
    assert [activations[key] for key in keys] == [8, "float", "token", None, True, True]
    source = MemorySource(config={"quantization_config": config}, tensors=packed)
    (found,) = chosen.weights(source).values()
    assert found.scheme == tensor.scheme
    activations["dynamic"] = False
    with pytest.raises(CheckpointError, match="w4afp8"):
        chosen.weights(source)


def test_transposed_w8a8_comes_back_even_if_square() -> None:
    chosen = make_format("compressed-tensors")
    weights = [
        planned("h.0.attn.c_attn.weight", (6, 2), "w8a8_row", transposed=True),
        planned("h.0.attn.c_proj.weight", (2, 2), "w8a8_row", transposed=True),
        planned("lm_head.weight", (5, 2), "w8a8_row"),
    ]
    originals: dict[str, QuantizedTensor] = {}
    tensors: dict[str, Tensor] = {}
    for weight in weights:
        codes = torch.arange(1, weight.shape[0] * weight.shape[1] + 1).reshape(weight.shape)
        originals[weight.name] = integers("w8a8_row", codes)
        tensors.update(chosen.pack(weight, originals[weight.name]))
    config = chosen.config(weights, model_type="gpt2", dtype=torch.float32)
    source = MemorySource(config={"quantization_config": config}, tensors=tensors)
    found = chosen.weights(source)
    assert {name: entry.transposed for name, entry in found.items()} == {
        weight.name: weight.transposed for weight in weights
    }
    for name, original in originals.items():
        assert torch.equal(chosen.unpack(found[name], source).codes, original.codes)


def test_square_w8a8_of_a_model_without_conv1d_stays_as_it_is() -> None:
    chosen = make_format("compressed-tensors")
    weight = planned("model.layers.0.self_attn.q_proj.weight", (3, 3), "w8a8_row")
    original = integers("w8a8_row", torch.arange(1, 10).reshape(3, 3))
    config = chosen.config([weight], model_type="llama", dtype=torch.float32)
    source = MemorySource(
        config={"quantization_config": config}, tensors=chosen.pack(weight, original)
    )
    (found,) = chosen.weights(source).values()
    assert torch.equal(chosen.unpack(found, source).codes, original.codes)


def test_a_scale_that_the_dtype_cannot_hold_is_an_error() -> None:
    tensor = integers("w4a16_row", torch.zeros(2, 32), scale=0.1)
    tensor = QuantizedTensor(
        codes=tensor.codes,
        scale=tensor.scale,
        zero=None,
        scheme=tensor.scheme,
        dtype=torch.bfloat16,
    )
    weight = planned("model.a.weight", (2, 32), "w4a16_row")
    for name in ("compressed-tensors", "gptq_v2"):
        with pytest.raises(NumericsError, match=r"model\.a\.weight: a scale is not exact"):
            make_format(name).pack(weight, tensor)


def test_config_targets_linear_and_ignores_by_both_names() -> None:
    weights = [
        planned("model.layers.0.self_attn.q_proj.weight", (32, 64), "w4a16_g32"),
        planned(
            "model.layers.0.block_sparse_moe.gate.weight",
            (4, 64),
            None,
            module="model.layers.0.mlp.gate",
        ),
        planned("lm_head.weight", (99, 64), None),
    ]
    others = [
        TensorInfo(name="model.project_in.weight", dtype=torch.float32, shape=(64, 32)),
        TensorInfo(name="model.norm.weight", dtype=torch.float32, shape=(64,)),
        TensorInfo(name="model.project_in.bias", dtype=torch.float32, shape=(64, 1)),
    ]
    config = make_format("compressed-tensors").config(
        weights, model_type="mixtral", dtype=torch.bfloat16, others=others
    )
    assert config["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"
    assert "dequantize" not in config
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }
    assert config["ignore"] == [
        "model.layers.0.block_sparse_moe.gate",
        "model.layers.0.mlp.gate",
        "lm_head",
        "model.project_in",
    ]


def test_config_of_w8a8_asks_for_dynamic_tokens() -> None:
    weights = [planned("model.layers.0.a.weight", (32, 64), "w8a8_row")]
    config = make_format("compressed-tensors").config(
        weights, model_type="llama", dtype=torch.bfloat16
    )
    group = config["config_groups"]["group_0"]
    assert config["format"] == group["format"] == "int-quantized"
    assert group["weights"]["strategy"] == "channel"
    activations = group["input_activations"]
    assert (activations["strategy"], activations["dynamic"]) == ("token", True)


def test_mixed_schemes_have_their_own_groups_and_names() -> None:
    weights = [
        planned(f"model.layers.{block}.mlp.{name}.weight", (32, 64), scheme)
        for block in range(2)
        for name, scheme in (("up_proj", "w4a16_g32"), ("down_proj", "w8a8_row"))
    ]
    weights.append(planned("model.layers.2.mlp.up_proj.weight", (32, 64), "w4a16_g32"))
    weights.append(planned("lm_head.weight", (99, 64), "w4a16_g32"))
    config = make_format("compressed-tensors").config(
        weights, model_type="llama", dtype=torch.bfloat16
    )
    assert config["format"] == "mixed-precision"
    groups = config["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear", "lm_head"]
    assert groups["group_0"]["format"] == "pack-quantized"
    assert groups["group_1"]["targets"] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert groups["group_1"]["format"] == "int-quantized"


def test_experts_are_named_by_one_pattern_unless_they_differ() -> None:
    def expert(block: int, number: int, scheme: str | None) -> PlannedWeight:
        return planned(
            f"model.layers.{block}.mlp.experts.{number}.up_proj.weight",
            (32, 64),
            scheme,
            module=f"model.layers.{block}.mlp.experts.gate_up_proj",
            expert=True,
        )

    dense = [planned(f"model.layers.{n}.a.weight", (32, 64), "w8a16_row") for n in range(9)]
    chosen = make_format("compressed-tensors")
    alike = [expert(block, number, "w4a16_g32") for block in range(2) for number in range(3)]
    config = chosen.config([*dense, *alike], model_type="qwen3_moe", dtype=torch.float32)
    (pattern,) = config["config_groups"]["group_1"]["targets"]
    assert pattern.startswith("re:") and "experts" in pattern
    for weight in alike:
        assert re.match(pattern[3:], weight.name.removesuffix(".weight"))
    assert not any(re.match(pattern[3:], weight.module) for weight in dense)
    split = [expert(block, n, None if block else "w4a16_g32") for block in (0, 1) for n in (0, 1)]
    config = chosen.config([*dense, *split], model_type="qwen3_moe", dtype=torch.float32)
    assert config["config_groups"]["group_1"]["targets"] == [
        "model.layers.0.mlp.experts.0.up_proj",
        "model.layers.0.mlp.experts.1.up_proj",
    ]
    assert config["ignore"] == [
        "model.layers.1.mlp.experts.0.up_proj",
        "model.layers.1.mlp.experts.1.up_proj",
    ]


@pytest.mark.parametrize(
    ("model_type", "schemes", "transposed", "expected"),
    [
        ("llama", ["w4a16_g32_asym"], False, True),
        ("llama", ["w4a16_g32"], False, False),
        ("llama", ["w8a8_row"], False, False),
        ("falcon", ["w4a16_g32"], False, True),
        ("falcon", ["w4a16_g32", "w8a16_row"], False, False),
        ("falcon", ["w8a8_row"], False, False),
        ("gpt2", ["w4a16_g32"], True, True),
        ("gpt2", ["w8a8_row"], True, False),
    ],
)
def test_dequantize_is_asked_for_where_transformers_needs_it(
    model_type: str, schemes: list[str], transposed: bool, expected: bool
) -> None:
    weights = [
        planned(f"m.h.{number}.a.weight", (32, 64), scheme, transposed=transposed)
        for number, scheme in enumerate(schemes)
    ]
    config = make_format("compressed-tensors").config(
        weights, model_type=model_type, dtype=torch.float32
    )
    assert config.get("dequantize", False) is expected


def test_llm_compressors_config_is_read() -> None:
    chosen = make_format("compressed-tensors")
    weight = planned("model.layers.0.a.weight", (32, 256), "w4a16_g128_asym")
    tensor = integers("w4a16_g128_asym", torch.ones(32, 256), torch.full((32, 2), 7))
    config = {
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": "static",
                    "block_structure": None,
                    "dynamic": False,
                    "group_size": 128,
                    "num_bits": 4,
                    "observer": "minmax",
                    "observer_kwargs": {},
                    "strategy": "group",
                    "symmetric": False,
                    "type": "int",
                },
            }
        },
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    source = MemorySource(
        config={"quantization_config": config}, tensors=chosen.pack(weight, tensor)
    )
    assert format_of(source).name == "compressed-tensors"
    found = chosen.weights(source)[weight.name]
    assert torch.equal(chosen.unpack(found, source).dequantize(), tensor.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 3}, "weight_packed"),
        ({"num_bits": 9}, "9 bit"),
        ({"num_bits": True}, "not read"),
        ({"type": "float"}, "float"),
        ({"strategy": "tensor"}, "per tensor"),
        ({"actorder": "group"}, "not read"),
        ({"group_size": "32"}, "not read"),
        ({"group_size": 48}, "does not fit"),
        ({"symmetric": False}, "zero_point"),
    ],
)
def test_what_is_not_read_is_refused(change: dict[str, Any], message: str) -> None:
    chosen = make_format("compressed-tensors")
    weight = planned("model.layers.0.a.weight", (32, 64), "w4a16_g32")
    tensors = chosen.pack(weight, integers("w4a16_g32", torch.zeros(32, 64)))
    config = chosen.config([weight], model_type="llama", dtype=torch.float32)
    config["config_groups"]["group_0"]["weights"].update(change)
    source = MemorySource(config={"quantization_config": config}, tensors=tensors)
    with pytest.raises(CheckpointError, match=message):
        chosen.weights(source)


@pytest.mark.parametrize(
    "change",
    [
        {"targets": "Linear"},
        {"targets": [1]},
        {"targets": ["re:("]},
        {"targets": ["re:.*other"]},
        {"weights": None},
        {"format": "dense"},
    ],
    ids=str,
)
def test_a_damaged_config_group_is_refused(change: dict[str, Any]) -> None:
    chosen = make_format("compressed-tensors")
    weight = planned("model.layers.0.a.weight", (32, 64), "w4a16_g32")
    tensors = chosen.pack(weight, integers("w4a16_g32", torch.zeros(32, 64)))
    config = chosen.config([weight], model_type="llama", dtype=torch.float32)
    config["config_groups"]["group_0"].update(change)
    source = MemorySource(config={"quantization_config": config}, tensors=tensors)
    with pytest.raises(CheckpointError):
        chosen.weights(source)


@pytest.mark.parametrize("value", [torch.tensor([float("inf"), 64.0]), torch.tensor([32, 64, 1])])
def test_a_weight_shape_that_is_none_is_refused(value: Tensor) -> None:
    chosen = make_format("compressed-tensors")
    weight = planned("m.0.a.weight", (32, 64), "w4a16_g32")
    packed = chosen.pack(weight, quantized(Scheme.parse("w4a16_g32"), (32, 64), torch.float16))
    packed["m.0.a.weight_shape"] = value
    with pytest.raises(CheckpointError, match=r"m\.0\.a\.weight_shape: .*two int64 numbers"):
        chosen.weights(stored(chosen, [weight], packed, torch.float16))
