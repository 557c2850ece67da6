"""gpt_oss is written back with its experts in MXFP4, in the tensors that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import quantkit
from quantkit.checks.inspection import inspect
from quantkit.checks.verify import verify
from quantkit.errors import FormatError, QuantkitError
from quantkit.formats.format import expert_name, fused_name
from quantkit.formats.open import open_source
from quantkit.model.decoded import open_decoded
from quantkit.pipeline import blocks
from quantkit.pipeline.export import export

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 blocks of 4 experts whose two projections have 2 and 3 groups in a row."""
    folder = tmp_path_factory.mktemp("gpt_oss") / "model"
    return jobs.build("gpt_oss", folder, hidden_size=64, intermediate_size=96)


def written(model: Path, out: Path, method: str = "rtn", **request: object) -> Path:
    job = jobs.make_job(model, method, "mxfp4a16", format="mxfp4", **request)  # type: ignore[arg-type]
    return jobs.finish(job, out).out


@pytest.fixture(scope="module")
def rounded(model: Path) -> Path:
    return written(model, model.parent / "rounded")


def test_the_tensors_are_gpt_oss_own(model: Path, rounded: Path) -> None:
    source, found = (load_file(path / "model.safetensors") for path in (model, rounded))
    wanted = {}
    for name, value in source.items():
        if value.ndim == 3:
            experts, columns, rows = value.shape
            wanted[f"{name}_blocks"] = (torch.uint8, (experts, rows, columns // 32, 16))
            wanted[f"{name}_scales"] = (torch.uint8, (experts, rows, columns // 32))
        else:
            wanted[name] = (value.dtype, tuple(value.shape))
            assert torch.equal(found[name], value)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in found.items()} == wanted
    config = json.loads((rounded / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4"
    assert "model.layers.1.self_attn.q_proj" in config["modules_to_not_convert"]
    assert not any("experts" in name for name in config["modules_to_not_convert"])


def test_every_number_is_the_nearest_of_its_group(model: Path, rounded: Path) -> None:
    tensors = load_file(rounded / "model.safetensors")
    for name, value in load_file(model / "model.safetensors").items():
        if value.ndim != 3:
            continue
        # As transformers decodes it, [E, I, O] like the parameter.
        blocks_, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        theirs = convert_moe_packed_tensors(blocks_, scales, dtype=torch.float32)
        numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        step = torch.exp2(scales.float() - 127).repeat_interleave(32, -1).transpose(1, 2)
        nearest = (value.abs() / step)[..., None].sub(numbers).abs().min(-1).values
        error = (value / step - theirs / step).abs()
        # Equal distances are rounded either way; float32 divides by a power of two exactly.
        assert torch.allclose(error, nearest, rtol=0, atol=1e-6), name
        assert 0 < float((theirs - value).norm() / value.norm()) < 0.15


@pytest.mark.parametrize("method", ["rtn", "gptq", "best"])
def test_transformers_gives_quantkits_logits(method: str, model: Path, tmp_path: Path) -> None:
    out = written(model, tmp_path / "out", method)
    assert verify(out, against=model).ok
    theirs = jobs.logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    # Float32; the experts' sums may be in another order.
    torch.testing.assert_close(jobs.logits(quantkit.load(out)), theirs, rtol=1e-4, atol=1e-4)
    dense = jobs.logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    # A transposed or misplaced expert gives about 1.4.
    assert 0 < jobs.distance(theirs, dense) < 0.5
    report = json.loads((out / "quantkit/report.json").read_text())
    reasons = {t["name"]: t["reason"] for t in report["tensors"]}
    assert reasons["model.layers.0.self_attn.q_proj.weight"] == "the format holds experts only"
    assert reasons[expert_name(f"{EXPERTS}.down_proj", 3)] == f"method {method}"


def test_a_run_that_died_goes_on_to_the_same_bytes(
    model: Path, rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, count = blocks.BlockWork._put, 0

    def dies(self: object, weight: object, tensor: object) -> None:
        nonlocal count
        count += 1
        if count == 11:
            raise KeyboardInterrupt
        put(self, weight, tensor)  # type: ignore[arg-type]

    monkeypatch.setattr(blocks.BlockWork, "_put", dies)
    with pytest.raises(KeyboardInterrupt):
        written(model, tmp_path / "out")
    monkeypatch.undo()
    out = written(model, tmp_path / "out")
    assert json.loads((out / "quantkit/run.json").read_bytes())["steps_before_resume"] > 0
    assert (out / "model.safetensors").read_bytes() == (rounded / "model.safetensors").read_bytes()


def test_shards_hold_whole_tensors(model: Path, rounded: Path, tmp_path: Path) -> None:
    out = written(model, tmp_path / "out", max_shard_size=40_000)
    assert verify(out, against=model).ok
    index = json.loads((out / "model.safetensors.index.json").read_text())
    whole = load_file(rounded / "model.safetensors")
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for file in set(index["weight_map"].values()):
        for name, tensor in load_file(out / file).items():
            assert torch.equal(tensor, whole[name])
    assert len(set(index["weight_map"].values())) > 3


def test_a_loaded_model_is_saved_as_it_was(rounded: Path, tmp_path: Path) -> None:
    quantkit.load(rounded).save_pretrained(tmp_path / "saved")
    saved, there = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", rounded))
    assert set(saved) == set(there)
    assert all(torch.equal(saved[name], there[name]) for name in there)


def test_export_and_requantizing_keep_every_number(
    model: Path, rounded: Path, tmp_path: Path
) -> None:
    there, back = tmp_path / "apart", tmp_path / "back"
    done = export(
        rounded, there, format_name="compressed-tensors", allow_unreadable=True, progress=False
    )
    assert done.weights == 16 and not done.rounded
    export(there, back, format_name="mxfp4", progress=False)
    assert verify(back).ok
    assert (back / "model.safetensors").read_bytes() == (rounded / "model.safetensors").read_bytes()
    text = model / "calibration.txt"
    again = written(rounded, tmp_path / "again", requantize=True, text=text)
    # Scales may change where a group's numbers are those of two: values may not.
    ours, theirs = (open_decoded(open_source(path)) for path in (again, rounded))
    for name in ours.names():
        assert torch.equal(ours.read(name), theirs.read(name)), name


def test_sizes_are_told_as_they_are(rounded: Path) -> None:
    found = inspect(rounded)
    assert (found.format, found.bits_per_quantized_weight) == ("mxfp4", 4.25)
    assert sum(g.count for g in found.groups if g.scheme == "mxfp4a16") == 16


def test_names_of_experts_are_read_back() -> None:
    for name in (f"{EXPERTS}.down_proj", "a.3.weight", "layers.0.experts.w1"):
        assert fused_name(expert_name(name, 12)) == (name, 12)
    assert fused_name("model.layers.0.norm.bias") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w4a16_g32"}, "mxfp4 cannot hold w4a16_g32.*formats that can: "),
        ({"skip": ("*layers.1.mlp.experts.*",)}, "holds all experts of a model or none"),
        ({"head": "mxfp4a16"}, "lm_head.weight: mxfp4 cannot hold.*experts only"),
        ({"kv": "fp8"}, "mxfp4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_readers_would_not_find_is_refused(
    options: dict[str, object], message: str, model: Path
) -> None:
    with pytest.raises(QuantkitError, match=message):
        jobs.make_job(
            model,
            "rtn",
            **{"scheme": "mxfp4a16", "format": "mxfp4", **options},  # type: ignore[arg-type]
        )


def test_a_model_without_such_experts_is_refused(llama: Path) -> None:
    with pytest.raises(FormatError, match=r"proj.weight: .*experts only.*another --format"):
        jobs.make_job(llama, "rtn", "mxfp4a16", format="mxfp4")


def test_a_missing_slice_is_no_checkpoint(rounded: Path, tmp_path: Path) -> None:
    tensors = load_file(rounded / "model.safetensors")
    name = f"{EXPERTS}.down_proj_blocks"
    tensors[name] = tensors[name][:3].contiguous()
    tensors[f"{EXPERTS}.down_proj_scales"] = tensors[f"{EXPERTS}.down_proj_scales"][:3].contiguous()
    for file in rounded.rglob("*"):
        if file.is_file():
            (tmp_path / file.relative_to(rounded)).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / file.relative_to(rounded)).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = verify(tmp_path)
    coverage = next(check for check in found.checks if check.name == "coverage")
    assert any(
        f"{expert_name(f'{EXPERTS}.down_proj', 3)}: not quantized" in p for p in coverage.problems
    )
