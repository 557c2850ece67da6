"""An output that `verify` would reject is not finished, whatever wrote it and wherever it broke."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.record import REPORT
from quantkit.checkpoint.safetensors import read_header
from quantkit.checks.verify import verify
from quantkit.errors import ResumeError, UnsoundError
from quantkit.pipeline import export, onnx_export, session

pytestmark = pytest.mark.usefixtures("one_thread")

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.build("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.finish(jobs.make_job(model), tmp_path_factory.mktemp("out") / "quantized").out


def change_tensors(out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def scale_is_nan(out: Path) -> None:
    """In place, as a faulty disk would do it."""
    path = out / "model.safetensors"
    (stored,) = (s for s in read_header(path) if s.info.name == f"{UP}_scale")
    with path.open("r+b") as file:
        file.seek(stored.offset)
        file.write(struct.pack("<f", float("nan")))


def norm_is_infinite(out: Path) -> None:
    change_tensors(out, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))


def embedding_is_gone(out: Path) -> None:
    change_tensors(out, lambda tensors: tensors.pop("model.embed_tokens.weight"))


def shard_is_cut(out: Path) -> None:
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def report_says_otherwise(out: Path) -> None:
    report = json.loads((out / REPORT).read_text())
    entry = next(entry for entry in report["tensors"] if entry["name"] == UP)
    (out / REPORT).write_text(json.dumps(report | {"tensors": [entry | {"scheme": "w8a16_row"}]}))


DEFECTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "nan scale": (scale_is_nan, rf"{UP}: a scale is NaN or infinite"),
    "infinite norm": (norm_is_infinite, r"model\.norm\.weight: holds NaN or infinity"),
    "no embedding": (embedding_is_gone, r"model\.embed_tokens\.weight is not in the files"),
    "cut shard": (shard_is_cut, r"model\.safetensors"),
    "report": (report_says_otherwise, rf"{UP}: stored as w4a16_g32, the report says w8a16_row"),
}


def spoiled(function: Callable[..., object], spoil: Callable[[Path], None]) -> Callable[..., None]:
    """The function that writes what comes last, and a defect after it."""

    def written(partial: Path, *args: Any, **kwargs: Any) -> None:
        function(partial, *args, **kwargs)
        spoil(partial)

    return written


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("road", ["quantize", "export"])
def test_a_defect_in_safetensors_is_named_and_nothing_finished(
    model: Path,
    quantized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    defect: str,
    road: str,
) -> None:
    spoil, message = DEFECTS[defect]
    out = tmp_path / "out"

    def run(fresh: bool = False) -> object:
        if road == "quantize":
            return jobs.finish(jobs.make_job(model), out, fresh=fresh)
        return export.export(quantized, out, format_name="compressed-tensors", progress=False)

    module = session if road == "quantize" else export
    with monkeypatch.context() as patch:
        written = spoiled(module.write_finished_files, spoil)
        patch.setattr(module, "write_finished_files", written)
        with pytest.raises(UnsoundError, match=f"verify` would reject it: .*{message}") as caught:
            run()
    assert caught.value.exit_code == 70
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    if defect == "report":
        # The weights were right: the same command finishes.
        run()
    elif road == "quantize":
        # What the journal says is on the disk is not written again.
        with pytest.raises(UnsoundError if defect == "nan scale" else ResumeError, match="--fresh"):
            run()
        run(fresh=True)
    else:
        return
    assert (found := verify(out)).ok, found.text()


def test_the_command_ends_with_the_code_of_an_inner_fault(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = spoiled(session.write_finished_files, norm_is_infinite)
    monkeypatch.setattr(session, "write_finished_files", written)
    line = ("quantize", model, "--method", "int8", "--out", tmp_path / "out")
    assert jobs.command(*line) == 70
    told = capsys.readouterr()
    assert "model.norm.weight: holds NaN or infinity" in told.err and not told.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("road", ["export", "quantize"])
def test_a_gguf_file_without_its_embedding_is_not_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, road: str
) -> None:
    pytest.importorskip("gguf")
    import tiny_gguf
    from formats.gguf.test_export import save_model

    from quantkit.formats.gguf import container

    source = save_model(tmp_path / "source", "llama")
    right = container.place_tensors

    def without_embedding(*args: Any) -> dict[str, Any]:
        placed = right(*args)
        del placed["token_embd.weight"]
        return placed

    monkeypatch.setattr(container, "place_tensors", without_embedding)
    with pytest.raises(UnsoundError, match=r"there is no matrix token_embd\.weight"):
        if road == "export":
            tiny_gguf.export_gguf(source, tmp_path / "out")
        else:
            tiny_gguf.quantize(source, tmp_path / "out", "q8_0")
    assert not (tmp_path / "out").exists()


def test_an_onnx_graph_whose_data_is_spoiled_is_not_announced(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    from formats.onnx.test_export import Builder

    monkeypatch.setattr(onnx_export, "build_graph", Builder())
    monkeypatch.setattr(onnx_export, "require_builder", lambda: {"onnx": "1"})
    right = onnx_export._copy_provenance

    def cut(source: Any, partial: Path, fingerprint: Any, **options: Any) -> None:
        right(source, partial, fingerprint, **options)
        data = (partial / "model.onnx.data").read_bytes()
        (partial / "model.onnx.data").write_bytes(data[: len(data) // 2])

    monkeypatch.setattr(onnx_export, "_copy_provenance", cut)
    with pytest.raises(UnsoundError, match=r"model\.onnx"):
        onnx_export.export_onnx(quantized, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
