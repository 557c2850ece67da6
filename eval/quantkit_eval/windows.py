"""Evaluation tokens: one text cut into windows, with the protocol that a number depends on.

Shapes: N windows, T tokens in each.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from quantkit_eval.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENT_SEPARATOR = "\n\n"
ProtocolKind = Literal["standard", "strided", "llama.cpp"]
KINDS: tuple[str, ...] = get_args(ProtocolKind)
# Those of text, and that of conversations with images.
UsedProtocol = Literal["standard", "strided", "llama.cpp", "conversations"]
LLAMA_CPP_CONTEXT = 512


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How windows were made; two results compare only if these are equal.

    The documents are joined by `separator` and tokenised at once with the tokenizer's own special
    tokens; the tail that fills no window is dropped.

    kind             standard: windows do not overlap, every token but a window's first is scored;
                     strided: windows start `stride` tokens apart, each scores only the tokens that
                     no earlier one has scored; llama.cpp: windows of 512 tokens do not overlap,
                     each starts with the tokenizer's BOS token if it has one that it adds, and
                     only the second half is scored; conversations: each is a window of its own,
                     of up to `seq_len` tokens, and the answers' tokens are scored
    dropped_tokens   tokens of the text beyond the last window, or beyond the number asked for
    tokenizer        class, and how many tokens it knows
    adds_bos         whether the tokenizer puts a BOS token before the text
    """

    kind: UsedProtocol
    source: str
    tokenizer: str
    adds_bos: bool
    separator: str | None
    seq_len: int
    stride: int
    windows: int
    scored_tokens: int
    dropped_tokens: int
    ids_sha256: str

    @property
    def cut(self) -> str:
        """In what the text was cut, in words."""
        if self.kind == "conversations":
            return f"the answers of {self.windows} conversations of up to {self.seq_len} tokens"
        return f"{self.windows} windows of {self.seq_len}, {self.kind} protocol"

    def to_dict(self) -> dict[str, Any]:
        """The protocol as JSON types."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """ids int64 [N, T] on the CPU; `first` is each window's first scored token; the protocol."""

    ids: Tensor
    first: tuple[int, ...]
    protocol: Protocol


def text_windows(
    text: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    max_tokens: int | None = None,
    max_windows: int | None = None,
    source: str = "text",
    kind: ProtocolKind = "standard",
    stride: int | None = None,
    separator: str = DOCUMENT_SEPARATOR,
) -> Windows:
    """Windows of a text or of documents: the first `max_windows`, of the first `max_tokens` tokens.

    `stride` belongs to the strided protocol (default: half a window); llama.cpp fixes `seq_len`.
    Raises EvaluationError if the text does not fill one window.
    """
    joined = text if isinstance(text, str) else separator.join(text)
    ids: list[int] = tokenizer(joined, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
    kept = ids if max_tokens is None else ids[:max_tokens]
    found = _cut(
        kept,
        LLAMA_CPP_CONTEXT if kind == "llama.cpp" else seq_len,
        source=source,
        tokenizer=f"{type(tokenizer).__name__}, {len(tokenizer)} tokens",
        adds_bos=adds_bos,
        separator=None if isinstance(text, str) else separator,
        kind=kind,
        stride=stride,
        max_windows=max_windows,
        total=len(ids),
    )
    if kind == "llama.cpp" and adds_bos:
        found.ids[:, 0] = bos
        protocol = dataclasses.replace(found.protocol, ids_sha256=_sha256(found.ids))
        return dataclasses.replace(found, protocol=protocol)
    return found


def token_windows(ids_NT: Tensor, *, source: str = "token ids") -> Windows:
    """Windows from token ids [N, T], as they are."""
    if ids_NT.dim() != 2 or ids_NT.shape[0] < 1 or ids_NT.shape[1] < 2:
        raise EvaluationError(
            f"evaluation token ids of shape {tuple(ids_NT.shape)}; "
            "[windows, tokens] with at least 2 tokens is needed"
        )
    flat: list[int] = ids_NT.flatten().tolist()
    return _cut(
        flat,
        ids_NT.shape[1],
        source=source,
        tokenizer="none",
        adds_bos=False,
        separator=None,
        kind="standard",
        stride=None,
        max_windows=None,
        total=len(flat),
    )


def _cut(
    ids: Sequence[int],
    seq_len: int,
    *,
    source: str,
    tokenizer: str,
    adds_bos: bool,
    separator: str | None,
    kind: ProtocolKind,
    stride: int | None,
    max_windows: int | None,
    total: int,
) -> Windows:
    if kind not in KINDS:
        raise EvaluationError(f"protocol {kind!r} is unknown; use one of {', '.join(KINDS)}")
    if seq_len < 2:
        raise EvaluationError(f"seq_len {seq_len}: a window needs at least 2 tokens")
    if max_windows is not None and max_windows < 1:
        raise EvaluationError(f"--windows {max_windows}: at least 1 window is needed")
    if stride is not None and kind != "strided":
        raise EvaluationError(f"--stride belongs to --protocol strided, not to {kind}")
    step = seq_len if kind != "strided" else stride or max(seq_len // 2, 1)
    if not 1 <= step <= seq_len:
        raise EvaluationError(f"--stride {step}: from 1 to the window's {seq_len} tokens")
    count = 0 if len(ids) < seq_len else (len(ids) - seq_len) // step + 1
    if count == 0:
        raise EvaluationError(
            f"{source} has {len(ids)} tokens, one window needs {seq_len}; "
            "give more text or a shorter --seq-len"
        )
    count = count if max_windows is None else min(count, max_windows)
    rows = [ids[start : start + seq_len] for start in range(0, count * step, step)]
    ids_NT = torch.tensor(rows, dtype=torch.int64)
    first = [1] * count
    if kind == "strided":
        first = [1, *[max(seq_len - step, 1)] * (count - 1)]
    elif kind == "llama.cpp":
        first = [seq_len // 2 + 1] * count
    protocol = Protocol(
        kind=kind,
        source=source,
        tokenizer=tokenizer,
        adds_bos=adds_bos,
        separator=separator,
        seq_len=seq_len,
        stride=step,
        windows=count,
        scored_tokens=sum(seq_len - start for start in first),
        dropped_tokens=total - ((count - 1) * step + seq_len),
        ids_sha256=_sha256(ids_NT),
    )
    return Windows(ids=ids_NT, first=tuple(first), protocol=protocol)


def _sha256(ids_NT: Tensor) -> str:
    return hashlib.sha256(ids_NT.numpy().astype("<i8").tobytes()).hexdigest()
