"""Checkpoints written in another format: the same numbers, or a reason and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from format_samples import same
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checks.verify import verify
from quantkit.errors import FormatError, ResumeError
from quantkit.formats.open import open_source
from quantkit.model.decoded import Unpacked
from quantkit.numbers.tensor import QuantizedTensor
from quantkit.pipeline import export as export_module
from quantkit.pipeline.export import export

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quantized(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by scheme: folded and asymmetric, and symmetric with a quantized head."""
    root = tmp_path_factory.mktemp("quantized")
    asym = jobs.make_job(llama, "awq", "w4a16_g32_asym")
    sym = jobs.make_job(llama, "rtn", "w4a16_g32")
    return {
        "asym": jobs.finish(asym, root / "asym").out,
        "sym": jobs.finish(sym, root / "sym").out,
    }


def tensors(path: Path) -> dict[str, QuantizedTensor]:
    view = Unpacked.open(open_source(path))
    return {name: view.tensor(name) for name in view.stored}


@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_a_ring_of_formats_ends_in_the_bytes_it_began_with(
    quantized: dict[str, Path], kind: str, llama: Path, tmp_path: Path
) -> None:
    first = previous = quantized[kind]
    expected = tensors(first)
    logits = jobs.logits(quantkit.load(first))
    for name in ("gptq", "gptq_v2", "awq", "compressed-tensors"):
        done = export(previous, tmp_path / name, format_name=name, progress=False)
        assert done.rounded == () and done.written
        found = tensors(done.out)
        assert found.keys() == expected.keys()
        assert all(same(found[key], expected[key]) for key in expected)
        assert torch.equal(jobs.logits(quantkit.load(done.out)), logits)
        assert verify(done.out, against=llama).ok
        previous = done.out
    for file in ("model.safetensors", "config.json"):
        assert (previous / file).read_bytes() == (first / file).read_bytes()


