"""Layers that predict further tokens: found by names and shapes, kept or quantized, never lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch
from tiny_extra import LAYOUTS, build

import quantkit
from quantkit.checkpoint.files import FileSource
from quantkit.checks.verify import verify
from quantkit.cli.app import main
from quantkit.errors import QuantkitError, RecipeError
from quantkit.formats.registry import format_of
from quantkit.methods.recipe import load_recipe
from quantkit.model.extra_layers import announced
from quantkit.pipeline.session import Job, run

_IDS = torch.arange(3, 27)[None]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with jobs.one_thread():
        yield


@pytest.fixture(scope="module", params=LAYOUTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp(request.param) / "model")


def layout(model: Path) -> tuple[str, str, tuple[str, ...]]:
    return LAYOUTS[model.parent.name.rstrip("0123456789")][1:]


def job_of(model: Path, mtp: str | None = None, **options: Any) -> Job:
    recipe = load_recipe("rtn", mtp=mtp)
    return jobs.make_job(model, recipe=recipe, allow_unreadable=True, **options)


def quantized(model: Path, out: Path, mtp: str | None = None) -> FileSource:
    run(job_of(model, mtp), out, progress=False)
    return FileSource(out)


def problems(out: Path, model: Path) -> list[str]:
    return [told for check in verify(out, against=model).checks for told in check.problems]


def config_of(source: FileSource) -> dict[str, Any]:
    found: dict[str, Any] = source.config["quantization_config"]
    return found


def test_they_stay_bit_for_bit_and_vllm_is_told_under_both_names(
    model: Path, tmp_path: Path
) -> None:
    prefix, root, beside = layout(model)
    job = job_of(model)
    (note,) = job.plan.notes
    assert prefix.removesuffix(".") in note and "--mtp SCHEME would quantize them" in note
    source, original = quantized(model, tmp_path / "out"), FileSource(model)
    mine = [name for name in original.names() if name.startswith(root)]
    assert len(mine) > 10
    for name in mine:
        assert torch.equal(source.read(name), original.read(name)), name
    reasons = {fate.reason for fate in job.plan.fates if fate.name in mine}
    assert reasons == {"layer that predicts further tokens, beyond the model class"}
    ignored = config_of(source)["ignore"]
    for start in (prefix, "model.layers.4."):
        assert f"{start}self_attn.q_proj" in ignored
    assert all(f"{root}{name}" in ignored for name in beside)
    assert not problems(tmp_path / "out", model)


def test_asked_for_they_are_rounded_and_come_back(model: Path, tmp_path: Path) -> None:
    prefix, root, beside = layout(model)
    assert job_of(model, "w8a16_g32").plan.readers == {"transformers": None, "vllm": None}
    out = tmp_path / "out"
    source, original = quantized(model, out, mtp="w8a16_g32"), FileSource(model)
    fmt = format_of(source)
    stored = fmt.weights(source)
    mine = [name for name in stored if name.startswith(prefix)]
    assert f"{prefix}self_attn.q_proj.weight" in mine
    assert any(".experts." in name for name in mine)
    for name in mine:
        assert stored[name].scheme.name == "w8a16_g32"
        decoded, weight = fmt.unpack(stored[name], source).dequantize(), original.read(name)
        assert (decoded - weight).abs().max() <= weight.abs().max() / 127
    kept = [name for name in original.names() if name.startswith(root) and name not in stored]
    assert {f"{root}{name}.weight" for name in beside} <= set(kept)
    assert f"{prefix}mlp.gate.weight" in kept
    for name in kept:
        assert torch.equal(source.read(name), original.read(name)), name
    targets = [t for group in config_of(source)["config_groups"].values() for t in group["targets"]]
    for start in (prefix, "model.layers.4."):
        assert f"{start}self_attn.q_proj" in targets
        assert f"{start}self_attn.q_proj" not in config_of(source)["ignore"]
    assert not problems(out, model)
    # The model class has no such layer: what it computes is the same, what it saves is all of it.
    with torch.no_grad():
        plain = quantkit.load(quantized(model, tmp_path / "plain").path, backend="reference")
        loaded = quantkit.load(out, backend="reference")
        assert torch.equal(loaded(input_ids=_IDS).logits, plain(input_ids=_IDS).logits)
    loaded.save_pretrained(tmp_path / "saved")
    again = FileSource(tmp_path / "saved")
    assert again.names() == source.names()
    for name in source.names():
        if name.startswith(root):
            assert torch.equal(again.read(name), source.read(name)), name


def test_a_run_that_ends_before_them_goes_on_to_the_same_bytes(model: Path, tmp_path: Path) -> None:
    run(job_of(model, "w4a16_g32"), tmp_path / "whole", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.pipeline.blocks.BlockWork._extra", _stop)
        with pytest.raises(KeyboardInterrupt):
            run(job_of(model, "w4a16_g32"), tmp_path / "out", progress=False)
    run(job_of(model, "w4a16_g32"), tmp_path / "out", progress=False)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def _stop(_: object) -> None:
    raise KeyboardInterrupt


def test_a_model_without_them_is_refused_and_told(tmp_path: Path) -> None:
    model = jobs.build("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match="no layer like the model's blocks beyond them"):
        job_of(model, "w4a16_g32")
    assert job_of(model).plan.notes == ()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    (note,) = job_of(model).plan.notes
    assert note.startswith("config.json says num_nextn_predict_layers 1, but the checkpoint holds")
    command = ["quantize", str(model), "--method", "rtn", "--mtp", "w4a16_g32"]
    with pytest.raises(SystemExit) as left:
        main([*command, "--out", str(tmp_path / "out")])
    assert left.value.code == 2
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_with_them_is_refused(model: Path) -> None:
    with pytest.raises(QuantkitError, match="not divisible by group_size 80"):
        job_of(model, "w4a16_g80")
    with pytest.raises(QuantkitError, match="compressed-tensors"):
        job_of(model, "nf4_b64", format="compressed-tensors")


def test_fields_that_count_them() -> None:
    assert announced({"num_nextn_predict_layers": 2}) == ("num_nextn_predict_layers", 2)
    assert announced({"text_config": {"mtp_num_hidden_layers": 1}}) is not None
    assert announced({"num_hidden_layers": 4, "num_nextn_predict_layers": 0}) is None
