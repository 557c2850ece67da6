"""Everything in a model's folder that is not weights travels, and what does not is told."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import torch
from safetensors.torch import save_file

import quantkit.checkpoint.sidefiles
from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.sidefiles import find_side_files, module_paths
from quantkit.checks.verify import verify
from quantkit.errors import CheckpointError
from quantkit.pipeline.export import export

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
POOLING = {"word_embedding_dimension": 64, "pooling_mode_lasttoken": True, "include_prompt": True}
# A sentence-transformers model as its library saves one, with code and prompts of its own.
EMBEDDER: dict[str, object] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 4, "name": "4", "path": "4_Normalize", "type": "sentence_transformers.models.Norm"},
    ],
    "config_sentence_transformers.json": {"prompts": {"query": "Instruct: "}},
    "sentence_bert_config.json": {"max_seq_length": 128, "do_lower_case": False},
    "1_Pooling/config.json": POOLING,
    "2_Dense/config.json": {"in_features": 64, "out_features": 16, "bias": False},
    "3_Dense/config.json": {"in_features": 16, "out_features": 8, "bias": False},
    "image_processor_config.json": {"do_resize": True},
    "tekken.json": {"config": {}},
    "params.json": {"dim": 64},
    "SYSTEM_PROMPT.txt": "You are told what to do.",
    "custom_generate/generate.py": "def generate(model, **kwargs): ...",
    "configuration_mine.py": "raise RuntimeError('must not run')",
    "assets/scheme.svg": "<svg/>",
}
LEFT = {
    "README.md": "the output has a model card of its own",
    ".gitattributes": "hidden",
    ".cache/": "hidden",
    "pytorch_model.bin": "weights in another form",
    "pytorch_model.bin.index.json": "weights in another form",
    "consolidated.00.pth": "weights in another form",
    "consolidated.safetensors": "weights in another form",
    "model.Q4_K_M.gguf": "weights in another form",
    "2_Dense/pytorch_model.bin": "weights in another form",
    "original/": "weights in another form",
    "onnx/": "weights in another form",
    "checkpoint-500/": "a checkpoint of its training",
    "hf_quant_config.json": "describes another quantization",
    "adapter_config.json": "an adapter that is not merged",
    "extra.safetensors": "weights that config.json's model does not read",
}


@pytest.fixture
def embedder(tmp_path: Path) -> Path:
    """A tiny model with all of it beside its weights, and what need not travel."""
    model = jobs.build("llama", tmp_path / "model")
    for name, content in EMBEDDER.items():
        write(model / name, content if isinstance(content, str) else json.dumps(content))
    save_file({"linear.weight": torch.randn(16, 64)}, model / "2_Dense" / "model.safetensors")
    # Only a pickle holds the weights of this module: it is carried, not opened.
    write(model / "3_Dense" / "pytorch_model.bin", "pickle")
    for name in LEFT:
        # Of these quantkit looks into one: of a quantized model it would say how.
        content = '{"quantization": {"quant_algo": null}}' if name.startswith("hf_quant") else "x"
        write(model / name / "weights.safetensors" if name[-1] == "/" else model / name, content)
    return model


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def digests(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of all files that are neither quantkit's own nor the weights'."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        own = name in ("config.json", "README.md", "model.safetensors")
        if path.is_file() and not own and not name.startswith("quantkit/"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def expected(model: Path) -> dict[str, str]:
    """What of the source must be found in an output."""
    left = tuple(name for name in LEFT)
    return {name: digest for name, digest in digests(model).items() if not name.startswith(left)}


def test_an_embedding_model_keeps_all_that_its_loaders_need(embedder: Path, tmp_path: Path) -> None:
    out = jobs.finish(jobs.make_job(embedder), tmp_path / "out").out
    wanted = expected(embedder)
    modules = {"2_Dense/model.safetensors", "3_Dense/pytorch_model.bin"}
    assert set(wanted) >= {*EMBEDDER, *modules, "tokenizer.json", "generation_config.json"}
    assert digests(out) == wanted
    # In the report, on its pages, in the model card, and in the manifest.
    report = json.loads((out / "quantkit" / "report.json").read_text())
    assert report["side_files"] == {"carried": sorted(wanted), "left": dict(sorted(LEFT.items()))}
    for page in ("quantkit/report.md", "quantkit/report.html", "README.md"):
        text = (out / page).read_text()
        assert "2_Dense/model.safetensors" in text and "checkpoint of its training" in text, page
    manifest = json.loads((out / "quantkit" / "manifest.json").read_text())["files"]
    assert {name: manifest[name]["sha256"] for name in wanted} == wanted
    assert (found := verify(out, against=embedder)).ok, found.text()
    # Exports carry them too, all but the source's own account of itself.
    again = export(out, tmp_path / "again", format_name="gptq", allow_unreadable=True).out
    assert digests(again) == wanted
    told = json.loads((again / "quantkit" / "report.json").read_text())["side_files"]["left"]
    assert told == {
        "README.md": "the output has a model card of its own",
        "quantkit/": "tells how this model was made",
    }


def test_a_gguf_export_tells_what_it_has_no_place_for(embedder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from formats.gguf.test_export import save_model
    from tiny_gguf import export_gguf, quantize

    model = save_model(tmp_path / "llama", "llama")
    for name in ("modules.json", "1_Pooling/config.json"):
        write(model / name, (embedder / name).read_text())
    left = ("1_Pooling/config.json", "generation_config.json", "modules.json")
    done = export_gguf(model, tmp_path / "out")
    assert done.left == dict.fromkeys(left, "gguf has no place for it")
    assert "left out   1_Pooling/config.json: gguf has no place for it" in done.text()
    assert done.to_dict()["left"] == done.left
    out = quantize(model, tmp_path / "quantized", "q8_0")
    for finished in (done.out, out):
        report = json.loads((finished / "quantkit" / "report.json").read_text())["side_files"]
        assert report["left"] == done.left and "tokenizer.json" in report["carried"]
        assert not (finished / "modules.json").exists()


def test_plan_and_outcome_tell_what_stays(
    embedder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (embedder, "--method", "int8")
    assert jobs.command("plan", *options) == 0
    assert "left out   .cache/: hidden" in capsys.readouterr().out
    assert jobs.command("quantize", *options, "--out", tmp_path / "out", "--json") == 0
    told = json.loads(capsys.readouterr().out)["side_files"]
    assert told["left"] == LEFT and "modules.json" in told["carried"]


def test_an_output_inside_the_folder_is_not_taken_for_the_models(tmp_path: Path) -> None:
    model = jobs.build("llama", tmp_path / "model")
    before = FileSource(model).fingerprint_beside()
    out = jobs.finish(jobs.make_job(model), model / "out").out
    shutil.copytree(out, model / "other.partial")
    write(model / "out.partial.lock", "1")
    assert FileSource(model).fingerprint_beside() == before
    assert not jobs.finish(jobs.make_job(model), model / "out").written


def test_a_side_file_belongs_to_the_job_and_not_to_the_model(tmp_path: Path) -> None:
    model = jobs.build("llama", tmp_path / "model")
    which = FileSource(model).fingerprint()
    found = {FileSource(model).fingerprint_beside()}
    for content in ("a", "b"):
        write(model / "1_Pooling" / "config.json", content)
        found.add(FileSource(model).fingerprint_beside())
    write(model / "model.gguf", "left, and told in the report")
    found.add(FileSource(model).fingerprint_beside())
    assert len(found) == 4
    # An evaluation asks which model it is: a text laid beside it is no other model.
    assert FileSource(model).fingerprint() == which
    write(model / "tokenizer_config.json", "{}")
    assert FileSource(model).fingerprint() != which


def test_odd_entries_are_left_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, outside = tmp_path / "model", tmp_path / "outside.json"
    write(outside, "{}")
    write(root / "kept.json", "{}")
    (root / "inside.json").symlink_to("kept.json")
    (root / "link.json").symlink_to(outside)
    (root / "folder").symlink_to(tmp_path)
    (root / "dangling.json").symlink_to("nowhere")
    os.mkfifo(root / "pipe.json")
    write(root / "pointer.png", LFS.decode())
    write(root / "big.json", "x" * 101)
    write(root / "new\nline.json", "{}")
    write(root / "/".join(["deep"] * 17) / "a.json", "{}")
    monkeypatch.setattr(quantkit.checkpoint.sidefiles, "LIMIT", 100)
    found = find_side_files(root, ())
    assert list(found.carried) == ["inside.json", "kept.json"]
    assert found.left == {
        "'new\\nline.json'": "a name with characters that cannot be printed",
        "big.json": "too large: 101 B; files up to 100 B travel",
        "dangling.json": "not a plain file",
        "deep/" * 17: "too deep",
        "folder/": "a link to a folder",
        "link.json": "a link that leads out of the model's folder",
        "pipe.json": "not a plain file",
        "pointer.png": "a Git-LFS pointer, not the file",
    }


def test_files_beyond_a_models_number_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        write(tmp_path / f"{number}.txt", "")
    monkeypatch.setattr(quantkit.checkpoint.sidefiles, "_MOST_FILES", 3)
    with pytest.raises(CheckpointError, match="more than 3 files"):
        find_side_files(tmp_path, ())


MODULES: dict[str, tuple[Any, list[str]]] = {
    "as saved": (EMBEDDER["modules.json"], ["1_Pooling", "2_Dense", "3_Dense", "4_Normalize"]),
    "paths that leave": ([{"path": "../x"}, {"path": "/etc"}, {"path": "*"}, {"path": 3}], []),
    "no list": ({"path": "1_Pooling"}, []),
    "no object": (["1_Pooling"], []),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_folders_of_the_model(tmp_path: Path, name: str) -> None:
    content, paths = MODULES[name]
    assert module_paths(tmp_path) == []
    write(tmp_path / "modules.json", json.dumps(content))
    assert module_paths(tmp_path) == paths
