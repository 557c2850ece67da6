"""What models are run on: token sequences, padded into batches, each with a scored end.

Shapes: B sequences in a batch, T tokens, S scored tokens in all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.calibration.data.images import Pictured
from quantkit_eval.errors import EvaluationError

# Tokens in one batch: a function of nothing else, so that a memory budget changes no number.
BATCH_TOKENS = 2048
# Lengths are padded to a multiple of this, so that few shapes of attention masks are needed.
_PAD = 16


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A token sequence of which those at positions start..stop of `spans` are predicted.

    Spans are in order, none is empty.  `label` names the sequence in errors, as in "window 3".
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    label: str

    def __post_init__(self) -> None:
        places = [0, *(place for span in self.spans for place in span)]
        assert self.spans and places[1] >= 1, "a scored token needs one before it"
        assert sorted(places) == places and places[-1] <= len(self.ids)

    @property
    def count(self) -> int:
        """Scored tokens."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def positions(self) -> Tensor:
        """Where the scored tokens are, int64 [count]."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.spans])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """ids int64 [B, T]; of row b the sequence `members[b]`; padding stands at the end.

    `pictured`: the one sequence comes with its images, unpadded.
    """

    ids: Tensor
    members: tuple[int, ...]
    pictured: bool = False


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sequences and how they are batched; `offsets[k]` is where sequence k's scores begin.

    `pictured` holds what comes with the first of them, if that is conversations with images.
    """

    sequences: tuple[Scored, ...]
    batches: tuple[Batch, ...]
    offsets: tuple[int, ...]
    pictured: Pictured | None = None

    @functools.cached_property
    def targets(self) -> Tensor:
        """The tokens that followed, int32 [S] in the order of all scores."""
        found = [torch.tensor(s.ids, dtype=torch.int32)[s.positions] for s in self.sequences]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int32)

    @property
    def scored_tokens(self) -> int:
        """Scored tokens of all sequences."""
        return sum(sequence.count for sequence in self.sequences)

    @property
    def tokens(self) -> int:
        """Tokens that models run on, padding included."""
        return sum(batch.ids.numel() for batch in self.batches)

    def slice(self, index: int) -> slice:
        """Where the scores of a sequence are."""
        return slice(self.offsets[index], self.offsets[index] + self.sequences[index].count)

    def inputs(self, batch: Batch) -> Mapping[str, Tensor] | None:
        """What a model takes beside the ids of a batch with images, None for one without."""
        if not batch.pictured:
            return None
        assert self.pictured is not None
        return self.pictured.inputs(batch.members[0])


def make_workload(
    sequences: Iterable[Scored],
    *,
    max_length: int | None = None,
    pictured: Pictured | None = None,
) -> Workload:
    """Sequences of about the same length together, padded at the end.

    Padding is never seen by the tokens before it: models are causal.  Those of `pictured`, which
    come first, are batches by themselves.  `max_length` are the positions a model has.  Raises
    EvaluationError for a sequence that is longer.
    """
    found = tuple(sequences)
    for sequence in found:
        if max_length is not None and len(sequence.ids) > max_length:
            raise EvaluationError(
                f"{sequence.label}: {len(sequence.ids)} tokens, the model has {max_length} "
                "positions; give shorter windows (--seq-len) or shorter task prompts"
            )
    counts = [sequence.count for sequence in found]
    lengths = [_padded(sequence, max_length) for sequence in found]
    alone = 0 if pictured is None else min(len(pictured.lengths), len(found))
    batches = [
        Batch(ids=torch.tensor([found[k].ids]), members=(k,), pictured=True)
        for k in sorted(range(alone), key=lambda k: (-len(found[k].ids), k))
    ]
    order = sorted(range(alone, len(found)), key=lambda k: (-lengths[k], k))
    for length, group in itertools.groupby(order, key=lambda k: lengths[k]):
        members = list(group)
        size = max(1, BATCH_TOKENS // length)
        for start in range(0, len(members), size):
            batches.append(_batch(found, members[start : start + size], length))
    offsets = tuple(itertools.accumulate(counts[:-1], initial=0)) if counts else ()
    return Workload(sequences=found, batches=tuple(batches), offsets=offsets, pictured=pictured)


def _padded(sequence: Scored, max_length: int | None) -> int:
    length = -(-len(sequence.ids) // _PAD) * _PAD
    return length if max_length is None else min(length, max_length)


def _batch(sequences: Sequence[Scored], members: Sequence[int], length: int) -> Batch:
    ids_BT = torch.zeros(len(members), length, dtype=torch.int64)
    for row, member in enumerate(members):
        ids = sequences[member].ids
        ids_BT[row, : len(ids)] = torch.tensor(ids)
    return Batch(ids=ids_BT, members=tuple(members))
