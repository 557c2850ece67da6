"""MXFP4 checkpoints, as gpt-oss ships them, are read: decoded exactly, run, and quantized anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from pipeline.test_requantize import write_dense
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import quantkit
from quantkit.checks.inspection import inspect
from quantkit.checks.verify import verify
from quantkit.errors import CheckpointError, NumericsError, SchemeError
from quantkit.formats.format import expert_name
from quantkit.formats.open import open_source
from quantkit.formats.registry import format_of
from quantkit.model.decoded import Unpacked, open_decoded
from quantkit.numbers.scheme import Scheme

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
DOWN = "model.layers.1.mlp.experts.down_proj"


def write_mxfp4(model: Path, out: Path) -> dict[str, torch.Tensor]:
    """The gpt_oss checkpoint with its experts in MXFP4; returns each expert [O, I] as packed.

    Number by number: the group's scale is the power of two that brings its largest to 4..8, each
    number the nearest, and two of them share a byte.
    """
    out.mkdir()
    tensors, values = {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if tensor.ndim != 3:
            tensors[name] = tensor
            continue
        num_experts, columns, rows = tensor.shape
        blocks = torch.zeros(num_experts, rows, columns // 32, 16, dtype=torch.uint8)
        scales = torch.zeros(num_experts, rows, columns // 32, dtype=torch.uint8)
        for e in range(num_experts):
            values[expert_name(name, e)] = torch.zeros(rows, columns)
            for o in range(rows):
                for g in range(columns // 32):
                    group = tensor[e, 32 * g : 32 * g + 32, o].tolist()
                    exponent = 0
                    while max(map(abs, group)) < 4 * 2.0**exponent:
                        exponent -= 1
                    scales[e, o, g] = exponent + 127
                    for k, number in enumerate(group):
                        unit = abs(number) / 2.0**exponent
                        code = min(range(8), key=lambda c: abs(NUMBERS[c] - unit))
                        sign = -1.0 if number < 0 else 1.0
                        byte = int(blocks[e, o, g, k // 2])
                        byte += (code + (8 if number < 0 else 0)) * (16 if k % 2 else 1)
                        blocks[e, o, g, k // 2] = byte
                        value = sign * NUMBERS[code] * 2.0**exponent
                        values[expert_name(name, e)][o, 32 * g + k] = value
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in model.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    (out / "config.json").write_text(json.dumps(config))
    return values


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain gpt_oss with 2 blocks of 4 experts."""
    folder = tmp_path_factory.mktemp("gpt_oss") / "model"
    return jobs.build("gpt_oss", folder, hidden_size=32, intermediate_size=32)


