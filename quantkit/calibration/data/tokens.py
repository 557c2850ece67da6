"""Calibration tokens: what a method sees of the world, and the record of exactly what that was.

A source is `demo`, a file (.txt .jsonl .parquet), a saved dataset directory, a Hub dataset
(`name[@revision][:config[:split]]`), or Python objects; `SOURCE#column` names the text column.
Shapes: N windows, T tokens in each.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from quantkit_kernels.lazy import torch

from quantkit.calibration.data.corpora import open_corpus
from quantkit.calibration.data.documents import Message, Origin
from quantkit.calibration.data.images import (
    Pictured,
    Sequences,
    holds_inputs,
    pack_inputs,
    pack_talks,
)
from quantkit.calibration.data.windows import Packed, pack, pack_token_rows, padded
from quantkit.checkpoint.processor import Processor, Talk
from quantkit.errors import CalibrationError
from quantkit.methods.recipe import check_size

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# A `str` or Path is a source name; a sequence of strings is the documents themselves.
CalibrationSource: TypeAlias = (
    "str | Path | Sequence[str] | Sequence[Sequence[Message]] | Sequence[Sequence[int]] "
    "| Sequence[Tensor] | Tensor | Dataset | IterableDataset | Sequence[Mapping[str, Tensor]]"
)


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """What was used, for reports; JSON-able through `to_dict`.

    source              `demo`, a Hub name, a file name (never its directory) or `python`
    revision            Hub commit or `datasets` fingerprint, where there is one
    file_sha256         of a local file's bytes
    tokens_sha256       of ids and mask: equal hashes mean equal statistics
    documents           how many were used, `repeated_documents` of them equal to an earlier one
    tokens              how many count, padding excluded
    images              how many there were among them
    notes               what differed from the request
    """

    source: str
    config: str | None = None
    split: str | None = None
    column: str | None = None
    revision: str | None = None
    file_sha256: str | None = None
    tokens_sha256: str
    samples: int
    seq_len: int
    seed: int
    documents: int
    repeated_documents: int
    tokens: int
    chat_template: bool
    notes: tuple[str, ...] = ()
    images: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON types; `images` only where there are any."""
        found = {**dataclasses.asdict(self), "notes": list(self.notes)}
        if not self.images:
            del found["images"]
        return found


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Token windows: ids int64 [N, T], mask bool [N, T] (False: padding), and their record.

    `pictured` is what comes with each window of images, None for text alone.
    """

    ids: Tensor
    mask: Tensor
    record: CalibrationRecord
    pictured: Pictured | None = None

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.ids.shape != self.mask.shape:
            raise CalibrationError(
                f"calibration ids {tuple(self.ids.shape)} and mask {tuple(self.mask.shape)} "
                "must be two equal [windows, tokens] shapes"
            )

    @property
    def fingerprint(self) -> str:
        """sha256 of shape, ids, mask and images: the part of it that results depend on."""
        return self.record.tokens_sha256


def load_calibration(
    spec: CalibrationSource,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int,
    seq_len: int,
    seed: int = 0,
    text_column: str | None = None,
    max_length: int | None = None,
    vocab_size: int | None = None,
    images: ImageReader | None = None,
    framed: bool = False,
) -> Calibration:
    """`samples` windows of `seq_len` tokens from a source, the same ones for the same arguments.

    max_length  the model's positions: a longer seq_len is cut to it, with a note in the record
    vocab_size  the model's: a token id beyond it is an error
    tokenizer   may be None only for token ids
    framed      texts in windows of their own between the special tokens, as encoders read them
    images      how a model reads images; without it images of a source are passed over, or refused
    The packing rules are in docs/calibration.md.  Raises CalibrationError.
    """
    check_seed(seed)
    check_size(samples, seq_len)
    notes: list[str] = []
    if max_length is not None and seq_len > max_length:
        notes.append(f"seq_len {seq_len} cut to the model's {max_length} positions")
        seq_len = max_length
    if holds_token_ids(spec):
        packed = pack_token_rows(spec, samples, seq_len, _pad_id(tokenizer))
        origin = Origin(source="python")
    elif holds_inputs(spec):
        if images is None:
            raise CalibrationError(
                "calibration holds a processor's outputs, and this model's class reads no images; "
                "give texts or token ids"
            )
        found = pack_inputs(spec, images.takes, samples=samples, seq_len=seq_len)  # type: ignore[arg-type]
        return _with_images(
            found, Origin(source="python"), tokenizer, images, vocab_size, seed, notes
        )
    else:
        if tokenizer is None:
            raise CalibrationError("calibration text needs a tokenizer; give one, or token ids")
        corpus = open_corpus(
            spec,
            column=text_column,
            seed=seed,
            prefer_messages=bool(tokenizer.chat_template),
            max_characters=_MAX_CHARACTERS_PER_TOKEN * samples * seq_len,
            images=images is not None,
        )
        first = next(corpus.documents, None)
        if first is not None:
            corpus = dataclasses.replace(corpus, documents=chain([first], corpus.documents))
        if images is not None and isinstance(first, Talk):
            found = pack_talks(
                corpus,
                corpus.documents,
                images.processor(),
                images.takes,
                samples=samples,
                seq_len=seq_len,
            )
            return _with_images(found, corpus.origin, tokenizer, images, vocab_size, seed, notes)
        packed = pack(corpus, tokenizer, samples, seq_len, _pad_id(tokenizer), framed=framed)
        origin = corpus.origin
    _check_vocabulary(packed.ids, vocab_size)
    return _with_record(packed, origin, seed, [*notes, *packed.notes])


@dataclass(frozen=True, kw_only=True)
class ImageReader:
    """How a model reads images.

    processor      gives the one that belongs to it
    takes          what its forward takes by name
    placeholders   ids that stand for images in texts, which the vocabulary may lack
    """

    processor: Callable[[], Processor]
    takes: Collection[str]
    placeholders: frozenset[int] = frozenset()


def _with_images(
    found: Sequences,
    origin: Origin,
    tokenizer: PreTrainedTokenizerBase | None,
    images: ImageReader,
    vocab_size: int | None,
    seed: int,
    notes: list[str],
) -> Calibration:
    """The calibration of sequences with images, padded behind to one length."""
    longest = max(len(row) for row in found.rows)
    packed = dataclasses.replace(
        padded(found.rows, longest, _pad_id(tokenizer)),
        documents=found.documents,
        chat_template=True,
        notes=found.notes,
    )
    known = torch.tensor(sorted(images.placeholders), dtype=torch.int64)
    _check_vocabulary(packed.ids[~torch.isin(packed.ids, known)], vocab_size)
    made = _with_record(packed, origin, seed, [*notes, *packed.notes])
    digest = f"{made.record.tokens_sha256} {found.pictured.digest}"
    record = dataclasses.replace(
        made.record,
        images=found.pictured.images,
        tokens_sha256=hashlib.sha256(digest.encode()).hexdigest(),
    )
    return dataclasses.replace(made, record=record, pictured=found.pictured)


def check_seed(seed: int) -> None:
    """CalibrationError unless every generator takes the seed."""
    if not 0 <= seed < 2**63:
        raise CalibrationError(f"--seed {str(seed)[:30]}: write a whole number from 0 to 2**63 - 1")


def holds_token_ids(spec: object) -> bool:
    """True for a calibration source of token ids, which needs no tokenizer."""
    if isinstance(spec, torch.Tensor):
        return True
    if not isinstance(spec, Sequence) or isinstance(spec, str) or not spec:
        return False
    first = spec[0]
    if isinstance(first, torch.Tensor):
        return True
    return (
        isinstance(first, Sequence)
        and not isinstance(first, str)
        and bool(first)
        and not isinstance(first[0], Mapping | str)
    )


# No tokenizer packs this many characters into a token on average; bounds what is read of a text.
_MAX_CHARACTERS_PER_TOKEN = 64


def _with_record(packed: Packed, origin: Origin, seed: int, notes: list[str]) -> Calibration:
    samples, seq_len = packed.ids.shape
    record = CalibrationRecord(
        source=origin.source,
        config=origin.config,
        split=origin.split,
        column=origin.column,
        revision=origin.revision,
        file_sha256=origin.file_sha256,
        tokens_sha256=_tokens_sha256(packed.ids, packed.mask),
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        documents=packed.documents,
        repeated_documents=packed.repeated,
        tokens=int(packed.mask.sum()),
        chat_template=packed.chat_template,
        notes=tuple(notes),
    )
    return Calibration(ids=packed.ids, mask=packed.mask, record=record)


def _tokens_sha256(ids_NT: Tensor, mask_NT: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(ids_NT.shape)).encode())
    digest.update(ids_NT.to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    digest.update(mask_NT.to(torch.uint8).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    # Padding is masked everywhere, so any id the model knows will do.
    for token_id in (
        getattr(tokenizer, "pad_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        if token_id is not None:
            return int(token_id)
    return 0


def _check_vocabulary(ids_NT: Tensor, vocab_size: int | None) -> None:
    smallest, largest = int(ids_NT.min()), int(ids_NT.max())
    if smallest < 0 or (vocab_size is not None and largest >= vocab_size):
        bad = smallest if smallest < 0 else largest
        allowed = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1}"
        raise CalibrationError(
            f"calibration holds token id {bad}, the model knows {allowed}; "
            "use the tokenizer that belongs to the model"
        )
