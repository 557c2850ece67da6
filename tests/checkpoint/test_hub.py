"""What is fetched of a repository on the Hub; nothing is asked of the Hub itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from quantkit.checkpoint.hub import download

FETCHED = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "params.json",
    "SYSTEM_PROMPT.txt",
    "LICENSE",
    "modeling_mine.py",
    "custom_generate/generate.py",
    "modules.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "2_Dense/pytorch_model.bin",
    "quantkit/folds.safetensors",
    "quantkit/source_folds.safetensors",
    "quantkit/report.json",
)
LEFT = (
    "README.md",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "model.gguf",
    "original/model.safetensors",
    "original/params.json",
    "onnx/model.onnx",
    "onnx/config.json",
    "fp16/model.safetensors",
    "checkpoint-500/trainer_state.json",
    "video.mp4",
    "quantkit/report.html",
)


def test_weights_and_what_loaders_need_are_fetched_of_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: set[str] = set()
    revisions = []
    folder = tmp_path / "0123abcd"
    folder.mkdir()

    def fetch(name: str, *, revision: str | None, **patterns: Any) -> str:
        assert name == "someone/model"
        revisions.append(revision)
        found.update(filter_repo_objects((*FETCHED, *LEFT), **patterns))
        if "modules.json" in found:
            (folder / "config.json").write_text('{"quantization_config": {}}')
            (folder / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert download("someone/model", None) == folder
    assert revisions == [None, "0123abcd"]
    assert found == set(FETCHED)
