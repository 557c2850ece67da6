"""GPTQ: words as GPTQModel 7.7 `TorchLinear.pack_original` gives them, and its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from format_samples import MemorySource, hexes, integers, planned
from torch import Tensor

from quantkit.errors import CheckpointError, NumericsError
from quantkit.formats.bitpack import pack_rows, unpack_rows
from quantkit.formats.format import StoredWeight
from quantkit.formats.registry import make_format
from quantkit.inference.layers import QuantLinear
from quantkit.methods.ranges.minmax import Minmax
from quantkit.numbers.grid import grid_of
from quantkit.numbers.scheme import Scheme


@pytest.mark.parametrize(
    ("bits", "weight_words", "zero_words"),
    [
        (2, ["e4e4e4e4", "e4e4e4e4", "e4e4e4e4"], ["88888888", "88888888"]),
        (3, ["8cea878c", "878cea87", "ea878cea"], ["14c14c14", "4c14c14c", "c14c14c1"]),
        (4, ["72d83e94", "fa50b61c", "72d83e94"], ["e82c60a4", "e82c60a4", "e82c60a4"]),
        (8, ["534e4944", "67625d58", "7b76716c"], ["16100a04", "2e28221c", "46403a34"]),
    ],
)
def test_gptq_packs_as_gptqmodel_does(
    bits: int, weight_words: list[str], zero_words: list[str]
) -> None:
    rows = torch.arange(32)
    codes = (torch.arange(32 * 64).reshape(32, 64) * 5 + rows[:, None] * 3 + 1) % 2**bits
    zero = (torch.arange(32 * 2).reshape(32, 2) * 3 + 1) % 2**bits
    name = f"w{bits}a16_g32_asym"
    packed = make_format("gptq_v2").pack(
        planned("a.weight", (32, 64), name), integers(name, codes, zero)
    )
    assert hexes(packed["a.qweight"][:3, 1]) == weight_words
    assert hexes(packed["a.qzeros"][1, :3]) == zero_words
    assert packed["a.scales"].dtype == torch.float16
    assert packed["a.g_idx"].tolist() == [0] * 32 + [1] * 32


def slow_gptq(packed: Mapping[str, Tensor], bits: int, shape: tuple[int, int]) -> Tensor:
    """The weight from the description of the layout, one bit at a time."""

    def code(words: list[int], place: int) -> int:
        positions = range(place * bits, (place + 1) * bits)
        return sum((words[p // 32] >> (p % 32) & 1) << k for k, p in enumerate(positions))

    weight = torch.empty(shape)
    for o in range(shape[0]):
        column = packed["a.qweight"][:, o].tolist()
        for i in range(shape[1]):
            group = int(packed["a.g_idx"][i])
            zero = code(packed["a.qzeros"][group].tolist(), o)
            weight[o, i] = (code(column, i) - zero) * float(packed["a.scales"][group, o])
    return weight


@pytest.mark.parametrize("scheme", ["w2a16_g32", "w3a16_row", "w3a16_g32_asym", "w4a16_g32_asym"])
def test_gptq_layout_decodes_by_its_description(scheme: str) -> None:
    generator = torch.Generator().manual_seed(0)
    parsed = Scheme.parse(scheme)
    codes = torch.randint(0, 2**parsed.bits, (32, 64), generator=generator)
    groups = 64 // (parsed.group_size or 64)
    zero = torch.randint(0, 2**parsed.bits, (32, groups), generator=generator)
    tensor = integers(scheme, codes, None if parsed.symmetric else zero)
    packed = make_format("gptq_v2").pack(planned("a.weight", (32, 64), scheme), tensor)
    assert torch.equal(slow_gptq(packed, parsed.bits, (32, 64)), tensor.dequantize())


def source_of(name: str, scheme: str, packed: Mapping[str, Tensor]) -> MemorySource:
    """A checkpoint of the one weight a.0.weight, whose config is that of the format called so."""
    weight = planned("a.0.weight", (32, 64), scheme)
    config = make_format(name).config([weight], model_type="llama", dtype=torch.float16)
    return MemorySource(
        config={"dtype": "float16", "quantization_config": config}, tensors=dict(packed)
    )


def test_version_1_stores_zeros_less_one() -> None:
    rows = torch.arange(32)
    zero = (torch.arange(64).reshape(32, 2) + rows[:, None]) % 15 + 1
    weight = planned("a.0.weight", (32, 64), "w4a16_g32_asym")
    tensor = integers("w4a16_g32_asym", torch.zeros(32, 64), zero)
    first, second = (make_format(name).pack(weight, tensor) for name in ("gptq", "gptq_v2"))
    # Bytes hold two zeros each and never borrow from one another.
    lower = second["a.0.qzeros"].view(torch.uint8) - 0x11
    assert torch.equal(first["a.0.qzeros"].view(torch.uint8), lower)
    assert all(torch.equal(first[key], second[key]) for key in first if key != "a.0.qzeros")
    symmetric = make_format("gptq").pack(
        planned("a.0.weight", (32, 64), "w4a16_g32"), integers("w4a16_g32", torch.zeros(32, 64))
    )
    assert hexes(symmetric["a.0.qzeros"][0, :1]) == ["77777777"]


def test_version_1_cannot_hold_the_zero_0() -> None:
    weight = planned("a.0.weight", (32, 64), "w4a16_g32_asym")
    tensor = integers("w4a16_g32_asym", torch.zeros(32, 64), torch.zeros(32, 2))
    assert make_format("gptq_v2").pack(weight, tensor)
    with pytest.raises(NumericsError, match=r"a\.0\.weight: gptq stores zero - 1"):
        make_format("gptq").pack(weight, tensor)


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g32_asym", "w2a16_g32_asym"])
@pytest.mark.parametrize(("written", "labelled"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_zeros_of_the_other_version_are_refused(scheme: str, written: str, labelled: str) -> None:
    generator = torch.Generator().manual_seed(0)
    parsed = Scheme.parse(scheme)
    weight = torch.randn(2048, 64, generator=generator)
    found = Minmax()("a.0.weight", weight, parsed, None)
    zero = found.zero
    codes = grid_of(parsed).encode(
        weight.view(-1, 32),
        found.coding.view(-1, 1),
        None if zero is None else zero.view(-1, 1),
    )
    tensor = integers(scheme, codes.view(2048, 64), zero)
    planned_weight = planned("a.0.weight", (2048, 64), scheme)
    packed = make_format(written).pack(planned_weight, tensor)
    right, wrong = source_of(written, scheme, packed), source_of(labelled, scheme, packed)
    name = "a.0.weight"
    chosen = make_format(written)
    assert torch.equal(
        chosen.unpack(chosen.weights(right)[name], right).dequantize(), tensor.dequantize()
    )
    chosen = make_format(labelled)
    with pytest.raises(CheckpointError, match=r"a\.0\.qzeros.*other version"):
        chosen.unpack(chosen.weights(wrong)[name], wrong)


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w3a16_g32_asym"])
def test_activation_order_is_read_and_written_back(scheme: str) -> None:
    generator = torch.Generator().manual_seed(0)
    parsed = Scheme.parse(scheme)
    codes = torch.randint(0, 2**parsed.bits, (32, 64), generator=generator)
    zero = None if parsed.symmetric else torch.randint(1, 2**parsed.bits, (32, 2))
    weight = planned("a.0.weight", (32, 64), scheme)
    chosen = make_format("gptq")
    packed = chosen.pack(weight, integers(scheme, codes, zero))
    packed["a.0.g_idx"] = torch.randperm(64, generator=generator).to(torch.int32) // 32
    source = source_of("gptq", scheme, packed)
    stored = chosen.weights(source)["a.0.weight"]
    assert stored.permuted
    tensor = chosen.unpack(stored, source)
    shifted = {f"a{key.removeprefix('a.0')}": value for key, value in packed.items()}
    expected = slow_gptq(make_v2(shifted, parsed.bits), parsed.bits, (32, 64))
    assert torch.equal(tensor.dequantize(), expected)
    again = chosen.pack(weight, tensor)
    assert all(torch.equal(again[key], packed[key]) for key in packed)
    x = torch.randn(3, 64, generator=generator)
    layer = QuantLinear(tensor)
    assert torch.allclose(layer(x), x @ expected.T, atol=1e-4)  # sums in another order
    assert torch.equal(layer.quantized_tensor.dequantize(), expected)


def make_v2(packed: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Version 1 tensors with their zeros as version 2 stores them."""
    zero = unpack_rows(packed["a.qzeros"], bits, 32) + 1
    return {**packed, "a.qzeros": pack_rows(zero, bits)}


