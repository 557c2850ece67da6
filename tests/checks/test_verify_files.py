"""Verifying GGUF files: whole, of their model's tensors, and of the source's numbers.

ONNX models are verified in test_onnx_source.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_jobs as jobs
from safetensors.torch import load_file, save_file
from tiny_gguf import export_gguf
from tiny_gguf import quantize as quantize_gguf

pytest.importorskip("gguf")

from quantkit.checkpoint.manifest import write_manifest
from quantkit.checks.verify import VerifyResult, verify
from quantkit.demo.files import demo_path
from quantkit.errors import CheckpointError
from quantkit.formats.gguf.container import MODEL_FILE
from quantkit.formats.gguf.file import read_gguf

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "q4_k_m"
    return quantize_gguf(demo_path(), out, "q4_k_m")


def failed(result: VerifyResult) -> list[str]:
    return [check.name for check in result.checks if not check.ok]


@pytest.mark.parametrize("scheme", ["q2_k", "q5_0", "q8_0"])
def test_every_type_passes_against_its_source(tmp_path: Path, scheme: str) -> None:
    result = verify(quantize_gguf(demo_path(), tmp_path / "out", scheme), against=demo_path())
    assert result.ok, result.text()
    assert "largest relative error of a weight" in result.checks[-1].detail


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "mixtral"])
def test_shifted_norms_transposed_weights_and_experts_pass(tmp_path: Path, kind: str) -> None:
    from formats.gguf.test_export import save_model

    source = save_model(tmp_path / "source", kind)
    done = export_gguf(source, tmp_path / "out")
    result = verify(done.out, against=source)
    assert result.ok, result.text()
    assert result.checks[-1].detail.startswith("largest relative error of a weight 0.000")


def test_folds_of_a_gpt2_whose_names_lack_the_prefix_are_found(tmp_path: Path) -> None:
    from formats.gguf.test_export import save_model

    model = save_model(tmp_path / "model", "gpt2")
    tensors = load_file(model / "model.safetensors")
    short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(short, model / "model.safetensors", metadata={"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text("The same words again, and other words after them.\n" * 500)
    job = jobs.make_job(model, "awq", "w4a16_g32", text=text, allow_unreadable=True)
    checkpoint = jobs.finish(job, tmp_path / "q").out
    done = export_gguf(checkpoint, tmp_path / "out")
    for against in (checkpoint, model):
        result = verify(done.out, against=against)
        assert result.ok, result.text()


def test_what_was_quantized_anew_is_compared_with_every_ancestor(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The same words again, and other words after them.\n" * 500)
    job = jobs.make_job(demo_path(), "awq", "w8a16_g32", text=text)
    first = jobs.finish(job, tmp_path / "first").out
    job = jobs.make_job(first, "awq", "w4a16_g32", text=text, requantize=True)
    second = jobs.finish(job, tmp_path / "second").out
    exported = export_gguf(second, tmp_path / "exported").out
    own = quantize_gguf(first, tmp_path / "own", "q4_k_m", requantize=True)
    for out, sources in ((exported, (second, first, demo_path())), (own, (first, demo_path()))):
        for source in sources:
            result = verify(out, against=source)
            assert result.ok, f"{out.name} against {source.name}: {result.text()}"


@pytest.mark.parametrize(
    "method, scheme", [("rtn", "w4a16_g32"), ("rtn", "w4a16_g32_asym"), ("awq", "w4a16_g32")]
)
def test_a_file_exported_from_a_checkpoint_holds_its_numbers(
    tmp_path: Path, method: str, scheme: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The same words again, and other words after them.\n" * 500)
    job = jobs.make_job(demo_path(), method, scheme, text=text)
    checkpoint = jobs.finish(job, tmp_path / "q").out
    done = export_gguf(checkpoint, tmp_path / "out", allow_rounding=True)
    for against in (checkpoint, demo_path()):
        result = verify(done.out, against=against)
        assert result.ok, result.text()


def test_another_models_weights_are_told(quantized: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    other.mkdir()
    for path in demo_path().iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    result = verify(quantized, against=other)
    assert failed(result) == ["source"]
    assert {text.partition(":")[0] for text in result.checks[-1].problems} == {name}


def test_damage_is_found_and_named(quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "quantkit").mkdir(parents=True)
    for name in (MODEL_FILE, "Modelfile", "quantkit/report.json", "quantkit/fingerprint.json"):
        (out / name).write_bytes((quantized / name).read_bytes())
    assert failed(verify(out, runtime="llama.cpp")) == ["files"]
    write_manifest(out)
    assert verify(out).ok
    data = bytearray((out / MODEL_FILE).read_bytes())
    tensor = read_gguf(out / MODEL_FILE).tensors["blk.2.attn_q.weight"]
    data[tensor.offset : tensor.offset + 2] = b"\x00\x7c"
    (out / MODEL_FILE).write_bytes(data)
    assert failed(verify(out)) == ["files", "numbers"]
    # The file alone: its own entry of the manifest counts, others do not.
    (out / "notes.txt").write_text("x")
    assert failed(verify(out / MODEL_FILE)) == ["files", "numbers"]
    (out / "notes.txt").unlink()
    write_manifest(out)
    result = verify(out)
    assert failed(result) == ["numbers"]
    assert "layers.2.self_attn.q_proj.weight: a scale is NaN or infinite" in result.text()
    (out / MODEL_FILE).write_bytes(data[: len(data) // 2])
    assert failed(verify(out)) == ["files", "headers"]


def test_a_report_that_says_other_types_is_told(quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "quantkit").mkdir(parents=True)
    (out / MODEL_FILE).write_bytes((quantized / MODEL_FILE).read_bytes())
    report = json.loads((quantized / "quantkit/report.json").read_bytes())
    told = next(t for t in report["tensors"] if t["name"] == "model.layers.1.mlp.up_proj.weight")
    told["scheme"] = "q6_k"
    (out / "quantkit/report.json").write_text(json.dumps(report))
    write_manifest(out)
    assert failed(verify(out)) == ["coverage"]
    assert f"{told['name']}: stored as q4_k, the report says q6_k" in verify(out).text()


def test_a_file_of_another_tool_has_no_manifest_to_keep(quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs.gguf").write_bytes((quantized / MODEL_FILE).read_bytes())
    for path in (tmp_path / "theirs.gguf", tmp_path):
        result = verify(path)
        assert result.ok and result.checks[0].detail == "no manifest: not an output of quantkit"
    (tmp_path / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="2 GGUF or ONNX files"):
        verify(tmp_path)
