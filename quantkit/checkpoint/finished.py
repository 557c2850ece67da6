"""Telling a finished checkpoint from one that a run has not completed."""

from __future__ import annotations

from pathlib import Path

from quantkit.checkpoint.manifest import MANIFEST
from quantkit.errors import CheckpointError


def refuse_unfinished(path: Path) -> None:
    """Raises CheckpointError if the directory is an output that was never finished."""
    partial = path.with_name(path.name + ".partial")
    if not path.exists() and partial.is_dir():
        raise CheckpointError(
            f"{path}: not there yet: {partial.name} is unfinished; run the quantize command again "
            "to finish it"
        )
    unsealed = (path / "quantkit").is_dir() and not (path / MANIFEST).is_file()
    if path.name.endswith(".partial") or (path / ".scratch").exists() or unsealed:
        raise CheckpointError(
            f"{path}: an unfinished output; run the quantize command again to finish it"
        )
