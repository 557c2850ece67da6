"""compressed-tensors' layouts of floats: bytes, words of the config, and damaged checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from format_samples import MemorySource, planned, quantized, stored
from torch import Tensor

from quantkit.errors import CheckpointError, NumericsError
from quantkit.formats._compressed_groups import FLOATS
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import DividedScale, PlainScale, QuantizedTensor

NAME = "model.layers.0.mlp.up_proj.weight"


def make(scheme: str, codes: Tensor, scale: PlainScale | DividedScale) -> dict[str, Tensor]:
    """What a bfloat16 weight of these codes is packed to, names less its own."""
    parsed = Scheme.parse(scheme)
    tensor = QuantizedTensor(
        codes=codes.to(torch.uint8),
        scale=scale,
        zero=None,
        scheme=parsed,
        dtype=torch.bfloat16,
        input_scale=torch.tensor(96.0) if parsed.static_input else None,
    )
    shape = (codes.shape[0], codes.shape[1])
    packed = CompressedTensors().pack(planned("m.weight", shape, parsed), tensor)
    return {name.removeprefix("m."): tensor for name, tensor in packed.items()}


def test_bytes_of_mxfp4() -> None:
    codes = torch.arange(32)[None] % 16
    found = make("mxfp4a16", codes, PlainScale(tensor=torch.tensor([[2.0**-3]])))
    assert found["weight_packed"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]
    assert found["weight_scale"].tolist() == [[124]]
    assert set(found) == {"weight_packed", "weight_scale"}


def test_bytes_of_mxfp8() -> None:
    codes = torch.tensor([[0x38, 0xB8, 0x7E, 0x01] * 8])
    found = make("mxfp8a8", codes, PlainScale(tensor=torch.tensor([[2.0**-127]])))
    assert found["weight"].dtype == torch.float8_e4m3fn
    assert found["weight"].float()[0, :4].tolist() == [1.0, -1.0, 448.0, 2.0**-9]
    assert found["weight_scale"].tolist() == [[0]]


def test_bytes_of_nvfp4() -> None:
    numbers = torch.tensor([[1.0, 448.0]]).to(torch.float8_e4m3fn)
    scale = DividedScale(tensor=numbers, divisor=torch.tensor(1024.0))
    found = make("nvfp4a4", torch.full((1, 32), 7), scale)
    assert found["weight_packed"].tolist() == [[0x77] * 16]
    assert found["weight_scale"].view(torch.uint8).tolist() == [[0x38, 0x7E]]
    assert found["weight_global_scale"].tolist() == [1024.0]
    assert found["input_global_scale"].tolist() == [96.0]
    assert found["input_global_scale"].dtype == torch.float32


def test_blocks_keep_one_scale_each() -> None:
    scale = torch.ones(200, 2)
    scale[:128, 1], scale[128:, 0] = 2.0, 0.5
    found = make("fp8a8_b128", torch.zeros(200, 256), PlainScale(tensor=scale))
    assert found["weight_scale"].tolist() == [[1.0, 2.0], [0.5, 1.0]]
    scale[7, 1] = 4.0
    with pytest.raises(NumericsError, match=r"m\.weight: rows that share a scale"):
        make("fp8a8_b128", torch.zeros(200, 256), PlainScale(tensor=scale))


def test_scales_that_are_no_powers_of_two_are_refused() -> None:
    with pytest.raises(NumericsError, match=r"m\.weight: a scale is no power of two"):
        make("mxfp4a16", torch.zeros(1, 32), PlainScale(tensor=torch.tensor([[3.0]])))


@pytest.mark.parametrize(
    ("scheme", "layout", "weights", "activations"),
    [
        ("fp8a8_b128", "float-quantized", ("block", None, [128, 128]), ("group", 128, True)),
        ("fp8a8_tensor", "float-quantized", ("tensor", None, None), ("tensor", None, False)),
        ("mxfp8a8", "mxfp8-quantized", ("group", 32, None), ("group", 32, True)),
        ("mxfp4a4", "mxfp4-pack-quantized", ("group", 32, None), ("group", 32, True)),
        (
            "nvfp4a4",
            "nvfp4-pack-quantized",
            ("tensor_group", 16, None),
            ("tensor_group", 16, "local"),
        ),
    ],
)
def test_words_of_the_config(
    scheme: str, layout: str, weights: tuple[Any, ...], activations: tuple[Any, ...]
) -> None:
    weight = planned(NAME, (32, 256), scheme)
    config = CompressedTensors().config([weight], model_type="llama", dtype=torch.bfloat16)
    group = config["config_groups"]["group_0"]
    told = group["weights"]
    assert (told["strategy"], told["group_size"], told.get("block_structure")) == weights
    told = group["input_activations"]
    assert (told["strategy"], told["group_size"], told["dynamic"]) == activations
    assert config["format"] == group["format"] == layout
    assert "dequantize" not in config


def damaged(scheme: str, ending: str, value: Tensor | None) -> MemorySource:
    """A checkpoint one of whose tensors is replaced, or taken away."""
    chosen, weight = CompressedTensors(), planned(NAME, (64, 256), scheme)
    packed = chosen.pack(weight, quantized(Scheme.parse(scheme), (64, 256), torch.bfloat16))
    del packed[NAME.removesuffix("weight") + ending]
    if value is not None:
        packed[NAME.removesuffix("weight") + ending] = value
    return stored(chosen, [weight], packed, torch.bfloat16)


@pytest.mark.parametrize(
    ("scheme", "ending", "value", "message"),
    [
        ("mxfp8a8", "weight_scale", torch.full((64, 8), 255, dtype=torch.uint8), "NaN"),
        ("mxfp4a16", "weight_scale", torch.full((64, 8), 255, dtype=torch.uint8), "NaN"),
        ("mxfp4a16", "weight_scale", torch.zeros(64, 4, dtype=torch.uint8), "weight_scale"),
        ("mxfp8a8", "weight_scale", torch.zeros(64, 8), "weight_scale"),
        (
            "nvfp4a16",
            "weight_scale",
            torch.full((64, 16), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn),
            "NaN",
        ),
        (
            "nvfp4a16",
            "weight_scale",
            torch.zeros(64, 16, dtype=torch.float8_e4m3fn),
            "zero or negative",
        ),
        ("nvfp4a16", "weight_global_scale", torch.zeros(1), "positive"),
        ("nvfp4a16", "weight_global_scale", torch.tensor([float("nan")]), "positive"),
        ("nvfp4a16", "weight_global_scale", None, "weight_global_scale"),
        ("nvfp4a4", "input_global_scale", None, "input_global_scale"),
        ("nvfp4a4", "input_global_scale", torch.tensor([-1.0]), "not positive"),
        ("nvfp4a16", "weight_packed", torch.zeros(64, dtype=torch.uint8), "matrix"),
        ("nvfp4a16", "weight_packed", torch.zeros(64, 8, dtype=torch.int32), "no config group"),
        ("fp8a8_b128", "weight_scale", torch.ones(1, 3, dtype=torch.bfloat16), "weight_scale"),
        ("fp8a8_tensor", "input_scale", None, "input_scale"),
        ("fp8a8_tensor", "input_scale", torch.zeros(1, dtype=torch.bfloat16), "not positive"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    scheme: str, ending: str, value: Tensor | None, message: str
) -> None:
    source, chosen = damaged(scheme, ending, value), CompressedTensors()
    with pytest.raises((CheckpointError, NumericsError), match=message) as raised:
        chosen.unpack(chosen.weights(source)[NAME], source)
    assert "layers.0.mlp.up_proj" in str(raised.value)


@pytest.mark.parametrize("change", [{"strategy": "channel"}, {"num_bits": 6}, {"group_size": 64}])
def test_forms_that_are_not_read_are_refused(change: dict[str, object]) -> None:
    source = damaged("mxfp4a16", "weight_scale", torch.zeros(64, 8, dtype=torch.uint8))
    config = source.config["quantization_config"]["config_groups"]["group_0"]
    config["weights"].update(change)
    with pytest.raises(CheckpointError, match=r"group_0: mxfp4-pack-quantized .*mxfp4a16"):
        CompressedTensors().weights(source)


def test_conv1d_weights_have_a_scale_per_row_or_are_packed() -> None:
    chosen = CompressedTensors()
    for name in FLOATS:
        weight = planned(NAME, (128, 256), name, transposed=True)
        refused = chosen.supports_shape(weight) is not None
        assert refused == (name in ("fp8a8_b128", "fp8a8_tensor", "mxfp8a8", "mxfp8a16"))