@pytest.fixture(scope="module")
def packed(model: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The same in MXFP4, and its experts' values."""
    out = model.parent / "mxfp4"
    return out, write_mxfp4(model, out)


def test_experts_are_decoded_as_packed_and_as_transformers_decodes_them(
    packed: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, values = packed
    view = Unpacked.open(open_source(path))
    assert set(view.stored) == set(values)
    for name, expected in values.items():
        assert torch.equal(view.read(name), expected)
        assert torch.equal(view.read_rows(name, 3, 9), expected[3:9])
    found = inspect(path)
    assert found.format == "mxfp4"
    assert found.bits_per_quantized_weight == 4.25
    assert {group.scheme for group in found.groups} == {None, "mxfp4a16"}


def test_every_code_under_every_scale_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 85, 6, 16), generator=generator, dtype=torch.uint8)
    # Every scale but NaN; 254 makes 4 and 6 infinite in float32 and bfloat16 alike.
    scales = torch.arange(255, dtype=torch.uint8).repeat(6).reshape(3, 85, 6)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "model.safetensors")
    config = {
        "model_type": "gpt_oss",
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_source(tmp_path)
    reader = format_of(source)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    for expert, (stored, expected) in enumerate(
        zip(reader.weights(source).values(), theirs, strict=True)
    ):
        assert stored.name == expert_name(name, expert)
        ours = reader.unpack(stored, source).dequantize()
        assert torch.equal(ours.view(torch.int16), expected.t().contiguous().view(torch.int16))


def test_the_model_runs_as_it_does_in_transformers(
    packed: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, _ = packed
    theirs = jobs.logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    # Float32; the experts' sums may be in another order.
    torch.testing.assert_close(jobs.logits(quantkit.load(path)), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_requantizing_is_quantizing_the_decoded_model(
    method: str, packed: tuple[Path, dict[str, torch.Tensor]], model: Path, tmp_path: Path
) -> None:
    path, values = packed
    text = model / "calibration.txt"
    job = jobs.make_job(path, method, text=text, requantize=True, allow_unreadable=True)
    out = jobs.finish(job, tmp_path / "out").out
    assert {f.name for f in job.plan.fates if f.fate == "quantized"} > set(values)
    dense = write_dense(path, tmp_path / "dense")
    plain = jobs.make_job(dense, method, text=text, allow_unreadable=True)
    expected = jobs.finish(plain, tmp_path / "plain").out
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (expected / file).read_bytes()
    assert verify(out, against=dense).ok and verify(out, against=path).ok
    distance = jobs.distance(jobs.logits(quantkit.load(out)), jobs.logits(quantkit.load(path)))
    # Seen: see the report of each; a transposed or misplaced expert gives about 1.4.
    assert 0 < distance < 0.6


def test_experts_in_one_tensor_are_quantized_one_by_one(model: Path, tmp_path: Path) -> None:
    whole = open_source(model)
    apart = open_decoded(whole)
    assert torch.equal(apart.read(expert_name(DOWN, 3)), whole.read(DOWN)[3].t())
    assert torch.equal(
        apart.read_flat(expert_name(DOWN, 3), 40, 90),
        apart.read(expert_name(DOWN, 3)).reshape(-1)[40:90],
    )
    assert DOWN not in apart.names() and apart.fingerprint() == whole.fingerprint()
    job = jobs.make_job(model, "awq", allow_unreadable=True)
    out = jobs.finish(job, tmp_path / "out").out
    assert verify(out, against=model).ok
    original = jobs.logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    loaded = quantkit.load(out)
    assert 0 < jobs.distance(jobs.logits(loaded), original) < 0.6
    loaded.save_pretrained(tmp_path / "saved")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "saved" / "model.safetensors")[name], tensor), name


def test_kept_experts_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    job = jobs.make_job(model, "rtn", skip=("*.experts.*",), allow_unreadable=True)
    out = jobs.finish(job, tmp_path / "out").out
    experts = load_file(model / "model.safetensors")[DOWN]
    found = load_file(out / "model.safetensors")
    for expert, value in enumerate(experts):
        assert torch.equal(found[expert_name(DOWN, expert)], value.t())
    dense = jobs.logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    assert 0 < jobs.distance(jobs.logits(quantkit.load(out)), dense) < 0.6


def test_a_model_in_memory_takes_its_quantized_experts(model: Path) -> None:
    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = jobs.logits(live)
    quantkit.quantize(live, method="rtn", scheme="w4a16_g32", allow_unreadable=True, progress=False)
    assert 0 < jobs.distance(jobs.logits(live), before) < 0.6


def test_groups_are_of_32() -> None:
    with pytest.raises(SchemeError, match="mxfp4a16"):
        Scheme(kind="mxfp4", bits=4, group_size=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_scales": torch.zeros(4, 32, 2, dtype=torch.uint8)}, f"{DOWN}_scales: .*need"),
        ({"_scales": torch.zeros(4, 32, 1)}, f"{DOWN}_scales: torch.float32"),
        ({"_scales": None}, f"{DOWN}_scales"),
        ({"_blocks": None}, f"{DOWN}_blocks"),
        ({"_blocks": torch.zeros(4, 32, 16, dtype=torch.uint8)}, f"{DOWN}_blocks: .*demands"),
        ({"_scales": torch.full((4, 32, 1), 255, dtype=torch.uint8)}, f"{DOWN}_scales: .*NaN"),
        (
            {
                "_blocks": torch.zeros(5, 32, 1, 16, dtype=torch.uint8),
                "_scales": torch.zeros(5, 32, 1, dtype=torch.uint8),
            },
            f"{expert_name(DOWN, 4)}: config.json asks for 4 experts",
        ),
        (
            {
                "_blocks": torch.zeros(3, 32, 1, 16, dtype=torch.uint8),
                "_scales": torch.zeros(3, 32, 1, dtype=torch.uint8),
            },
            "an expert is missing",
        ),
    ],
    ids=[
        "scales shape",
        "scales dtype",
        "no scales",
        "no blocks",
        "blocks shape",
        "NaN",
        "too many experts",
        "too few experts",
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    change: dict[str, torch.Tensor | None],
    message: str,
    packed: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    tensors = load_file(packed[0] / "model.safetensors")
    for end, value in change.items():
        del tensors[DOWN + end]
        if value is not None:
            tensors[DOWN + end] = value
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((packed[0] / "config.json").read_bytes())
    with pytest.raises((CheckpointError, NumericsError), match=message):
        quantkit.load(tmp_path)