def test_a_killed_export_goes_on_and_a_finished_one_says_so(
    quantized: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export(quantized["asym"], tmp_path / "whole", format_name="awq", progress=False)
    calls = []

    def dies(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 12:
            raise KeyboardInterrupt
        write(*arguments)  # type: ignore[arg-type]

    write = export_module._write
    monkeypatch.setattr(export_module, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        export(quantized["asym"], tmp_path / "out", format_name="awq", progress=False)
    assert not (tmp_path / "out").exists()
    before = len(calls)
    export(quantized["asym"], tmp_path / "out", format_name="awq", progress=False)
    assert len(calls) - before < len(jobs.hashes(tmp_path / "whole")) + 40
    assert jobs.hashes(tmp_path / "out") == jobs.hashes(whole.out)
    again = export(quantized["asym"], tmp_path / "out", format_name="awq", progress=False)
    assert not again.written
    with pytest.raises(ResumeError, match="format"):
        export(quantized["asym"], tmp_path / "out", format_name="gptq", progress=False)


def with_bf16_model(path: Path, target: Path) -> Path:
    """A copy whose config says bfloat16, as another tool's with float16 scales may."""
    shutil.copytree(path, target)
    config = json.loads((target / "config.json").read_text())
    config["dtype"] = "bfloat16"
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_what_would_be_rounded_is_said_before_anything_is_written(
    quantized: dict[str, Path], tmp_path: Path
) -> None:
    source = export(quantized["sym"], tmp_path / "gptq", format_name="gptq", progress=False).out
    foreign = with_bf16_model(source, tmp_path / "foreign")
    file = foreign / "model.safetensors"
    content = load_file(file)
    name = next(key for key in content if key.endswith("up_proj.scales"))
    content[name] = content[name] * 1.001  # no bfloat16 values any more
    save_file(content, file)
    options = {"format_name": "compressed-tensors", "progress": False}
    with pytest.raises(FormatError, match=r"up_proj.weight: \d+ of \d+ scales.*--allow-rounding"):
        export(foreign, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out*"))
    done = export(foreign, tmp_path / "out", allow_rounding=True, **options)  # type: ignore[arg-type]
    assert [weight for weight, _ in done.rounded] == [name.replace("scales", "weight")]
    report = json.loads((done.out / "quantkit/report.json").read_bytes())
    assert "from float16 to bfloat16" in report["degraded"][done.rounded[0][0]]
    near, far = tensors(done.out)[done.rounded[0][0]], tensors(foreign)[done.rounded[0][0]]
    assert torch.equal(near.codes, far.codes)
    assert torch.allclose(near.scale.values(), far.scale.values(), rtol=2**-8)


@pytest.mark.parametrize(
    ("scheme", "format_name", "message"),
    [
        ("w3a16_g32", "awq", "awq cannot hold w3a16_g32: it holds 4 bit"),
        ("w8a8_row", "gptq", "gptq cannot hold w8a8_row: it is for 16-bit activations"),
        ("nf4_b64", "compressed-tensors", "not nf4_b64"),
        ("w4a16_g32", "bitsandbytes", "it holds nf4, fp4 and w8a8_row"),
    ],
)
def test_what_cannot_be_held_is_refused(
    llama: Path, tmp_path: Path, scheme: str, format_name: str, message: str
) -> None:
    out = jobs.finish(jobs.make_job(llama, "rtn", scheme), tmp_path / "out").out
    with pytest.raises(FormatError, match=message):
        export(out, tmp_path / "other", format_name=format_name, progress=False)
    assert not list(tmp_path.glob("other*"))


def test_another_tools_checkpoint_without_a_report_is_exported(
    quantized: dict[str, Path], tmp_path: Path
) -> None:
    source = export(quantized["asym"], tmp_path / "gptq", format_name="gptq_v2", progress=False).out
    shutil.rmtree(source / "quantkit")
    out = export(source, tmp_path / "out", format_name="awq", progress=False).out
    assert verify(out).ok
    found, expected = tensors(out), tensors(quantized["asym"])
    assert all(same(found[key], expected[key]) for key in expected)


def test_columns_in_activation_order_go_to_gptq_only(
    quantized: dict[str, Path], tmp_path: Path
) -> None:
    source = export(quantized["asym"], tmp_path / "gptq", format_name="gptq_v2", progress=False).out
    content = load_file(source / "model.safetensors")
    name = next(key for key in content if key.endswith("g_idx"))
    content[name] = content[name].flip(0).contiguous()
    save_file(content, source / "model.safetensors")
    with pytest.raises(FormatError, match=r"activation order.*gptq_v2"):
        export(source, tmp_path / "ct", format_name="compressed-tensors", progress=False)
    out = export(source, tmp_path / "v1", format_name="gptq", progress=False).out
    logits = jobs.logits(quantkit.load(out))
    assert torch.equal(logits, jobs.logits(quantkit.load(source)))
    assert jobs.distance(logits, jobs.logits(quantkit.load(quantized["asym"]))) > 1e-3


def test_a_head_that_quantizing_untied_is_exported(tmp_path: Path) -> None:
    model = jobs.build("llama", tmp_path / "model", tie_word_embeddings=True)
    job = jobs.make_job(model, "rtn", "w4a16_g32", head="w8a16_g32")
    out = jobs.finish(job, tmp_path / "out").out
    done = export(out, tmp_path / "gptq", format_name="gptq", allow_unreadable=True, progress=False)
    assert verify(done.out, against=model).ok
    assert torch.equal(jobs.logits(quantkit.load(done.out)), jobs.logits(quantkit.load(out)))


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "qwen3_moe", "falcon"])
def test_conv1d_and_experts_are_exported(kind: str, tmp_path: Path) -> None:
    model = jobs.build(kind, tmp_path / "model")
    out = jobs.finish(jobs.make_job(model, "rtn", "w4a16_g32"), tmp_path / "out").out
    done = export(out, tmp_path / "gptq", format_name="gptq", allow_unreadable=True, progress=False)
    assert torch.equal(jobs.logits(quantkit.load(done.out)), jobs.logits(quantkit.load(out)))
    assert verify(done.out, against=model).ok
    back = export(done.out, tmp_path / "ct", format_name="compressed-tensors", progress=False)
    assert (back.out / "config.json").read_bytes() == (out / "config.json").read_bytes()


def test_the_command_prints_what_was_done(
    quantized: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("export", quantized["asym"], "--format", "awq", "--out", tmp_path / "awq")
    assert jobs.command(*line) == 0
    assert "14 of 14 weights exactly as stored" in capsys.readouterr().out
    assert jobs.command(*line, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["exact"] == 14 and told["written"] is False
    assert jobs.command("export", tmp_path, "--format", "awq", "--out", tmp_path / "x") == 2


def test_an_export_can_be_started_over(
    quantized: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    export(quantized["sym"], out, format_name="gptq", progress=False)
    line = ("export", quantized["asym"], "--format", "gptq_v2", "--out", out, "--allow-unreadable")
    assert jobs.command(*line) == 2
    assert "use --fresh to start over" in capsys.readouterr().err
    assert jobs.command(*line, "--fresh") == 0
    assert verify(out).ok
    expected = tensors(quantized["asym"])
    assert all(same(found, expected[name]) for name, found in tensors(out).items())


def test_nothing_is_written_into_a_finished_output(quantized: dict[str, Path], llama: Path) -> None:
    finished = quantized["sym"]
    for line in (
        ("export", finished, "--format", "gptq"),
        ("quantize", llama, "--method", "rtn", "--scheme", "w4a16_g32"),
    ):
        assert jobs.command(*line, "--out", finished / "inner" / "out") == 2
    assert verify(finished).ok
