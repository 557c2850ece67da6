"""FP8 checkpoints in blocks, as others ship them, are read: decoded, run, and quantized anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from format_samples import planned, quantized, same, stored
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checks.inspection import inspect
from quantkit.checks.verify import verify
from quantkit.errors import CheckpointError, FormatError
from quantkit.formats.open import open_source
from quantkit.formats.registry import make_format
from quantkit.model.decoded import Unpacked
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.export import export

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = (16, 32)


def write_fp8(model: Path, out: Path, block: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """A checkpoint with the layers' matrices in FP8; returns their values by the definition."""
    out.mkdir()
    tensors, values = {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        tensors[name] = tensor
        if tensor.ndim != 2 or ".layers." not in name:
            continue
        rows, columns = tensor.shape
        height, width = block or tensor.shape
        numbers = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-rows // height), -(-columns // width))
        values[name] = torch.empty_like(tensor)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
                scales[i, j] = tensor[part].abs().max() / 448
                numbers[part] = (tensor[part] / scales[i, j]).to(torch.float8_e4m3fn)
                values[name][part] = numbers[part].float() * scales[i, j]
        tensors[name] = numbers
        tensors[f"{name}_scale_inv"] = scales if block else scales.reshape(())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in model.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": None if block is None else list(block),
    }
    (out / "config.json").write_text(json.dumps(config))
    return values


@pytest.mark.parametrize("block", [BLOCK, None], ids=str)
def test_weights_are_decoded_run_and_quantized_anew(
    block: tuple[int, int] | None, tmp_path: Path
) -> None:
    model = jobs.build("llama", tmp_path / "model")
    values = write_fp8(model, tmp_path / "fp8", block)
    view = Unpacked.open(open_source(tmp_path / "fp8"))
    assert set(view.stored) == set(values)
    for name, expected in values.items():
        assert torch.equal(view.read(name), expected)
    original, read = (jobs.logits(quantkit.load(p)) for p in (model, tmp_path / "fp8"))
    assert 0 < jobs.distance(read, original) < 0.1
    found = inspect(tmp_path / "fp8")
    assert found.format == "fp8"
    text = model / "calibration.txt"
    job = jobs.make_job(tmp_path / "fp8", text=text, requantize=True)
    out = jobs.finish(job, tmp_path / "out").out
    assert verify(out).ok


def test_blocks_of_the_scheme_come_back_and_go_on(tmp_path: Path) -> None:
    shape = (200, 256)
    chosen, scheme = make_format("fp8"), Scheme.parse("fp8a8_b128")
    weight = planned("model.layers.0.mlp.up_proj.weight", shape, scheme)
    tensor = quantized(scheme, shape, torch.bfloat16)
    packed = chosen.pack(weight, tensor)
    assert packed[f"{weight.name}_scale_inv"].shape == (2, 2)
    assert packed[f"{weight.name}_scale_inv"].dtype == torch.float32
    numbers = packed[weight.name].float()
    for row in (0, 127, 128, 199):
        for column in (0, 127, 128, 255):
            scale = packed[f"{weight.name}_scale_inv"][row // 128, column // 128]
            value = (numbers[row, column] * scale).bfloat16()
            assert tensor.dequantize()[row, column] == value
    config = chosen.config([weight], model_type="llama", dtype=torch.bfloat16)
    assert config["weight_block_size"] == [128, 128]
    assert config["activation_scheme"] == "dynamic"
    # The same numbers fit compressed-tensors' blocks.
    source = stored(chosen, [weight], packed, torch.bfloat16)
    again = chosen.unpack(chosen.weights(source)[weight.name], source)
    assert same(again, tensor)
    other = make_format("compressed-tensors")
    assert other.represent(again) == (again, None)
    # Inputs are rounded only where the checkpoint says so.
    source.config["quantization_config"]["activation_scheme"] = "static"
    assert chosen.weights(source)[weight.name].scheme.name == "fp8a16_g128"


def test_readers_are_told_of_rows_that_fill_no_block() -> None:
    for rows, read in ((256, True), (200, False)):
        weights = [planned("model.layers.0.mlp.gate_proj.weight", (rows, 256), "fp8a8_b128")]
        found = make_format("fp8").readers(weights, "llama")
        assert {reason is None for reason in found.values()} == {read}


def test_other_blocks_are_not_written(tmp_path: Path) -> None:
    model = jobs.build("llama", tmp_path / "model")
    write_fp8(model, tmp_path / "fp8", BLOCK)
    with pytest.raises(FormatError, match="not fp8a16_g32"):
        export(tmp_path / "fp8", tmp_path / "x", format_name="fp8", progress=False)
    with pytest.raises(FormatError, match="not fp8a16_g32"):
        export(tmp_path / "fp8", tmp_path / "x", format_name="compressed-tensors", progress=False)
    loaded = quantkit.load(tmp_path / "fp8")
    with pytest.raises(FormatError, match=r"_proj.*not fp8a16_g32"):
        loaded.save_pretrained(tmp_path / "y")


@pytest.mark.parametrize(
    ("block", "message"),
    [([16, 48], "need scales of"), (None, "weight_block_size is None"), ([16], "is \\[16\\]")],
    ids=str,
)
def test_scales_that_do_not_fit_the_blocks_are_refused(
    block: list[int] | None, message: str, tmp_path: Path
) -> None:
    model = jobs.build("llama", tmp_path / "model")
    write_fp8(model, tmp_path / "fp8", BLOCK)
    path = tmp_path / "fp8" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["weight_block_size"] = block
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        quantkit.load(tmp_path / "fp8")
