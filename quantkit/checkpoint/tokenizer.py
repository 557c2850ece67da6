"""The tokenizer that belongs to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quantkit.checkpoint.source import Source
from quantkit.errors import CalibrationError


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The transformers tokenizer of a checkpoint, from its side files.

    Raises CalibrationError if the checkpoint has none that works.
    """
    from transformers import AutoTokenizer

    with TemporaryDirectory() as folder:
        for name, content in source.side_files().items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CalibrationError(
                f"the model's tokenizer cannot be loaded ({str(error).splitlines()[0]}); put its "
                "tokenizer files beside config.json, or give token ids through the Python API"
            ) from error
