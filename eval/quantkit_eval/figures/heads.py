"""The output projections of streamed models: from the states that leave the last blocks to scores.

Shapes: B sequences, T tokens, H hidden size, P positions at a time, C vocabulary rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from quantkit.model.causal import CausalModel
from quantkit_eval.errors import EvaluationError
from quantkit_eval.figures.scoring import Block, PairScores, Place, Scores, accumulate, places
from quantkit_eval.sequences import Workload

# Elements of one block of logits.
_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}


class Finished(Protocol):
    """Something whose last block has run: a stream, or a branch of one."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> CausalModel: ...
    @property
    def workload(self) -> Workload: ...
    @property
    def device(self) -> str: ...

    def read(self, number: int) -> Tensor:
        """What the last block made of batch `number` [B, T, H]."""
        ...


def score(
    base: Finished,
    others: Sequence[Finished],
    *,
    head_bytes: int | None = None,
    done: Callable[[], object] = lambda: None,
) -> tuple[Scores, list[PairScores]]:
    """Scores of the base and of every other model, whose last blocks have run.

    head_bytes   of the output projections of all models together that may be in memory; None: all
    Raises EvaluationError for other vocabularies and for logits that are not finite, naming the
    model, the window and the position.
    """
    streams = [base, *others]
    vocabulary = base.model.projection.shape[0]
    for other in others:
        if other.model.projection.shape[0] != vocabulary:
            raise EvaluationError(
                f"{base.name} has {vocabulary} logits per token and {other.name} "
                f"{other.model.projection.shape[0]}; they do not belong together"
            )
    workload = base.workload
    return accumulate(
        [stream.name for stream in streams], workload, _streamed(streams, head_bytes, done)
    )


def head_passes(streams: Sequence[Finished], head_bytes: int | None) -> int:
    """How often all states are read to score them."""
    return sum(1 for _ in _ranges(streams, head_bytes))


def _ranges(streams: Sequence[Finished], head_bytes: int | None) -> Iterator[tuple[int, int]]:
    """Vocabulary rows that are in memory together."""
    vocabulary, hidden = streams[0].model.projection.shape
    row = sum(stream.model.dtype.itemsize for stream in streams) * hidden
    step = vocabulary if head_bytes is None else max(min(head_bytes // row, vocabulary), 1)
    for start in range(0, vocabulary, step):
        yield start, min(start + step, vocabulary)


def _streamed(
    streams: Sequence[Finished], head_bytes: int | None, done: Callable[[], object]
) -> Iterator[Block]:
    device = streams[0].device
    workload = streams[0].workload
    for start, stop in _ranges(streams, head_bytes):
        rows = [stream.model.head_rows(start, stop) for stream in streams]
        limit = max(1, _LOGITS[device.split(":")[0]] // (stop - start))
        for number in range(len(workload.batches)):
            states = [stream.read(number) for stream in streams]
            for place in places(workload, number, limit):
                logits = []
                for stream, hidden, head in zip(streams, states, rows, strict=True):
                    logits.append(_finish(stream, hidden, place, head, start))
                yield start, place, logits
            done()


def _finish(
    stream: Finished, hidden_BTH: Tensor, place: Place, head_VH: Tensor, start: int
) -> Tensor:
    """Logits [P, C] of the picked states, as sequences no longer than the batch's."""
    length = hidden_BTH.shape[1]
    picked_PH = hidden_BTH.flatten(0, 1)[place.states]
    count = len(picked_PH)
    rows = -(-count // length)
    padded = torch.nn.functional.pad(picked_PH, (0, 0, 0, rows * min(length, count) - count))
    hidden = padded.view(rows, -1, hidden_BTH.shape[2]).to(stream.device)
    logits: Tensor = stream.model.partial_logits(hidden, head_VH, start).flatten(0, 1)
    return logits[:count].float()
