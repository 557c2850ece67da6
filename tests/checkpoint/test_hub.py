"""What is fetched of a repository on the Hub; nothing is asked of the Hub itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from quantkit.checkpoint.hub import download

FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "modeling_mine.py",
    "pytorch_model.bin",
    "original/model.safetensors",
    "quantkit/folds.safetensors",
    "quantkit/source_folds.safetensors",
    "quantkit/report.json",
    "quantkit/report.html",
)


def test_weights_configs_and_what_was_folded_are_fetched_of_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: set[str] = set()
    revisions = []

    def fetch(name: str, *, revision: str | None, **patterns: Any) -> str:
        assert name == "someone/model"
        revisions.append(revision)
        found.update(filter_repo_objects(FILES, **patterns))
        return str(tmp_path / "0123abcd")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert download("someone/model", None, False) == tmp_path / "0123abcd"
    assert revisions == [None, "0123abcd"]
    left = {"modeling_mine.py", "pytorch_model.bin", "original/model.safetensors"}
    assert found == set(FILES) - left - {"quantkit/report.html"}