def test_groups_of_unequal_size_are_refused() -> None:
    packed = make_format("gptq").pack(
        planned("a.0.weight", (32, 64), "w4a16_g32"), integers("w4a16_g32", torch.zeros(32, 64))
    )
    packed["a.0.g_idx"] = torch.zeros(64, dtype=torch.int32)
    source = source_of("gptq", "w4a16_g32", packed)
    with pytest.raises(CheckpointError, match=r"a\.0\.g_idx: its groups do not have 32 columns"):
        make_format("gptq").weights(source)


def test_gptq_config_names_what_is_kept_and_what_differs() -> None:
    weights = [
        planned("model.layers.0.up.weight", (32, 64), "w3a16_g32"),
        planned("model.layers.1.up.weight", (32, 64), "w3a16_g32"),
        planned("model.layers.1.down.weight", (32, 64), "w2a16_row_asym"),
        planned("model.layers.0.down.weight", (32, 64), None),
        planned("lm_head.weight", (99, 64), None),
    ]
    config = make_format("gptq_v2").config(weights, model_type="llama", dtype=torch.float16)
    assert config["checkpoint_format"] == "gptq_v2"
    assert (config["bits"], config["group_size"], config["sym"]) == (3, 32, True)
    assert config["desc_act"] is False and config["lm_head"] is False
    assert config["dynamic"] == {
        r"-:^model\.layers\.0\.down$": {},
        r"+:^model\.layers\.1\.down$": {"bits": 2, "group_size": -1, "sym": False},
    }
    assert config["modules_in_block_to_quantize"] == [
        ["model.layers.0.up", "model.layers.1.up", "model.layers.1.down"]
    ]


