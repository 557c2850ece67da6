"""The checkpoints an evaluation is about: opened, identified, and checked to belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.checkpoint.door import file_sha256
from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.output import refuse_unfinished
from quantkit.checkpoint.record import read_report
from quantkit.checkpoint.source import Source
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.checks.against import Vectors, vectors_since
from quantkit.errors import CheckpointError
from quantkit.formats.describe import describe, describe_source
from quantkit.formats.open import open_source
from quantkit.model.decoded import Decoded, open_decoded
from quantkit_eval.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """A weight file and its hash."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What exactly was measured.

    fingerprint   of config, tensors and side files, however they are split into shards
    """

    name: str
    dtype: str
    weight_bytes: int
    bits_per_weight: float
    method: str | None
    scheme: str | None
    format: str | None
    fingerprint: str
    files: tuple[ShardFile, ...]
    recipe: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A checkpoint: `source` as it is read, `recorded` its quantization report if it has one."""

    name: str
    source: Source
    recorded: dict[str, Any] | None
    vectors: Vectors
    identity: Identity

    @property
    def comparable(self) -> str | None:
        """None if its weights can be held against the original's one by one, else why not."""
        if not isinstance(self.source, Decoded):
            return "the checkpoint is not quantized"
        if self.recorded is None:
            return (
                "no quantization report lies beside the weights, so it is unknown what scales were "
                "folded into them"
            )
        return None


def open_original(
    path: str, *, name: str | None = None, trust_remote_code: bool = False
) -> Subject:
    """The original model.  Raises EvaluationError if it is a quantized one."""
    subject = _open(path, None, name=name, trust_remote_code=trust_remote_code)
    if isinstance(subject.source, Decoded):
        raise EvaluationError(
            f"{path}: is quantized itself; give the original model first, then what was made of it"
        )
    return subject


def open_subject(
    path: str, original: Subject, *, name: str | None = None, trust_remote_code: bool = False
) -> Subject:
    """What was made of an original, quantized or not; reads its headers and hashes its shards."""
    return _open(path, original.source, name=name, trust_remote_code=trust_remote_code)


def _open(
    path: str, original: Source | None, *, name: str | None, trust_remote_code: bool
) -> Subject:
    refuse_unfinished(path)
    source = open_source(path)
    if source.home is None:
        raise CheckpointError(f"{path}: give a directory, a file or a name on the Hub")
    recorded = read_report(source.home) or None
    view = open_decoded(source, trust_remote_code=trust_remote_code)
    return Subject(
        name=name or Path(path).name or path,
        source=view,
        recorded=recorded,
        vectors=Vectors({}) if original is None else vectors_since(view, original, recorded or {}),
        identity=_identity(name or Path(path).name or path, source, view, recorded),
    )


def check_source(
    original: Subject,
    quantized: Subject,
    tokenizer: PreTrainedTokenizerBase,
    *,
    any_base: bool = False,
) -> None:
    """Raises EvaluationError unless `quantized` was made from `original`, tokenizer included.

    any_base: do not ask what it was made from.
    """
    if quantized.recorded is not None and not any_base:
        made_from = (quantized.recorded.get("fingerprint") or {}).get("model")
        if made_from is not None and made_from != original.identity.fingerprint:
            raise EvaluationError(
                f"{quantized.name}: was made from another model than {original.name}: its report "
                f"says {made_from[:12]}..., the original's fingerprint is "
                f"{original.identity.fingerprint[:12]}...; give the model it was made from, or "
                "--any-base if you know better (a model that was quantized in memory)"
            )
    held = quantized.source.tokens()
    if held is not None:
        difference = vocabulary_difference(tokenizer, held)
    else:
        difference = tokenizer_difference(tokenizer, load_tokenizer(quantized.source))
    if difference:
        raise EvaluationError(
            f"{quantized.name}: its tokenizer differs from that of {original.name}: {difference}; "
            "numbers of two tokenizers cannot be compared: put the original's tokenizer files in "
            "its directory"
        )


def vocabulary_difference(tokenizer: Any, held: Sequence[str]) -> str | None:
    """How a tokenizer's tokens differ from those that a file holds in order, None if none does."""
    mine = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), len(held)))))
    for number, (own, other) in enumerate(zip(mine, held, strict=False)):
        if own is not None and own != other:
            return f"token {number} is {other!r}, not {own!r}"
    if len(held) < len(tokenizer):
        return f"{len(held)} tokens, not {len(tokenizer)}"
    return None


def tokenizer_difference(first: Any, second: Any) -> str | None:
    """How two tokenizers differ, None if they give the same tokens."""
    mine, its = first.get_vocab(), second.get_vocab()
    if mine != its:
        changed = sorted(set(mine.items()) ^ set(its.items()), key=lambda pair: (pair[1], pair[0]))
        return f"{len(mine)} and {len(its)} tokens, the first that differs is {changed[0][0]!r}"
    for text in _PROBES:
        if first(text)["input_ids"] != second(text)["input_ids"]:
            return (
                f"they split {text!r} into {first(text)['input_ids']} and "
                f"{second(text)['input_ids']}"
            )
    return None


_PROBES = ("The quick brown fox.", " two  spaces\n\nand 1234567 digits", "naïve café, 漢字 🙂")


def weight_paths(source: Source) -> list[Path]:
    """Every weight file of a checkpoint, a directory or a file of its own kind."""
    path = getattr(source, "path", None) or source.home
    assert path is not None
    if path.is_file():
        found = [path, path.with_name(f"{path.name}.data")]
    else:
        found = sorted(path.glob("*.safetensors"))
    return [file for file in found if file.is_file()]


def _identity(name: str, source: Source, view: Source, recorded: dict[str, Any] | None) -> Identity:
    path = getattr(source, "path", None) or source.home
    assert path is not None
    files = tuple(
        ShardFile(name=file.name, bytes=file.stat().st_size, sha256=file_sha256(file))
        for file in weight_paths(source)
    )
    found = describe_source(source) if isinstance(source, FileSource) else describe(path)
    schemes: Sequence[str] = (
        sorted({s.name for s in view.schemes.values()}) if isinstance(view, Decoded) else ()
    )
    return Identity(
        name=name,
        dtype=_main_dtype(view),
        # What is read over the network lies in no file here.
        weight_bytes=sum(file.bytes for file in files)
        or sum(source.num_bytes(tensor) for tensor in source.names()),
        bits_per_weight=found.bits_per_weight,
        method=None if recorded is None else recorded.get("method"),
        scheme=" + ".join(schemes) or None,
        format=found.format if isinstance(view, Decoded) else None,
        fingerprint=source.fingerprint(),
        files=files,
        recipe=None if recorded is None else recorded.get("recipe"),
    )


def _main_dtype(source: Source) -> str:
    sizes: dict[torch.dtype, int] = {}
    for name in source.names():
        info = source.info(name)
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return str(max(sizes, key=lambda key: sizes[key])).removeprefix("torch.")
