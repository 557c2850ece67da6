"""What every on-disk format must keep to; formats are found by their files."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from format_samples import planned, quantized, same, sample_scale, stored
from torch import Tensor

from quantkit.errors import CheckpointError, FormatError
from quantkit.formats.format import BuiltFormat, Format, PartFormat, PlannedWeight, WholeFormat
from quantkit.formats.registry import (
    available_formats,
    check_supported,
    default_format,
    format_of,
    make_format,
)
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import QuantizedTensor

SCHEMES = [
    "w2a16_g32",
    "w2a16_row_asym",
    "w3a16_g32",
    "w3a16_g32_asym",
    "w3a16_row",
    "w4a16_g32",
    "w4a16_g32_asym",
    "w4a16_g48_asym",
    "w4a16_g64_asym",
    "w4a16_row",
    "w4a16_row_asym",
    "w5a16_g32",
    "w6a16_row",
    "w7a16_g64_asym",
    "w8a16_g32",
    "w8a16_row",
    "w8a16_row_asym",
    "w8a8_row",
    "w4a8_g32",
    "w4afp8_g32",
    "fp8a8_row",
    "fp8a16_row",
    "fp8a8_b128",
    "fp8a8_tensor",
    "mxfp8a16",
    "mxfp8a8",
    "mxfp4a16",
    "mxfp4a4",
    "nvfp4a16",
    "nvfp4a4",
    "nf4_b64",
    "nf4_b64_dq",
    "nf4_b96",
    "nf4_b128_dq",
    "nf4_b4096",
    "fp4_b32",
    "fp4_b64_dq",
]
SHAPES = [(32, 64), (64, 96), (96, 128), (5, 64), (7, 33), (1, 96), (200, 256)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def holdable(*names: str) -> list[Any]:
    """(format, scheme, shape) of everything that the formats say they hold."""
    found = []
    for format_name in names:
        chosen = make_format(format_name)
        # What is built of a checkpoint is packed as that: its own numbers are read from a graph.
        if isinstance(chosen, (BuiltFormat, WholeFormat)):
            continue
        for scheme_name in SCHEMES:
            scheme = Scheme.parse(scheme_name)
            if chosen.supports(scheme) is not None:
                continue
            for shape in SHAPES:
                if not scheme.flat and shape[1] % (scheme.group_size or 1):
                    continue
                if chosen.supports_shape(planned("a.0.weight", shape, scheme)) is None:
                    label = f"{format_name}-{scheme_name}-{shape[0]}x{shape[1]}"
                    found.append(pytest.param(chosen, scheme, shape, id=label))
    return found


def together(chosen: Format) -> list[Scheme]:
    """The most schemes that one checkpoint of the format can hold side by side."""
    able = [s for s in map(Scheme.parse, SCHEMES) if chosen.supports(s) is None]
    best: list[Scheme] = []
    for first in able:
        found = [first]
        for scheme in able:
            mixed = [planned(f"a.{k}.weight", (64, 768), s) for k, s in enumerate([*found, scheme])]
            if scheme != first and chosen.supports_together(mixed) is None:
                found.append(scheme)
        best = max(best, found, key=len)
    return best


def of_these_schemes() -> list[str]:
    """Names of the formats that hold any of `SCHEMES` by any name: files of whole models and
    slices of tensors for all experts have tests of their own."""
    schemes = [Scheme.parse(name) for name in SCHEMES]
    return [
        name
        for name in available_formats()
        if not isinstance(chosen := make_format(name), (BuiltFormat, PartFormat, WholeFormat))
        and any(chosen.supports(scheme) is None for scheme in schemes)
    ]


def of_several_schemes() -> list[str]:
    """Names of the formats that hold more than one scheme in a checkpoint."""
    return [name for name in of_these_schemes() if len(together(make_format(name))) > 1]


def test_the_formats_are_found() -> None:
    wanted = {"awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "gptq_v2", "mxfp4"}
    assert wanted <= set(available_formats())
    for name in available_formats():
        chosen = make_format(name)
        assert isinstance(chosen, Format)
        assert chosen.name == name


@pytest.mark.parametrize(("chosen", "scheme", "shape"), holdable(*available_formats()))
def test_every_scale_that_the_format_says_it_holds_comes_back(
    chosen: Format, scheme: Scheme, shape: tuple[int, int]
) -> None:
    if scheme.double_quant:
        assert chosen.scale_dtype(torch.float16) == torch.float32
        return
    weight = planned("model.layers.0.mlp.up_proj.weight", shape, scheme)
    for dtype in DTYPES:
        tensor = quantized(scheme, shape, dtype)
        half = chosen.scale_dtype(dtype) == torch.float16
        size = tensor.scale.values().shape
        wild = torch.logspace(-38, 38, size.numel()).view(size)
        scale = sample_scale(wild, scheme, half=half)
        tensor = dataclasses.replace(tensor, scale=scale)
        assert chosen.represent(tensor) == (tensor, None)
        source = stored(chosen, [weight], chosen.pack(weight, tensor), dtype)
        found = chosen.weights(source)[weight.name]
        assert torch.equal(chosen.unpack(found, source).scale.values(), scale.values())


@pytest.mark.parametrize(("chosen", "scheme", "shape"), holdable(*available_formats()))
def test_pack_returns_the_layout_and_unpack_its_input(
    chosen: Format, scheme: Scheme, shape: tuple[int, int]
) -> None:
    weight = planned("model.layers.0.mlp.up_proj.weight", shape, scheme)
    for dtype in DTYPES:
        tensor = quantized(scheme, shape, dtype)
        packed = chosen.pack(weight, tensor)
        layout = chosen.layout(weight, dtype)
        assert [(i.name, i.dtype, i.shape) for i in layout] == [
            (name, t.dtype, tuple(t.shape)) for name, t in packed.items()
        ]
        assert all(t.is_contiguous() and t.device.type == "cpu" for t in packed.values())
        source = stored(chosen, [weight], packed, dtype)
        assert format_of(source).name == chosen.name
        found = chosen.weights(source)
        assert list(found) == [weight.name]
        assert found[weight.name].shape == shape
        assert found[weight.name].scheme == scheme
        assert set(found[weight.name].tensors) == set(packed)
        assert same(chosen.unpack(found[weight.name], source), tensor)


@pytest.mark.parametrize(("chosen", "scheme", "shape"), holdable(*available_formats()))
def test_a_missing_tensor_is_named(chosen: Format, scheme: Scheme, shape: tuple[int, int]) -> None:
    weight = planned("model.layers.0.mlp.up_proj.weight", shape, scheme)
    tensor = quantized(scheme, shape, torch.bfloat16)
    packed = chosen.pack(weight, tensor)
    for name in packed:
        rest = {other: tensor for other, tensor in packed.items() if other != name}
        source = stored(chosen, [weight], rest, torch.bfloat16)
        try:
            found = chosen.weights(source)
        except CheckpointError as error:
            assert name in str(error)
        else:
            # Without the tensor that marks a weight as quantized there is nothing to be found; a
            # tensor that older files lack tells nothing.
            for entry in found.values():
                assert name not in entry.tensors
                assert same(chosen.unpack(entry, source), tensor)


@pytest.mark.parametrize("format_name", of_these_schemes())
def test_a_tensor_of_another_shape_is_refused(format_name: str) -> None:
    chosen = make_format(format_name)
    scheme = next(s for s in map(Scheme.parse, SCHEMES) if chosen.supports(s) is None)
    weight = planned("model.layers.0.mlp.up_proj.weight", (32, 64), scheme)
    packed = chosen.pack(weight, quantized(scheme, (32, 64), torch.bfloat16))
    larger = max(packed, key=lambda name: packed[name].numel())
    packed[larger] = packed[larger][:-1].contiguous()
    with pytest.raises(CheckpointError):
        chosen.weights(stored(chosen, [weight], packed, torch.bfloat16))


@pytest.mark.parametrize("format_name", available_formats())
def test_what_a_format_cannot_hold_names_formats_that_can(format_name: str) -> None:
    chosen = make_format(format_name)
    refused = 0
    for scheme in map(Scheme.parse, SCHEMES):
        weight = planned("model.layers.0.mlp.up_proj.weight", (32, 64), scheme)
        reason = chosen.supports(scheme)
        if reason is None:
            continue
        refused += 1
        able = [n for n in available_formats() if make_format(n).supports(scheme) is None]
        with pytest.raises(FormatError) as caught:
            check_supported(chosen, [weight])
        message = str(caught.value)
        assert reason in message and weight.name in message and scheme.name in message
        assert all(name in message for name in able)
        assert able or "no built-in format can" in message
    assert refused > 0


@pytest.mark.parametrize("format_name", of_several_schemes())
def test_mixed_schemes_and_kept_weights_come_back(format_name: str) -> None:
    chosen = make_format(format_name)
    schemes = together(chosen)
    assert len(schemes) > 1
    weights: list[PlannedWeight] = []
    tensors: dict[str, Tensor] = {}
    originals: dict[str, QuantizedTensor] = {}
    for number in range(2 * len(schemes)):
        scheme = schemes[number % len(schemes)] if number % 3 else schemes[0]
        shape = (64, 768)
        weight = planned(f"model.layers.{number}.mlp.up_proj.weight", shape, scheme)
        kept = planned(f"model.layers.{number}.mlp.down_proj.weight", shape, None)
        weights += [weight, kept]
        originals[weight.name] = quantized(scheme, shape, torch.float16, seed=number)
        tensors.update(chosen.pack(weight, originals[weight.name]))
        tensors[kept.name] = torch.zeros(64, 768, dtype=torch.float16)
    weights.append(planned("lm_head.weight", (64, 64), None))
    source = stored(chosen, weights, tensors, torch.float16)
    found = chosen.weights(source)
    assert set(found) == set(originals)
    for name, original in originals.items():
        assert same(chosen.unpack(found[name], source), original), name


@pytest.mark.parametrize("format_name", of_several_schemes())
def test_experts_of_another_scheme_and_a_quantized_head_come_back(format_name: str) -> None:
    chosen = make_format(format_name)
    common, other, *_ = together(chosen)
    weights = [
        planned(f"model.layers.{block}.self_attn.{name}.weight", (64, 768), common)
        for block in range(3)
        for name in ("q_proj", "o_proj")
    ]
    weights += [
        PlannedWeight(
            name=f"model.layers.0.block_sparse_moe.experts.{number}.w1.weight",
            module="model.layers.0.mlp.experts.gate_up_proj",
            shape=(64, 768),
            scheme=other,
            expert=True,
        )
        for number in range(4)
    ]
    weights.append(planned("lm_head.weight", (64, 768), common))
    tensors: dict[str, Tensor] = {}
    for weight in weights:
        assert weight.scheme is not None
        tensors.update(chosen.pack(weight, quantized(weight.scheme, (64, 768), torch.float16)))
    source = stored(chosen, weights, tensors, torch.float16)
    found = chosen.weights(source)
    assert {name: entry.scheme for name, entry in found.items()} == {
        weight.name: weight.scheme for weight in weights
    }


@pytest.mark.parametrize("format_name", of_these_schemes())
def test_readers_give_none_or_a_reason(format_name: str) -> None:
    chosen = make_format(format_name)
    for scheme in map(Scheme.parse, SCHEMES):
        if chosen.supports(scheme) is None:
            weight = planned("model.layers.0.mlp.up_proj.weight", (64, 768), scheme)
            readers = chosen.readers([weight], "llama")
            assert {"transformers", "vllm"} <= set(readers)
            assert all(reason is None or len(reason) > 10 for reason in readers.values())


@pytest.mark.parametrize("scheme_name", SCHEMES)
def test_the_default_format_holds_its_scheme(scheme_name: str) -> None:
    scheme = Scheme.parse(scheme_name)
    able = [n for n in available_formats() if make_format(n).supports(scheme) is None]
    if able:
        assert make_format(default_format(scheme)).supports(scheme) is None
    else:
        with pytest.raises(FormatError):
            default_format(scheme)