def test_gptq_needs_whole_words() -> None:
    reason = make_format("gptq_v2").supports_shape(planned("a.weight", (40, 64), "w3a16_g32"))
    assert reason is not None and "divisible by 32" in reason


def test_stored_weights_say_which_tensors_are_theirs() -> None:
    chosen = make_format("gptq_v2")
    weight = planned("m.0.a.weight", (32, 64), "w3a16_g32")
    source = MemorySource(
        config={
            "dtype": "bfloat16",
            "quantization_config": chosen.config(
                [weight], model_type="llama", dtype=torch.bfloat16
            ),
        },
        tensors=chosen.pack(weight, integers("w3a16_g32", torch.zeros(32, 64))),
    )
    assert chosen.weights(source)["m.0.a.weight"] == StoredWeight(
        name="m.0.a.weight",
        scheme=Scheme.parse("w3a16_g32"),
        shape=(32, 64),
        label="BF16",
        tensors=("m.0.a.qweight", "m.0.a.qzeros", "m.0.a.scales", "m.0.a.g_idx"),
    )


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5},
        {"bits": True},
        {"group_size": None},
        {"group_size": 48},
        {"sym": 1},
        {"checkpoint_format": "gptq"},
        {"dynamic": ["a"]},
        {"dynamic": {"-:.*": {}}},
        {"dynamic": {"+:(": {}}},
        {"dynamic": {".*": 3}},
    ],
    ids=str,
)
def test_damaged_settings_are_refused(change: dict[str, Any]) -> None:
    chosen = make_format("gptq_v2")
    weight = planned("m.0.a.weight", (32, 64), "w3a16_g32")
    config = chosen.config([weight], model_type="llama", dtype=torch.float16)
    source = MemorySource(
        config={"dtype": "float16", "quantization_config": {**config, **change}},
        tensors=chosen.pack(weight, integers("w3a16_g32", torch.zeros(32, 64))),
    )
    with pytest.raises(CheckpointError):
        chosen.weights(source)
