"""ModelOpt and quantkit read each other: its own exports, and its own decoders of quantkit's bytes.

Runs where both can be imported; the demo model is the only checkpoint it needs.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import pack_int4_in_uint8
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit.checks.verify import verify
from quantkit.demo import demo_path
from quantkit.formats.modelopt import Modelopt
from quantkit.formats.open import open_source
from quantkit.model.decoded import Unpacked
from quantkit.numbers.cache import CacheScheme
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import DividedScale

sys.path.insert(0, str(Path(__file__).parents[1]))
from format_samples import planned, quantized

SHAPES = ((40, 96), (6, 32), (130, 160), (200, 256))
DTYPES = (torch.float32, torch.bfloat16)
# ModelOpt's own presets, and what quantkit calls them.
EXPORTS = {
    "FP8_DEFAULT_CFG": "fp8a8_tensor",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "fp8a8_row",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": "fp8a8_b128",
    "MXFP8_DEFAULT_CFG": "mxfp8a8",
    "NVFP4_DEFAULT_CFG": "nvfp4a4",
    "W4A16_NVFP4_CFG": "nvfp4a16",
}
# The cache goes with these, as float8.
CACHED = ("FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["nvfp4a16", "nvfp4a4", "mxfp8a8", "fp8a8_tensor", "fp8a8_row"])
def test_the_owner_decodes_to_quantkits_numbers(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    scheme = Scheme.parse(name)
    tensor = quantized(scheme, shape, dtype)
    stored = Modelopt().pack(planned("m.weight", shape, scheme), tensor)
    assert torch.equal(owners(name, stored, shape, dtype), tensor.dequantize())


def owners(
    name: str, stored: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """What ModelOpt's tensor class decodes."""
    weight, scale = stored["m.weight"], stored["m.weight_scale"]
    found: torch.Tensor
    if name.startswith("nvfp4"):
        made = NVFP4QTensor(torch.Size(shape), torch.float32, weight)
        outer = stored["m.weight_scale_2"]
        # In float32, and rounded once: its own dtype would round the codes' numbers first.
        found = made.dequantize(
            dtype=torch.float32, scale=scale, double_scale=outer, block_sizes={-1: 16}
        )
    elif name == "mxfp8a8":
        made = MXFP8QTensor(torch.Size(shape), torch.float32, weight)
        found = made.dequantize(dtype=torch.float32, scale=scale, block_sizes={-1: 32})
    elif name == "fp8a8_b128":
        made = FP8QTensor(torch.Size(shape), torch.float32, weight)
        blocks = {-1: 128, -2: 128}
        squeezed = scale.reshape(scale.shape[0], scale.shape[2])
        found = made.dequantize(dtype=torch.float32, scale=squeezed, block_sizes=blocks)
    else:
        made = FP8QTensor(torch.Size(shape), torch.float32, weight)
        wide = scale.reshape(-1, 1) if scale.ndim else scale
        found = made.dequantize(dtype=torch.float32, scale=wide)
    return found.reshape(shape).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_owner_packs_int4_to_the_same_bytes(shape: tuple[int, int]) -> None:
    scheme = Scheme.parse("w4a16_g32")
    tensor = quantized(scheme, shape, torch.float32)
    stored = Modelopt().pack(planned("m.weight", shape, scheme), tensor)
    again = pack_int4_in_uint8(tensor.dequantize(), stored["m.weight_scale"], 32)
    assert torch.equal(again, stored["m.weight"])


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ModelOpt's exports of the demo model, by the name of its preset."""
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    text = "def average(numbers):\n    return sum(numbers) / len(numbers)\n" * 40
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :256]
    found = {}
    for name in EXPORTS:
        settings = copy.deepcopy(getattr(mtq, name))
        if name in CACHED:
            settings["quant_cfg"] = [*settings["quant_cfg"], *mtq.FP8_KV_CFG["quant_cfg"]]
        model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.bfloat16)
        mtq.quantize(model, settings, lambda made: made(ids))
        out = tmp_path_factory.mktemp("modelopt") / name
        export_hf_checkpoint(model, export_dir=out)
        found[name] = out
    return found


@pytest.mark.parametrize("name", EXPORTS)
def test_its_own_exports_are_read(name: str, exported: dict[str, Path]) -> None:
    out = exported[name]
    view = Unpacked.open(open_source(out))
    assert {weight.scheme.name for weight in view.stored.values()} == {EXPORTS[name]}
    assert len(view.stored) == 28
    assert verify(out).ok
    assert view.cache_scheme() == (CacheScheme(name="fp8") if name in CACHED else None)
    for weight in view.stored:
        tensor = view.quantized(weight)
        source = view.packed
        stored = {
            f"m.{key.removeprefix(weight.removesuffix('weight'))}": source.read(key)
            for key in view.stored[weight].tensors
        }
        found = owners(EXPORTS[name], stored, tensor.shape, torch.float32)
        assert torch.equal(found, tensor.dequantize(torch.float32)), weight
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert bool(quantkit.load(out, dtype=torch.float32)(ids).logits.isfinite().all())


def test_divisors_of_its_own_are_kept_as_they_are(
    exported: dict[str, Path],
) -> None:
    view = Unpacked.open(open_source(exported["NVFP4_DEFAULT_CFG"]))
    scales = [view.quantized(name).scale for name in view.stored]
    assert all(isinstance(scale, DividedScale) and scale.inverted for scale in scales)


def test_weights_not_folded_are_refused_by_name(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.bfloat16)
    ids = torch.randint(0, 100, (2, 64), generator=torch.Generator().manual_seed(0))
    mtq.quantize(model, copy.deepcopy(mtq.INT4_AWQ_CFG), lambda made: made(ids))
    export_hf_checkpoint(model, export_dir=tmp_path / "awq")
    result = verify(tmp_path / "awq")
    assert not result.ok and "pre_quant_scale" in str(result)


@pytest.mark.parametrize("name", ["fp8a8_tensor", "nvfp4a16", "nvfp4a4"])
def test_the_two_configurations_say_the_same_by_the_owners_converter(
    name: str, tmp_path: Path
) -> None:
    options = {"calibration": "demo", "samples": 8, "seq_len": 64} if name[-2:] != "16" else {}
    out = quantkit.quantize(
        str(demo_path()), "fp8", scheme=name, format="modelopt", out=tmp_path / "out",
        progress=False, **options,
    )  # fmt: skip
    beside = json.loads((out / "hf_quant_config.json").read_text())
    inline = json.loads((out / "config.json").read_text())["quantization_config"]
    converted = convert_hf_quant_config_format(beside)
    for key in ("quant_algo", "ignore", "config_groups", "quant_method"):
        assert converted[key] == inline[key]
