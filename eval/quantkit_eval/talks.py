"""Conversations with images to evaluate on: what comes with them, and which tokens are answers.

Shapes: T tokens.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor

from quantkit.calibration.data.corpora import open_corpus
from quantkit.calibration.data.images import Pictured, pack_talks
from quantkit.checkpoint.processor import Talk, has_processor, load_processor, processed
from quantkit.checkpoint.source import Source
from quantkit.errors import CalibrationError
from quantkit.model import skeleton
from quantkit.model.towers.loaded import PIXELS
from quantkit_eval.errors import EvaluationError
from quantkit_eval.records import Fact, TextUsed
from quantkit_eval.sequences import Scored
from quantkit_eval.texts import MAX_CHARACTERS, details_of
from quantkit_eval.windows import Protocol

_ANSWERS = "assistant"


@dataclass(frozen=True, kw_only=True)
class Talks:
    """Conversations as sequences, of which the answers' tokens are scored; what comes with them.

    prompt   number of a conversation -> a model's inputs up to where its first answer begins
    """

    sequences: tuple[Scored, ...]
    pictured: Pictured
    text: TextUsed
    prompt: Callable[[int], Mapping[str, Tensor]]


def read_talks(
    spec: str,
    source: Source,
    tokenizer: Any,
    *,
    most: int,
    seq_len: int,
    trust_remote_code: bool = False,
) -> Talks | None:
    """The first `most` conversations with images of a source that `--calib` takes too.

    Those of more than `seq_len` tokens are left out, which the text's facts say.  None if the
    source holds no images, or the model reads none.  Raises EvaluationError for images that cannot
    be read, and conversations without an answer.
    """
    if spec == "demo" or spec.endswith(".txt") or not has_processor(source):
        return None
    try:
        corpus = open_corpus(
            spec,
            column=None,
            seed=None,
            prefer_messages=True,
            max_characters=MAX_CHARACTERS,
            images=True,
        )
        first = next(corpus.documents, None)
        if not isinstance(first, Talk):
            return None
        model = skeleton.build(source, trust_remote_code=trust_remote_code, dtype=None)
        takes = tuple(inspect.signature(model.forward).parameters)
        if PIXELS not in takes:
            return None
        processor = load_processor(source, trust_remote_code=trust_remote_code)
        found = pack_talks(
            corpus,
            chain([first], corpus.documents),
            processor,
            takes,
            samples=most,
            least=1,
            seq_len=seq_len,
        )
        where = corpus.origin.source
        sequences = tuple(
            Scored(
                ids=tuple(row),
                spans=_answers(processor, talk, row, takes, f"{where}, conversation {number}"),
                label=f"conversation {number}",
            )
            for number, (talk, row) in enumerate(zip(found.talks, found.rows, strict=True))
        )
    except CalibrationError as error:
        raise EvaluationError(f"--text: {str(error).removeprefix('calibration ')}") from error

    def prompt(number: int) -> Mapping[str, Tensor]:
        messages = found.talks[number].messages
        end = next(k for k, m in enumerate(messages) if k and m["role"] == _ANSWERS)
        return processed(processor, Talk(messages=messages[:end]), takes, where, reply=True)

    facts = {**details_of(corpus.origin), "images": str(found.pictured.images)}
    if found.notes:
        facts["left out"] = "; ".join(found.notes)
    return Talks(
        sequences=sequences,
        pictured=found.pictured,
        text=TextUsed(
            source=where,
            sha256=hashlib.sha256(f"{found.rows} {found.pictured.digest}".encode()).hexdigest(),
            facts=tuple(Fact(name=name, value=value) for name, value in facts.items()),
            protocol=_protocol(where, sequences, tokenizer),
        ),
        prompt=prompt,
    )


def _answers(
    processor: Any, talk: Talk, ids: Sequence[int], takes: Collection[str], where: str
) -> tuple[tuple[int, int], ...]:
    """Where the answers' tokens are: from where a template asks for one to where it ends.

    Templates write what is before an answer as they write the whole, up to there.  Raises
    EvaluationError if there are none.
    """
    spans: list[tuple[int, int]] = []
    last = len(talk.messages) - 1
    for number, message in enumerate(talk.messages):
        if message["role"] != _ANSWERS or number == 0:
            continue
        begin = _agreed(processor, talk.messages[:number], ids, takes, where, reply=True)
        end = len(ids)
        if number < last:
            end = _agreed(processor, talk.messages[: number + 1], ids, takes, where, reply=False)
        begin = max(begin, spans[-1][1] if spans else 1)
        if begin < end:
            spans.append((begin, end))
    if not spans:
        raise EvaluationError(
            f"--text: {where}: has no answer with the role {_ANSWERS!r} after what a user says; "
            "answers are what models are compared on, so give conversations that have one"
        )
    return tuple(spans)


def _agreed(
    processor: Any,
    messages: list[dict[str, Any]],
    ids: Sequence[int],
    takes: Collection[str],
    where: str,
    *,
    reply: bool,
) -> int:
    """How many tokens of the whole conversation its beginning has in common with it."""
    beginning = processed(processor, Talk(messages=messages), takes, where, reply=reply)
    found = beginning["input_ids"][0].tolist()
    pairs = enumerate(zip(found, ids, strict=False))
    shorter = min(len(found), len(ids))
    return next((k for k, (one, other) in pairs if one != other), shorter)


def _protocol(source: str, sequences: Sequence[Scored], tokenizer: Any) -> Protocol:
    longest = max(len(sequence.ids) for sequence in sequences)
    digest = hashlib.sha256(repr([sequence.ids for sequence in sequences]).encode())
    return Protocol(
        kind="conversations",
        source=source,
        tokenizer=f"{type(tokenizer).__name__}, {len(tokenizer)} tokens",
        adds_bos=sequences[0].ids[0] == tokenizer.bos_token_id,
        separator=None,
        seq_len=longest,
        stride=longest,
        windows=len(sequences),
        scored_tokens=sum(sequence.count for sequence in sequences),
        dropped_tokens=0,
        ids_sha256=digest.hexdigest(),
    )
