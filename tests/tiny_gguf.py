"""Helpers for tests of GGUF files: written by the pipeline, exported, and their types counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import quantkit
from quantkit.formats.gguf.container import MODEL_FILE
from quantkit.formats.gguf.file import read_gguf
from quantkit.pipeline.export import Exported, export


def quantize(model: Path, out: Path, scheme: str, method: str = "rtn", **options: Any) -> Path:
    """`out`, where the model lies quantized into a file."""
    return quantkit.quantize(
        model, method, scheme=scheme, format="gguf", out=out, progress=False, **options
    )


def export_gguf(checkpoint: Path, out: Path, **options: Any) -> Exported:
    """The export of a checkpoint into a file."""
    return export(checkpoint, out, format_name="gguf", progress=False, **options)


def types(out: Path) -> dict[str, int]:
    """Ggml's type -> how many tensors of the file have it."""
    return dict(Counter(t.type for t in read_gguf(out / MODEL_FILE).tensors.values()))
