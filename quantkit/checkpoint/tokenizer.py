"""The tokenizer that belongs to a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quantkit.checkpoint.door import TOKENIZER_BYTES, parse_json, read_plain
from quantkit.checkpoint.source import Source
from quantkit.errors import CalibrationError

_CONFIG, _TEMPLATES = "tokenizer_config.json", "additional_chat_templates/"
_WEIGHTS = (".safetensors", ".bin")


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The transformers tokenizer of a checkpoint, from the side files that one reads.

    Raises CalibrationError if the checkpoint has none that works, or one with code of its own that
    is not trusted.
    """
    from transformers import AutoTokenizer

    contents = tokenizer_files(source)
    code = _own_code(contents)
    # A file that holds its vocabulary itself is read by transformers.
    held = getattr(source, "path", None) if source.tokens() is not None else None
    with folder_of(contents) as folder:
        try:
            if held is not None:
                found = AutoTokenizer.from_pretrained(held.parent, gguf_file=held.name)
            else:
                found = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
            # Values of the wrong type show at the first use only.
            found.decode(found("a word", verbose=False)["input_ids"])
            return found
        # Rust code panics with an exception beside Exception; files from outside bring out any.
        except BaseException as error:
            if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
                raise
            if code is not None and not trust_remote_code:
                raise CalibrationError(
                    f"the model's tokenizer has code of its own ({code}); pass --trust-remote-code "
                    "if you trust it"
                ) from error
            home = source.home or "the model"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CalibrationError(
                f"the model's tokenizer cannot be loaded ({reason.replace(folder, str(home))}); "
                "put its tokenizer files beside config.json, or give token ids through the Python "
                "API"
            ) from error


def tokenizer_files(source: Source) -> dict[str, bytes]:
    """The side files that a tokenizer or a processor may read."""
    return {
        name: read_plain(content, largest=TOKENIZER_BYTES) if isinstance(content, Path) else content
        for name, content in source.side_files().items()
        if not name.endswith(_WEIGHTS) and ("/" not in name or name.startswith(_TEMPLATES))
    }


@contextmanager
def folder_of(contents: Mapping[str, bytes]) -> Iterator[str]:
    """A folder that holds these files, for a while."""
    with TemporaryDirectory() as folder:
        for name, content in contents.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        yield folder


def _own_code(contents: Mapping[str, bytes]) -> str | None:
    """What tokenizer_config.json names as the tokenizer's own code; None if it names none."""
    if _CONFIG not in contents:
        return None
    found = parse_json(contents[_CONFIG], _CONFIG, wide=True, error=CalibrationError).get(
        "auto_map"
    )
    if isinstance(found, dict):
        found = found.get("AutoTokenizer")
    names = found if isinstance(found, list) else [found]
    return next((name for name in names if isinstance(name, str)), None)
