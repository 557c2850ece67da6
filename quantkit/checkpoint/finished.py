"""Telling a finished checkpoint from one that a run has not completed."""

from __future__ import annotations

import os
from pathlib import Path

from quantkit.checkpoint.door import given_path
from quantkit.checkpoint.manifest import MANIFEST
from quantkit.errors import CheckpointError


def refuse_unfinished(path: str | os.PathLike[str]) -> None:
    """Raises CheckpointError if the directory is an output that was never finished.

    A path that is none, such as a name on the Hub, is left to others.  What a directory holds says
    so, not what it is called: the manifest comes last, and with it one is finished even if someone
    renamed it.
    """
    path = given_path(path)
    named = Path(os.path.abspath(path))
    partial = Path(f"{named}.partial")
    if not path.exists() and partial.is_dir():
        raise CheckpointError(
            f"{path}: not there yet: {partial.name} is unfinished; run the quantize command again "
            "to finish it"
        )
    begun = named.name.endswith(".partial") or (path / "quantkit").is_dir()
    if (path / ".scratch").exists() or (begun and not (path / MANIFEST).is_file()):
        raise CheckpointError(
            f"{path}: an unfinished output; run the quantize command again to finish it"
        )
