"""Calibration on images: conversations through the model's own processor, one to a sequence.

Letters: N sequences, T tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit_kernels.lazy import torch

from quantkit.calibration.data.documents import Corpus, Document
from quantkit.checkpoint.processor import MASK, Processor, Talk, processed
from quantkit.errors import CalibrationError

_IDS = "input_ids"


@dataclass(frozen=True, kw_only=True)
class Pictured:
    """Sequences that come with images, each at its own length.

    lengths   tokens of each
    images    how many images there are in all
    largest   bytes of the largest sequence's inputs
    digest    sha256 of all inputs beside the ids
    make      number of a sequence -> its inputs beside the ids; the same ones each time
    """

    lengths: tuple[int, ...]
    images: int
    largest: int
    digest: str
    make: Callable[[int], Mapping[str, torch.Tensor]]
    hashes: tuple[str, ...]

    def inputs(self, sequence: int) -> Mapping[str, torch.Tensor]:
        """What the model's forward takes beside the ids [1, T] of a sequence.

        Made anew, as pixels of all images would fill the memory.  Raises CalibrationError if they
        are not those of before.
        """
        found = self.make(sequence)
        if _hash(found) != self.hashes[sequence]:
            raise CalibrationError(
                f"calibration sequence {sequence}: its images are not what they were when the run "
                "was planned; leave the files alone while they are read"
            )
        return found

    def part(self, start: int, stop: int) -> Pictured:
        """What comes with the sequences start..stop, which are counted from 0 again."""
        return dataclasses.replace(
            self,
            lengths=self.lengths[start:stop],
            hashes=self.hashes[start:stop],
            make=lambda sequence: self.make(start + sequence),
        )


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Rows of ids of different lengths, what comes with them, and notes for the record.

    `talks` are the conversations that they were made of, as far as they are known.
    """

    rows: list[list[int]]
    pictured: Pictured
    notes: tuple[str, ...] = ()
    documents: int = 0
    talks: tuple[Talk, ...] = ()


def pack_talks(
    corpus: Corpus,
    documents: Iterator[Document],
    processor: Processor,
    takes: Collection[str],
    *,
    samples: int,
    seq_len: int,
    least: int | None = None,
) -> Sequences:
    """The first `samples` conversations of no more than `seq_len` tokens, which are never cut.

    Raises CalibrationError if there are fewer than `least`, of None: than `samples`.
    """
    where = f"calibration {corpus.origin.source}"
    talks: list[Talk] = []
    rows: list[list[int]] = []
    hashes: list[str] = []
    longer, largest = 0, 0
    for document in documents:
        assert isinstance(document, Talk)
        found = processed(processor, document, takes, where)
        ids = found.pop(_IDS)[0].tolist()
        if len(ids) > seq_len:
            longer += 1
            continue
        talks.append(document)
        rows.append(ids)
        hashes.append(_hash(found))
        largest = max(largest, sum(value.nbytes for value in found.values()))
        if len(talks) == samples:
            break
    if not talks and least:
        raise CalibrationError(
            f"{where} has no conversation of up to {seq_len} tokens, {longer} are longer; give a "
            "longer --seq-len, or shorter ones"
        )
    if len(talks) < (samples if least is None else least):
        raise CalibrationError(
            f"{where} has {len(talks)} conversations of up to {seq_len} tokens, {longer} are "
            f"longer, and {samples} were asked for; use --samples {max(len(talks), 1)} or fewer, a "
            "longer --seq-len, or give more of them"
        )

    def make(sequence: int) -> Mapping[str, torch.Tensor]:
        again = processed(processor, talks[sequence], takes, where)
        return {name: value for name, value in again.items() if name != _IDS}

    return Sequences(
        rows=rows,
        pictured=_pictured(rows, hashes, largest, sum(len(t.images) for t in talks), make),
        notes=_notes(longer, seq_len),
        documents=len(talks),
        talks=tuple(talks),
    )


def holds_inputs(spec: object) -> bool:
    """True for a calibration source of what a processor has made already."""
    return (
        isinstance(spec, Sequence)
        and not isinstance(spec, str)
        and bool(spec)
        and all(isinstance(one, Mapping) and _IDS in one for one in spec)
    )


def pack_inputs(
    spec: Sequence[Mapping[str, Any]], takes: Collection[str], *, samples: int, seq_len: int
) -> Sequences:
    """Sequences from a processor's outputs, one conversation [1, T] each.

    Raises CalibrationError for one that holds several, or more than `seq_len` tokens.
    """
    rows: list[list[int]] = []
    kept: list[dict[str, torch.Tensor]] = []
    for number, given in enumerate(spec[:samples]):
        ids = given[_IDS]
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or len(ids) != 1:
            raise CalibrationError(
                f"calibration entry {number}: input_ids of shape {list(getattr(ids, 'shape', ()))}"
                "; call the processor with one conversation and return_tensors='pt': [1, tokens]"
            )
        if ids.shape[1] > seq_len:
            raise CalibrationError(
                f"calibration entry {number}: {ids.shape[1]} tokens are more than the {seq_len} of "
                "--seq-len, and tokens of images cannot be cut off"
            )
        mask = given.get(MASK)
        if isinstance(mask, torch.Tensor) and not bool(mask.all()):
            raise CalibrationError(
                f"calibration entry {number}: attention_mask has zeros; call the processor without "
                "padding, one conversation at a time"
            )
        rows.append(ids[0].tolist())
        kept.append(
            {
                name: value
                for name, value in given.items()
                if isinstance(value, torch.Tensor) and name in takes and name not in (_IDS, MASK)
            }
        )
    largest = max(sum(value.nbytes for value in one.values()) for one in kept)
    images = sum(any(value.is_floating_point() for value in one.values()) for one in kept)
    notes = []
    if len(spec) > samples:
        notes.append(f"the first {samples} of {len(spec)} entries used")
    return Sequences(
        rows=rows,
        pictured=_pictured(rows, [_hash(one) for one in kept], largest, images, kept.__getitem__),
        notes=tuple(notes),
        documents=len(rows),
    )


def _pictured(
    rows: Sequence[Sequence[int]],
    hashes: Sequence[str],
    largest: int,
    images: int,
    make: Callable[[int], Mapping[str, torch.Tensor]],
) -> Pictured:
    return Pictured(
        lengths=tuple(len(row) for row in rows),
        images=images,
        largest=largest,
        digest=hashlib.sha256("".join(hashes).encode()).hexdigest(),
        make=make,
        hashes=tuple(hashes),
    )


def _notes(longer: int, seq_len: int) -> tuple[str, ...]:
    if not longer:
        return ()
    return (f"{longer} conversations of more than {seq_len} tokens left out",)


def _hash(inputs: Mapping[str, torch.Tensor]) -> str:
    """sha256 of names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name].detach().cpu().contiguous()
        digest.update(repr((name, tuple(value.shape), str(value.dtype))).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
