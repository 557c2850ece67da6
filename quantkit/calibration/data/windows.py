"""Windows of full length from documents.  Shapes: N windows, T tokens in each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantkit_kernels.lazy import torch

from quantkit.calibration.data.documents import Corpus, Document
from quantkit.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# Cutting a text can change the tokens just before the cut; this many are not relied upon.
_CUT_MARGIN_TOKENS = 256
_CHARACTERS_PER_TOKEN = 6
_WORD = "word"


@dataclass(frozen=True, kw_only=True)
class Packed:
    """ids int64 [N, T], mask bool [N, T]; documents used, and how many repeat an earlier one."""

    ids: Tensor
    mask: Tensor
    documents: int
    repeated: int = 0
    chat_template: bool = False
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True)
class _Seen:
    documents: int = 0
    repeated: int = 0
    hashes: set[bytes] = field(default_factory=set)

    def add(self, document: Document) -> None:
        raw = document if isinstance(document, str) else json.dumps(document, default=str)
        digest = hashlib.sha256(raw.encode("utf-8", "surrogatepass")).digest()
        self.documents += 1
        self.repeated += digest in self.hashes
        self.hashes.add(digest)


def pack(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    pad_id: int,
    *,
    framed: bool = False,
) -> Packed:
    """The first `samples` windows of the corpus.

    Texts: all tokens one after the other, an eos after each document, cut every seq_len tokens;
    `framed`: no special tokens between documents, but around each window, as of a text by itself.
    Messages: a conversation is never split if it fits into a window; the rest is padding.
    Raises CalibrationError if there is too little text.
    """
    seen = _Seen()
    first = next(corpus.documents, None)
    if first is None:
        raise CalibrationError(f"calibration {corpus.origin.source}: every document is empty")
    documents = _chain(first, corpus.documents)
    if isinstance(first, str):
        rows = _text_windows(corpus, documents, tokenizer, samples, seq_len, seen, framed=framed)
    else:
        rows = _message_windows(corpus, documents, tokenizer, samples, seq_len, seen)
    packed = padded(rows, seq_len, pad_id)
    return Packed(
        ids=packed.ids,
        mask=packed.mask,
        documents=seen.documents,
        repeated=seen.repeated,
        chat_template=not isinstance(first, str),
    )


def pack_token_rows(rows: Any, samples: int, seq_len: int, pad_id: int) -> Packed:
    """Windows from token ids: a tensor [N, T], or rows of any length, padded on the right.

    Rows beyond `samples` and tokens beyond `seq_len` are left out, with a note.
    """
    if isinstance(rows, torch.Tensor) and rows.dim() != 2:
        raise CalibrationError(
            f"calibration token ids of shape {tuple(rows.shape)}; [windows, tokens] is needed"
        )
    as_lists = [_token_row(row, index) for index, row in enumerate(rows)]
    if not as_lists:
        raise CalibrationError("calibration token ids hold no rows")
    notes = []
    if len(as_lists) > samples:
        notes.append(f"the first {samples} of {len(as_lists)} rows of token ids used")
    longest = max(len(row) for row in as_lists)
    if longest > seq_len:
        notes.append(f"rows of up to {longest} token ids cut to {seq_len}")
    kept = [row[:seq_len] for row in as_lists[:samples]]
    packed = padded(kept, max(len(row) for row in kept), pad_id)
    return Packed(ids=packed.ids, mask=packed.mask, documents=len(kept), notes=tuple(notes))


def _token_row(row: Any, index: int) -> list[int]:
    if isinstance(row, torch.Tensor):
        # Other tools hand over rows as [1, T].
        row = row.squeeze(0).tolist() if row.dim() in (1, 2) else row.tolist()
    row = [row] if isinstance(row, int) else list(row)
    if not row or not all(isinstance(token, int) for token in row):
        raise CalibrationError(f"calibration token ids, row {index}: one or more integers needed")
    return row


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, count: int, *, special: bool = True
) -> list[int]:
    """The first `count` ids of tokenizer(text), without tokenizing all of a long text.

    `special`: with the special tokens that the tokenizer adds.
    """

    def ids_of(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    length = _CHARACTERS_PER_TOKEN * (count + _CUT_MARGIN_TOKENS)
    while length < len(text):
        ids = ids_of(text[:length])
        if len(ids) >= count + _CUT_MARGIN_TOKENS:
            return ids[:count]
        length *= 2
    return ids_of(text)[:count]


def special_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text."""
    inner = first_tokens(tokenizer, _WORD, _CUT_MARGIN_TOKENS, special=False)
    whole = first_tokens(tokenizer, _WORD, _CUT_MARGIN_TOKENS)
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    raise CalibrationError(
        f"the tokenizer writes {_WORD!r} as {inner}, and with special tokens as {whole}, which "
        "does not hold it; give token ids through the Python API"
    )


