"""AWQ: words as AutoAWQ describes its gemm layout, and what a file cannot hold."""

from __future__ import annotations

import pytest
import torch
from format_samples import hexes, integers, planned, quantized, same, stored

from quantkit.errors import CheckpointError, FormatError
from quantkit.formats.registry import check_supported, format_of, make_format
from quantkit.numbers.scheme import Scheme


def slow_awq(packed: dict[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """The weight from the words, one nibble at a time.

    AutoAWQ reads code j of a word's eight from bits 4 * [0, 4, 1, 5, 2, 6, 3, 7][j].
    """
    places = [0, 4, 1, 5, 2, 6, 3, 7]

    def code(word: int, j: int) -> int:
        return word >> (4 * places[j]) & 15

    weight = torch.empty(shape)
    groups = packed["a.scales"].shape[0]
    for o in range(shape[0]):
        for i in range(shape[1]):
            g = i * groups // shape[1]
            value = code(int(packed["a.qweight"][i, o // 8]), o % 8)
            zero = code(int(packed["a.qzeros"][g, o // 8]), o % 8)
            weight[o, i] = (value - zero) * float(packed["a.scales"][g, o])
    return weight


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g32_asym", "w4a16_row_asym"])
def test_words_decode_to_the_weight(scheme: str) -> None:
    shape = (16, 64)
    tensor = quantized(Scheme.parse(scheme), shape, torch.float32)
    packed = make_format("awq").pack(planned("a.weight", shape, scheme), tensor)
    assert torch.equal(slow_awq(packed, shape), tensor.dequantize())


def test_codes_one_to_eight_make_the_known_word() -> None:
    codes = torch.arange(1, 9)[:, None].expand(8, 32)
    packed = make_format("awq").pack(
        planned("a.weight", (8, 32), "w4a16_g32"), integers("w4a16_g32", codes)
    )
    # Nibbles from the lowest: codes 0, 2, 4, 6, 1, 3, 5, 7 of the eight.
    assert hexes(packed["a.qweight"][:1]) == [["86427531"]]
    assert hexes(packed["a.qzeros"]) == [["88888888"]]


def test_all_zeros_eight_is_read_as_symmetric() -> None:
    chosen = make_format("awq")
    for scheme in ("w4a16_g32", "w4a16_g32_asym"):
        weight = planned("model.layers.0.a.weight", (16, 64), scheme)
        tensor = quantized(Scheme.parse(scheme), (16, 64), torch.float16)
        source = stored(chosen, [weight], chosen.pack(weight, tensor), torch.float16)
        found = chosen.weights(source)[weight.name]
        assert found.scheme.name == scheme
        assert same(chosen.unpack(found, source), tensor)


def test_two_group_sizes_are_refused_by_name() -> None:
    weights = [
        planned("model.layers.0.a.weight", (64, 128), "w4a16_g32"),
        planned("model.layers.0.b.weight", (64, 128), "w4a16_g64_asym"),
    ]
    with pytest.raises(FormatError, match=r"layers\.0\.b\.weight \(w4a16_g64_asym\).*one group"):
        check_supported(make_format("awq"), weights)


def test_a_kept_module_whose_name_is_part_of_another_is_refused() -> None:
    weights = [
        planned("model.layers.0.mlp.up.weight", (64, 128), None),
        planned("model.layers.0.mlp.up_proj.weight", (64, 128), "w4a16_g32"),
    ]
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.up_proj"):
        check_supported(make_format("awq"), weights)


def test_rows_must_fill_words() -> None:
    reason = make_format("awq").supports_shape(planned("a.weight", (12, 64), "w4a16_g32"))
    assert reason is not None and "divisible by 8" in reason


@pytest.mark.parametrize(
    "change", [{"bits": 3}, {"version": "gemv"}, {"group_size": 0}, {"group_size": None}]
)
def test_other_layouts_are_refused(change: dict[str, object]) -> None:
    chosen = make_format("awq")
    weight = planned("model.layers.0.a.weight", (16, 64), "w4a16_g32")
    tensor = quantized(Scheme.parse("w4a16_g32"), (16, 64), torch.float16)
    source = stored(chosen, [weight], chosen.pack(weight, tensor), torch.float16)
    source.config["quantization_config"].update(change)
    with pytest.raises(CheckpointError, match="is not read"):
        format_of(source).weights(source)


def test_readers_know_what_vllm_and_transformers_take() -> None:
    chosen = make_format("awq")

    def reads(scheme: str, **options: bool) -> dict[str, bool]:
        weight = planned("model.layers.0.mlp.up.weight", (384, 384), scheme, **options)
        return {name: r is None for name, r in chosen.readers([weight], "llama").items()}

    assert reads("w4a16_g128_asym") == {"transformers": True, "vllm": True}
    assert reads("w4a16_g48") == {"transformers": False, "vllm": False}
    assert reads("w4a16_g64", transposed=True)["transformers"] is False
    assert reads("w4a16_g64", expert=True)["transformers"] is False
