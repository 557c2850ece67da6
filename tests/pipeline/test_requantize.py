"""A quantized checkpoint as the source of another: its weights are decoded first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from safetensors.torch import save_file

from quantkit.checkpoint.manifest import write_manifest
from quantkit.checks.verify import verify
from quantkit.errors import CheckpointError
from quantkit.formats.open import open_source
from quantkit.model.decoded import Unpacked
from quantkit.model.fold_vectors import FOLDS_FILE
from quantkit.pipeline.export import export

pytestmark = pytest.mark.usefixtures("one_thread")


def write_dense(quantized: Path, dense: Path) -> Path:
    """The checkpoint with every weight decoded, as a plain one."""
    shutil.copytree(quantized, dense, ignore=shutil.ignore_patterns("quantkit", "*.safetensors"))
    view = Unpacked.open(open_source(quantized))
    (dense / "config.json").write_text(json.dumps(view.config))
    save_file(
        {name: view.read(name).contiguous() for name in view.names()}, dense / "model.safetensors"
    )
    return dense


@pytest.mark.parametrize(
    ("kind", "first", "scheme"),
    [
        ("llama", "nf4", "nf4_b64_dq"),
        ("gpt2", "int8", "w8a16_row"),
        ("mixtral", "fp8", "fp8a16_row"),
    ],
)
def test_requantizing_is_quantizing_the_decoded_model(
    kind: str, first: str, scheme: str, tmp_path: Path
) -> None:
    model = jobs.build(kind, tmp_path / "model")
    text = model / "calibration.txt"
    job = jobs.make_job(model, first, scheme, allow_unreadable=True)
    quantized = jobs.finish(job, tmp_path / "first").out
    again = jobs.make_job(quantized, "gptq", text=text, requantize=True, allow_unreadable=True)
    out = jobs.finish(again, tmp_path / "again").out
    dense = write_dense(quantized, tmp_path / "dense")
    plain = jobs.make_job(dense, "gptq", text=text, allow_unreadable=True)
    expected = jobs.finish(plain, tmp_path / "plain").out
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (expected / file).read_bytes()
    assert verify(out, against=dense).ok


def test_without_the_option_it_is_refused(tmp_path: Path) -> None:
    model = jobs.build("llama", tmp_path / "model")
    quantized = jobs.finish(jobs.make_job(model), tmp_path / "first").out
    with pytest.raises(CheckpointError, match="--requantize"):
        jobs.make_job(quantized, "nf4", "nf4_b64")


def test_rows_read_in_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    for kind in ("llama", "gpt2"):
        model = jobs.build(kind, tmp_path / kind)
        job = jobs.make_job(model, "nf4", "nf4_b64", allow_unreadable=True)
        view = Unpacked.open(open_source(jobs.finish(job, tmp_path / f"{kind}-out").out))
        for name in view.stored:
            whole = view.read(name)
            assert whole.shape == view.info(name).shape
            assert torch.equal(view.read_rows(name, 3, 11), whole[3:11])
            assert torch.equal(view.read_flat(name, 5, 70), whole.reshape(-1)[5:70])
            with pytest.raises(IndexError):
                view.read_flat(name, 0, whole.numel() + 1)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
def test_folds_of_every_step_are_told_apart(kind: str, tmp_path: Path) -> None:
    model = jobs.build(kind, tmp_path / "model", dtype=torch.bfloat16)
    text = model / "calibration.txt"

    def again(source: Path, method: str, scheme: str) -> Path:
        job = jobs.make_job(
            source, method, scheme, text=text, requantize=True, allow_unreadable=True
        )
        return jobs.finish(job, tmp_path / f"{source.name}-{method}").out

    first = again(model, "awq", "w8a16_g32")
    exported = export(
        first, tmp_path / "gptq", format_name="gptq_v2", progress=False, allow_unreadable=True
    ).out
    plain, folded = again(first, "rtn", "w4a16_g32"), again(first, "awq", "w4a16_g32")
    thrice = again(folded, "awq", "w3a16_g32")
    ancestors = {
        exported: (first, model),
        plain: (first, exported, model),
        folded: (first, exported, plain, model),
        thrice: (folded, first, model),
    }
    for out, sources in ancestors.items():
        for source in sources:
            result = verify(out, against=source)
            assert result.ok, f"{out.name} against {source.name}: {result.text()}"


def test_folds_of_another_model_are_refused(tmp_path: Path) -> None:
    model = jobs.build("llama", tmp_path / "model")
    text = model / "calibration.txt"
    found = []
    for name, rows in (("a", 16), ("b", 8)):
        out = jobs.finish(jobs.make_job(model, "awq", text=text), tmp_path / name).out
        save_file({"x:rows": torch.ones(rows)}, out / FOLDS_FILE)
        write_manifest(out)
        found.append(out)
    result = verify(found[0], against=found[1])
    assert "16 folds in" in result.text() and "not of one model" in result.text()