def _text_windows(
    corpus: Corpus,
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seen: _Seen,
    *,
    framed: bool,
) -> list[list[int]]:
    before, after = special_frame(tokenizer) if framed else ([], [])
    room = seq_len - len(before) - len(after)
    if room < 1:
        raise CalibrationError(
            f"--seq-len {seq_len}: the tokenizer puts {seq_len - room} special tokens around a "
            "text; give more"
        )
    needed = samples * room
    stream: list[int] = []
    for document in documents:
        if not isinstance(document, str):
            raise CalibrationError(
                f"calibration {corpus.origin.source} mixes texts and messages; use one of them"
            )
        seen.add(document)
        stream += first_tokens(tokenizer, document, needed - len(stream), special=not framed)
        if len(stream) >= needed:
            pieces = (stream[i : i + room] for i in range(0, needed, room))
            return [[*before, *piece, *after] for piece in pieces]
        eos = None if corpus.one_text or framed else tokenizer.eos_token_id
        # Some tokenizers end every text with an eos themselves.
        if eos is not None and stream[-1:] != [eos]:
            stream.append(int(eos))
    raise _too_little(corpus, len(stream), len(stream) // room, samples, seq_len, seen)


def _message_windows(
    corpus: Corpus,
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seen: _Seen,
) -> list[list[int]]:
    if not tokenizer.chat_template:
        raise CalibrationError(
            f"calibration {corpus.origin.source} holds messages, and the tokenizer has no chat "
            "template; use a text column (SOURCE#column) or a tokenizer with a chat template"
        )
    parts = _takes_parts(tokenizer)
    full: list[list[int]] = []
    window: list[int] = []
    total = 0
    for document in documents:
        ids = _conversation_ids(corpus, tokenizer, document, parts=parts)
        seen.add(document)
        total += len(ids)
        if window and len(window) + len(ids) > seq_len:
            full.append(window)
            window = []
        window += ids
        while len(window) >= seq_len:
            full.append(window[:seq_len])
            window = window[seq_len:]
        if len(full) >= samples:
            return full[:samples]
    if window:
        full.append(window)
    if len(full) < samples:
        raise _too_little(corpus, total, len(full), samples, seq_len, seen)
    return full[:samples]


def _conversation_ids(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, document: Document, *, parts: bool
) -> list[int]:
    if not isinstance(document, list):
        raise CalibrationError(
            f"calibration {corpus.origin.source} mixes texts and messages; use one of them"
        )
    if parts:
        document = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            else message
            for message in document
        ]
    try:
        text = tokenizer.apply_chat_template(document, tokenize=False)
    except Exception as error:
        # Templates are programs that come with the model; they refuse in any way they like.
        roles = ", ".join(str(message.get("role")) for message in document)
        raise CalibrationError(
            f"calibration {corpus.origin.source}: the chat template refuses a conversation with "
            f"roles {roles}: {error}"
        ) from error
    # The template has written the special tokens itself.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the chat template writes a message's text only where it is a list of parts."""
    word = "quantkit"

    def writes(content: Any) -> bool:
        try:
            told = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False
            )
        # Templates are programs that come with the model; they refuse in any way they like.
        except Exception:
            return False
        return word in str(told)

    return not writes(word) and writes([{"type": "text", "text": word}])


def padded(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> Packed:
    """Windows of one length from rows that are no longer."""
    ids_NT = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask_NT = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids_NT[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask_NT[index, : len(row)] = True
    return Packed(ids=ids_NT, mask=mask_NT, documents=len(rows))


def _too_little(
    corpus: Corpus, tokens: int, windows: int, samples: int, seq_len: int, seen: _Seen
) -> CalibrationError:
    way_out = f"use --samples {windows} or fewer" if windows else "use a shorter --seq-len"
    return CalibrationError(
        f"calibration {corpus.origin.source} has too little text: {tokens} tokens in "
        f"{seen.documents} document(s) fill {windows} windows of {seq_len} tokens, and {samples} "
        f"({samples * seq_len} tokens) were asked for; {way_out}, or give more text"
    )


def _chain(first: Document, rest: Iterator[Document]) -> Iterator[Document]:
    yield first
    yield from rest
