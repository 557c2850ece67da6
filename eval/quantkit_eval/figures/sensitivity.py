"""What each block costs by itself: KL divergence when it alone is quantized.

All branches advance together, so that every block of the original is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from quantkit.calibration.data.images import Pictured
from quantkit.checkpoint.memory import release_free_memory
from quantkit.model.causal import CausalModel
from quantkit_eval.figures.heads import score
from quantkit_eval.figures.statistics import Interval, clustered_mean
from quantkit_eval.figures.stream import ModelStream, States
from quantkit_eval.sequences import Scored, Workload, make_workload

# Tokens of text that are enough to rank blocks.
TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class BlockSensitivity:
    """Mean KL divergence, in nats, of the model in which block `index` alone is quantized."""

    index: int
    kl: float
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class _Branch:
    """The original's stream with one other block in it, after the last block."""

    name: str
    model: CausalModel
    workload: Workload
    device: str
    states: States
    slot: int

    def read(self, number: int) -> Tensor:
        return self.states.read(number, self.slot)


def few_windows(
    sequences: Sequence[Scored], max_length: int | None, pictured: Pictured | None = None
) -> Workload:
    """The first windows, up to the tokens that sensitivity is measured on.

    pictured: what comes with them, if they are conversations with images.
    """
    count = max(2, TOKENS // max(len(sequence.ids) for sequence in sequences))
    return make_workload(sequences[:count], max_length=max_length, pictured=pictured)


def cost(blocks: int, workload: Workload) -> str:
    """What measuring will take, for a person to read before it starts."""
    passes = blocks * (blocks + 5) // 2
    return (
        f"sensitivity: {passes} block passes over {workload.tokens} tokens, as many as "
        f"{passes / blocks:.1f} evaluations of {workload.tokens} tokens"
    )


def measure_sensitivity(
    base: ModelStream,
    other: ModelStream,
    directory: Path,
    *,
    head_bytes: int | None,
    progress: bool,
) -> tuple[BlockSensitivity, ...]:
    """One figure per block, in order; `base` and `other` share a workload, states go to disk."""
    blocks, workload = base.num_blocks, base.workload
    states = States(directory, workload, base.hidden_size, base.model.dtype, slots=blocks)
    batches = range(len(workload.batches))
    try:
        base.embed()
        other.embed()
        bar = tqdm(total=blocks, unit="block", disable=None if progress else True)
        with bar, torch.no_grad():
            bar.set_description(f"sensitivity of {other.name}")
            for index in range(blocks):
                theirs = other.load(index)
                for number in batches:
                    branched = other.run(index, theirs, number, base.read(number))
                    states.write(number, branched, index)
                del theirs
                block = base.load(index)
                for number in batches:
                    for branch in range(index):
                        entered = states.read(number, branch)
                        states.write(number, base.run(index, block, number, entered), branch)
                    base.write(number, base.run(index, block, number))
                del block
                release_free_memory()
                bar.update()
            branches = [
                _Branch(
                    name=f"{other.name} with block {index} alone",
                    model=base.model,
                    workload=workload,
                    device=base.device,
                    states=states,
                    slot=index,
                )
                for index in range(blocks)
            ]
            _, pairs = score(base, branches, head_bytes=head_bytes)
    finally:
        states.close()
    counts = torch.tensor([sequence.count for sequence in workload.sequences])
    found = []
    for index, pair in enumerate(pairs):
        sums = [pair.kl[workload.slice(k)].double().sum() for k in range(len(counts))]
        mean, interval = clustered_mean(torch.stack(sums), counts)
        found.append(BlockSensitivity(index=index, kl=mean, interval=interval))
    return tuple(found)
