"""ModelOpt's layout: its bytes, what is read as others write it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch
from format_samples import MemorySource, planned, quantized, same, stored
from safetensors.torch import load_file
from torch import Tensor

import quantkit
from quantkit.checks.verify import verify
from quantkit.errors import CheckpointError, FormatError, NumericsError
from quantkit.formats.modelopt import Modelopt
from quantkit.formats.open import open_source
from quantkit.formats.registry import format_of, make_format
from quantkit.model.decoded import Unpacked
from quantkit.numbers.cache import CacheScheme
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import DividedScale, PlainScale, QuantizedTensor
from quantkit.pipeline.export import export

NAME = "model.layers.0.mlp.up_proj.weight"


def packed(scheme: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    return Modelopt().pack(planned(NAME, tensor.shape, scheme), tensor)


def test_int4_codes_of_two_rows_share_a_byte() -> None:
    codes = torch.tensor([[0, 8, 15, 9], [1, 7, 8, 0]]).repeat(1, 4).to(torch.uint8)
    scale = torch.tensor([[0.5], [-0.25]])
    tensor = QuantizedTensor(
        codes=codes,
        scale=PlainScale(tensor=scale),
        zero=None,
        scheme=Scheme.parse("w4a16_g16"),
        dtype=torch.bfloat16,
    )
    found = packed("w4a16_g16", tensor)
    # Two's complement: -8 | -7 << 4, 0 | -1 << 4, 7 | 0 << 4, 1 | -8 << 4.
    assert found[NAME][0, :4].tolist() == [0x98, 0xF0, 0x07, 0x81]
    assert torch.equal(found[f"{NAME}_scale"], scale)
    smoothed = found[NAME.replace("weight", "pre_quant_scale")]
    assert smoothed.dtype == torch.bfloat16 and smoothed.tolist() == [1.0] * 16


def test_nvfp4s_divisors_are_stored_as_reciprocals() -> None:
    scheme = Scheme.parse("nvfp4a4")
    tensor = dataclasses.replace(
        quantized(scheme, (2, 32), torch.bfloat16), input_scale=torch.tensor(2.0**-5)
    )
    assert isinstance(tensor.scale, DividedScale)
    found = packed("nvfp4a4", tensor)
    assert float(found[f"{NAME}_scale_2"]) == 1 / float(tensor.scale.divisor)
    assert float(found[NAME.replace("weight", "input_scale")]) == 32
    assert torch.equal(found[NAME], tensor.codes[:, ::2] | tensor.codes[:, 1::2] << 4)


@pytest.mark.parametrize("name", ["modelopt", "compressed-tensors"])
def test_reciprocals_that_are_not_exact_are_said_to_be_rounded(name: str) -> None:
    chosen = make_format(name)
    scheme = Scheme.parse("nvfp4a16")
    scale = DividedScale(
        tensor=torch.linspace(1, 400, 8).to(torch.float8_e4m3fn).view(4, 2),
        divisor=torch.tensor(0.0123),
        inverted=name != "modelopt",
    )
    tensor = dataclasses.replace(quantized(scheme, (4, 32), torch.bfloat16), scale=scale)
    with pytest.raises(NumericsError, match="reciprocal"):
        chosen.pack(planned(NAME, (4, 32), scheme), tensor)
    rounded, told = chosen.represent(tensor)
    assert told is not None and "reciprocal" in told
    error = (rounded.scale.values() / scale.values() - 1).abs().max()
    assert 0 < float(error) < 2**-22
    weight = planned(NAME, (4, 32), scheme)
    source = stored(chosen, [weight], chosen.pack(weight, rounded), torch.bfloat16)
    assert same(chosen.unpack(chosen.weights(source)[NAME], source), rounded)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_algo": "NVFP4"}, "nvfp4a4"),
        ({"quantization": {"quant_algo": "NVFP4", "exclude_modules": []}}, "nvfp4a4"),
        ({"quant_method": "modelopt_fp4", "quant_algo": "nvfp4"}, "nvfp4a4"),
        (
            {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {NAME.removesuffix(".weight"): {"quant_algo": "NVFP4"}},
            },
            "nvfp4a4",
        ),
    ],
)
def test_all_forms_of_the_configuration_are_read(config: dict[str, Any], expected: str) -> None:
    tensor = quantized(Scheme.parse("nvfp4a4"), (4, 32), torch.bfloat16)
    tensors = packed("nvfp4a4", tensor)
    # Numbers alone in vectors of one, as older ModelOpt wrote them.
    tensors = {name: t.reshape(1) if t.ndim == 0 else t for name, t in tensors.items()}
    told = {"quant_method": "modelopt", **config}
    source = MemorySource(
        config={"dtype": "bfloat16", "quantization_config": told}, tensors=tensors
    )
    reader = format_of(source)
    found = reader.weights(source)
    assert found[NAME].scheme.name == expected
    assert same(reader.unpack(found[NAME], source), tensor)


def test_nvfp4_of_weights_alone_is_told_by_the_groups() -> None:
    tensor = quantized(Scheme.parse("nvfp4a16"), (4, 32), torch.bfloat16)
    told = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    groups = {"config_groups": {"group_0": {"input_activations": None}}}
    config = {"dtype": "bfloat16", "quantization_config": told | groups}
    source = MemorySource(config=config, tensors=packed("nvfp4a16", tensor))
    assert Modelopt().weights(source)[NAME].scheme.name == "nvfp4a16"
    config = {"dtype": "bfloat16", "quantization_config": told}
    source = MemorySource(config=config, tensors=packed("nvfp4a16", tensor))
    with pytest.raises(CheckpointError, match="input_scale"):
        Modelopt().weights(source)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no quantization_config"),
        ({}, "no quant_algo"),
        ({"quant_algo": "W4A8_AWQ"}, "gives it W4A8_AWQ; read are FP8"),
        ({"quant_algo": "MIXED_PRECISION"}, "gives it none"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": [1]}, "quantized_layers must"),
        ({"quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4"}, "NVFP4 is unknown; FP8"),
        ({"quant_algo": "W4A16_AWQ"}, "its stored shape|divide|demands"),
    ],
)
def test_what_is_unknown_is_named(config: dict[str, Any] | None, message: str) -> None:
    tensors = packed("nvfp4a16", quantized(Scheme.parse("nvfp4a16"), (4, 32), torch.bfloat16))
    whole = {"dtype": "bfloat16", "quantization_config": config}
    with pytest.raises(CheckpointError, match=message):
        Modelopt().weights(MemorySource(config=whole, tensors=tensors))


def test_inputs_scaled_by_their_own_numbers_are_refused() -> None:
    scheme = Scheme.parse("w4a16_g32")
    weight = planned(NAME, (4, 64), scheme)
    tensors = packed("w4a16_g32", quantized(scheme, (4, 64), torch.bfloat16))
    smoothed = NAME.replace("weight", "pre_quant_scale")
    tensors[smoothed] = tensors[smoothed] * 2
    source = stored(Modelopt(), [weight], tensors, torch.bfloat16)
    found = Modelopt().weights(source)
    with pytest.raises(CheckpointError, match=r"up_proj\.pre_quant_scale: inputs are multiplied"):
        Modelopt().unpack(found[NAME], source)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_damaged_outer_scales_are_named(value: float) -> None:
    scheme = Scheme.parse("nvfp4a16")
    tensors = packed("nvfp4a16", quantized(scheme, (4, 32), torch.bfloat16))
    tensors[f"{NAME}_scale_2"] = torch.tensor(value)
    source = stored(Modelopt(), [planned(NAME, (4, 32), scheme)], tensors, torch.bfloat16)
    with pytest.raises(NumericsError, match="weight_scale_2: it is"):
        Modelopt().unpack(Modelopt().weights(source)[NAME], source)


def test_what_it_cannot_hold_is_said() -> None:
    chosen = Modelopt()
    for name in ("w4a16_row", "w4a16_g32_asym", "w8a16_g32", "mxfp4a16", "fp8a16_row", "w4a8_g32"):
        assert "it holds w4a16_g<size>" in str(chosen.supports(Scheme.parse(name)))
    assert "odd" in str(chosen.supports_shape(planned(NAME, (7, 64), "w4a16_g32")))
    turned = planned(NAME, (8, 64), "mxfp8a8", transposed=True)
    assert "Conv1D" in str(chosen.supports_shape(turned))
    with pytest.raises(FormatError, match="--kv fp8, or --format compressed-tensors"):
        chosen.cache_layout("model.layers.0.self_attn", CacheScheme(name="fp8_head"), 2)
    # Readers look for what they skip anywhere in a name.
    kept = planned("model.layers.0.mlp.gate.weight", (8, 64), None)
    taken = planned("model.layers.0.mlp.gate_proj.weight", (8, 64), "mxfp8a8")
    assert "gate_proj" in str(chosen.supports_together([kept, taken]))


def test_readers_are_told_apart() -> None:
    def said(scheme: str, **options: Any) -> dict[str, bool]:
        weights = [planned(f"model.layers.0.self_attn.{leaf}.weight", (256, 256), scheme, **options)
                   for leaf in ("q_proj", "k_proj", "v_proj")]  # fmt: skip
        found = Modelopt().readers(weights, "llama")
        return {runtime: reason is None for runtime, reason in found.items()}

    neither = {"transformers": False, "vllm": False, "tensorrt-llm": False}
    both = {"transformers": False, "vllm": True, "tensorrt-llm": True}
    for name in ("fp8a8_tensor", "fp8a8_row", "fp8a8_b128", "nvfp4a4"):
        assert said(name) == both
    for name in ("mxfp8a8", "nvfp4a16"):
        assert said(name) == both | {"tensorrt-llm": False}
    assert said("w4a16_g128") == both | {"vllm": False}
    assert said("w4a16_g32") == neither
    mixed = [
        planned("model.layers.0.self_attn.q_proj.weight", (256, 256), "nvfp4a4"),
        planned("model.layers.0.self_attn.k_proj.weight", (256, 256), "fp8a8_tensor"),
    ]
    assert "fuses it with others" in str(Modelopt().readers(mixed, "llama")["vllm"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build("llama", tmp_path_factory.mktemp("modelopt") / "model")


@pytest.fixture(scope="module")
def made(model: Path) -> Path:
    """A checkpoint with calibrated inputs and a calibrated cache."""
    out: Path = quantkit.quantize(
        str(model), "fp8", scheme="nvfp4a4", format="modelopt", kv="fp8",
        out=model.parent / "out", calibration=str(model / "calibration.txt"),
        samples=jobs.SAMPLES, seq_len=jobs.SEQ_LEN, progress=False,
    )  # fmt: skip
    return out


def test_a_checkpoint_is_whole_and_says_itself_twice(made: Path, model: Path) -> None:
    assert verify(made, against=str(model)).ok
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "modelopt" and "lm_head" in config["ignore"]
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    beside = json.loads((made / "hf_quant_config.json").read_text())
    assert beside["quantization"] == {
        "quant_algo": "NVFP4",
        "group_size": 16,
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": config["ignore"],
    }
    tensors = load_file(made / "model.safetensors")
    assert tensors["model.layers.1.self_attn.k_proj.k_scale"].shape == (1,)
    view = Unpacked.open(open_source(made))
    assert view.cache_scheme() == CacheScheme(name="fp8")
    key, value = view.cache_scales("model.layers.1.self_attn", CacheScheme(name="fp8"), 2)
    assert torch.equal(value, tensors["model.layers.1.self_attn.v_proj.v_scale"])
    assert float(key) > 0 != float(value)


def test_the_file_beside_is_enough(made: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(made, older)
    config = json.loads((older / "config.json").read_text())
    del config["quantization_config"]
    (older / "config.json").write_text(json.dumps(config))
    first, second = Unpacked.open(open_source(made)), Unpacked.open(open_source(older))
    assert set(first.stored) == set(second.stored) and len(first.stored) == 14
    for name in first.stored:
        assert same(first.quantized(name), second.quantized(name))
    assert second.cache_scheme() == first.cache_scheme()


def test_it_goes_to_compressed_tensors_and_back(made: Path, tmp_path: Path) -> None:
    there = export(made, tmp_path / "there", format_name="compressed-tensors", progress=False)
    assert not there.rounded
    back = export(there.out, tmp_path / "back", format_name="modelopt", progress=False)
    assert not back.rounded
    first = load_file(made / "model.safetensors")
    found = load_file(back.out / "model.safetensors")
    left = set(first) - set(found)
    assert {name.rpartition(".")[2] for name in left} == {"k_scale", "v_scale"}
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), first[name].float()), name


def test_a_mix_by_role_says_each_layers_numbers(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "method: fp8\nscheme: mxfp8a8\nrange: minmax\nrounding: nearest\nrules:\n"
        "  - match: '*.self_attn.*'\n    scheme: fp8a8_row\n"
    )
    out = quantkit.quantize(
        str(model), recipe=recipe, format="modelopt", out=tmp_path / "out", progress=False
    )
    told = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert told["quant_algo"] == "MIXED_PRECISION"
    layers = told["quantized_layers"]
    assert layers["model.layers.0.mlp.up_proj"] == {"quant_algo": "MXFP8", "group_size": 32}
    assert layers["model.layers.1.self_attn.q_proj"] == {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    schemes = {w.scheme.name for w in Unpacked.open(open_source(out)).stored.values()}
    assert schemes == {"mxfp8a8", "fp8a8_row"}
