"""inspect tells what is in quantkit's checkpoints, plain ones and those of other tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import save_file

from quantkit.checks.inspection import inspect
from quantkit.errors import CheckpointError
from quantkit.methods.recipe import load_recipe
from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.session import run

PARAMETERS = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 2 * 320 * 64 + 64


def test_a_plain_checkpoint_has_its_dtypes_bits(tmp_path: Path) -> None:
    model = tiny.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    found = inspect(model)
    assert found.format == "unquantized safetensors"
    assert found.parameters == PARAMETERS
    assert found.bits_per_weight == 16
    assert found.bits_per_quantized_weight is None
    assert found.provenance is None and found.notes == ()
    up = next(g for g in found.groups if g.pattern == "model.layers.*.mlp.up_proj.weight")
    assert (up.count, up.scheme, up.dtype) == (3, None, "bfloat16")


@pytest.mark.parametrize(
    ("method", "scheme", "bits"),
    [
        # 4 bits, and per 32 weights a bfloat16 scale, a zero of 4 bits; per weight a shape.
        ("rtn", "w4a16_g32_asym", 4 + 20 / 32),
        # A bfloat16 scale; per weight a shape.
        ("rtn", "w3a16_g32", 3 + 16 / 32),
        # A byte per block of 64.
        ("nf4", "nf4_b64_dq", 4 + 8 / 64),
    ],
)
def test_quantkits_formats_give_scheme_bits_and_provenance(
    method: str, scheme: str, bits: float, tmp_path: Path
) -> None:
    model = tiny.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    recipe = load_recipe(method, scheme=scheme, skip=["*.0.mlp.down_proj*"])
    run(prepare(str(model), QuantizeOptions(recipe=recipe)), tmp_path / "out", progress=False)
    found = inspect(tmp_path / "out")
    assert found.parameters == PARAMETERS
    kept = {g.count for g in found.groups if g.pattern.endswith("down_proj.weight")}
    assert kept == {1, 2}
    assert {g.scheme for g in found.groups} == {None, scheme}
    assert found.bits_per_quantized_weight is not None
    # Maps, shapes, indices and descriptions come on top.
    assert found.bits_per_quantized_weight >= bits
    size = json.loads((tmp_path / "out" / "quantkit" / "report.json").read_text())["size"]
    assert round(found.bits_per_quantized_weight, 4) == size["bits_per_quantized_weight"]
    assert round(found.bits_per_weight, 4) == size["bits_per_weight"]
    assert found.provenance is not None
    assert (found.provenance.method, found.provenance.scheme) == (method, scheme)
    assert "torch" in found.provenance.versions
    data = json.loads(json.dumps(found.to_dict()))
    assert data["bytes"] == found.num_bytes == sum(g["bytes"] for g in data["groups"])
    text = found.text()
    assert scheme in text and "model.layers.*.self_attn.q_proj.weight" in text


def foreign(path: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": config})
    )
    save_file(tensors, path / "model.safetensors")
    return path


def test_other_tools_checkpoints_are_summarised(tmp_path: Path) -> None:
    awq = foreign(
        tmp_path / "awq",
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
        {
            "model.layers.0.mlp.up_proj.qweight": torch.zeros(64, 12, dtype=torch.int32),
            "model.layers.0.mlp.up_proj.qzeros": torch.zeros(2, 12, dtype=torch.int32),
            "model.layers.0.mlp.up_proj.scales": torch.zeros(2, 96, dtype=torch.float16),
        },
    )
    found = inspect(awq)
    assert found.format == "awq (bits 4, group_size 32, version gemv)"
    assert found.parameters == 64 * 96
    assert found.notes and "AWQ" in found.notes[0]


def test_a_foreign_compressed_tensors_layout_is_noted(tmp_path: Path) -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config: dict[str, object] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.weight_scale": torch.ones(1),
    }
    found = inspect(foreign(tmp_path / "fp8", config, tensors))
    assert found.format == "compressed-tensors (format float-quantized)"
    assert found.parameters == 32
    assert "not read" in found.notes[0]


def test_an_unfinished_output_is_refused(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "out.partial")
    with pytest.raises(CheckpointError, match="unfinished"):
        inspect(tmp_path / "out.partial")
