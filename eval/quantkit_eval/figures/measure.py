"""The original and everything made of it, run side by side block by block, and scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Never

import torch
from tqdm import tqdm

from quantkit.checkpoint.memory import release_free_memory
from quantkit_eval.errors import EvaluationError
from quantkit_eval.figures.heads import head_passes, score
from quantkit_eval.figures.layers import (
    BlockCost,
    Sampler,
    WeightCost,
    block_error,
    expert_inputs,
    weigh_block,
)
from quantkit_eval.figures.scoring import PairScores, Scores
from quantkit_eval.figures.stream import ModelStream
from quantkit_eval.subjects import Subject

# Tokens of text on which weights are weighed.
_SAMPLE_TOKENS = 16_384


@dataclass(kw_only=True)
class Looked:
    """What was seen of one quantized model's blocks, in order."""

    weights: list[WeightCost] = field(default_factory=list)
    blocks: list[BlockCost] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Scores of the original and of every other model; `looked` has one entry for each."""

    base: Scores
    pairs: tuple[PairScores, ...]
    looked: tuple[Looked, ...]


def measure(
    base: ModelStream,
    others: Sequence[ModelStream],
    subjects: Sequence[Subject | None],
    *,
    head_bytes: int | None,
    progress: bool,
) -> Measured:
    """Runs all models over the workload of `base`; one block is in memory at a time.

    subjects: one for each other model; its weights are weighed against the original's where that
    is possible.  None: only scores are wanted.
    """
    for other in others:
        if other.num_blocks != base.num_blocks:
            raise EvaluationError(
                f"{base.name} has {base.num_blocks} blocks and {other.name} {other.num_blocks}; "
                "they do not belong together"
            )
    streams = [base, *others]
    looked = [Looked() for _ in others]
    batches = len(base.workload.batches)
    total = batches * (base.num_blocks * len(streams) + head_passes(streams, head_bytes))
    with tqdm(total=total, unit="batch", disable=None if progress else True) as bar:
        for stream in streams:
            stream.embed()
        for index in range(base.num_blocks):
            bar.set_description(f"block {index}")
            _block(index, base, others, subjects, looked, bar)
            release_free_memory()
        bar.set_description("logits")
        with torch.no_grad():
            scores, pairs = score(base, others, head_bytes=head_bytes, done=bar.update)
    return Measured(base=scores, pairs=tuple(pairs), looked=tuple(looked))


def _block(
    index: int,
    base: ModelStream,
    others: Sequence[ModelStream],
    subjects: Sequence[Subject | None],
    looked: Sequence[Looked],
    bar: tqdm[Never],
) -> None:
    """One block of every model; the original's first, because the others are held against it."""
    block = base.load(index)
    batches = base.workload.batches
    # Longer sequences come first: the first batches are text.
    sampled = max(1, min(len(batches), _SAMPLE_TOKENS // batches[0].ids.numel()))
    sampler = Sampler(sampled, expert_inputs(base.model.weights(index)))
    before = base.read(0)
    with base.tapped(index, block, sampler):
        for number in range(sampled):
            base.write(number, base.run(index, block, number))
            bar.update()
    for number in range(sampled, len(batches)):
        base.write(number, base.run(index, block, number))
        bar.update()
    after = base.read(0)
    samples = sampler.rows()
    with torch.no_grad():
        for subject, seen in zip(subjects, looked, strict=True):
            if subject is not None and subject.comparable is None:
                seen.weights += weigh_block(base.model, block, index, samples, subject)
    del block, samples, sampler
    for other, subject, seen in zip(others, subjects, looked, strict=True):
        theirs = other.load(index)
        if subject is not None:
            got = other.run(index, theirs, 0, before.to(other.model.dtype))
            seen.blocks.append(
                BlockCost(index=index, error=block_error(before, after, got.to("cpu")))
            )
        other.advance(index, theirs, bar.update)
        del theirs
