"""What models say about every scored token, from blocks of logits.

Logits exist for a few positions and vocabulary rows at a time; sums over the vocabulary are kept
per position, so neither the text's nor even one window's full logits are ever in memory.
Shapes: S scored tokens, P positions at a time, C vocabulary rows at a time.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_eval.errors import EvaluationError
from quantkit_eval.sequences import Workload


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one model, in the workload's order.

    nll     float32 [S] negative log-likelihood of the token that followed, in nats
    best    int32 [S] the most likely token
    """

    nll: Tensor
    best: Tensor


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """Scores of another model beside the base's, and kl float32 [S] = KL(base || other) in nats."""

    scores: Scores
    kl: Tensor


@dataclass(frozen=True, kw_only=True)
class Place:
    """Some scored tokens of one batch: where their states, scores and targets are.

    states    int64 [P] into the batch's states [B * T]
    scores    int64 [P] into all scores
    """

    states: Tensor
    scores: Tensor
    targets: Tensor


# First vocabulary row, which scored tokens, and each model's logits [P, C] of them.
Block = tuple[int, Place, list[Tensor]]


class _Running:
    """Sums over the vocabulary seen so far, for all scored tokens: log-sum-exp, argmax, target."""

    def __init__(self, count: int) -> None:
        self.top = torch.full((count,), -torch.inf)
        self.total = torch.zeros(count, dtype=torch.float64)
        self.best = torch.zeros(count, dtype=torch.int32)
        self.target = torch.zeros(count)

    @property
    def log_total(self) -> Tensor:
        return self.total.log() + self.top.double()

    def add_(self, at: Tensor, logits_PC: Tensor, start: int, targets_P: Tensor) -> Tensor:
        """Adds vocabulary rows `start`...; returns exp(logits - their maximum so far) [P, C]."""
        top_P, best_P = logits_PC.max(dim=1)
        before = self.top[at]
        better = top_P.cpu() > before
        self.best[at] = torch.where(better, best_P.cpu().to(torch.int32) + start, self.best[at])
        top = torch.maximum(before, top_P.cpu())
        powers_PC = (logits_PC - top.to(logits_PC.device)[:, None]).exp_()
        shrink = (before - top).double().exp()
        self.total[at] = self.total[at] * shrink + powers_PC.sum(1).double().cpu()
        self.top[at] = top
        inside = (targets_P >= start) & (targets_P < start + logits_PC.shape[1])
        column = (targets_P - start).clamp(0, logits_PC.shape[1] - 1).to(logits_PC.device)
        found = logits_PC.gather(1, column[:, None]).squeeze(1).cpu()
        self.target[at] = torch.where(inside, found, self.target[at])
        return powers_PC

    def scores(self) -> Scores:
        return Scores(nll=(self.log_total - self.target.double()).float(), best=self.best)


def accumulate(
    names: Sequence[str], workload: Workload, blocks: Iterable[Block]
) -> tuple[Scores, list[PairScores]]:
    """Scores from blocks of logits, one tensor [P, C] per model, the base's first.

    Every scored token's blocks come in the order of the vocabulary.  Raises EvaluationError.
    """
    running = [_Running(workload.scored_tokens) for _ in names]
    crossed = [torch.zeros(workload.scored_tokens, dtype=torch.float64) for _ in names[1:]]
    for start, place, logits in blocks:
        for name, found in zip(names, logits, strict=True):
            _check_finite(name, found, place, workload)
        first, *rest = logits
        shrink = running[0].top[place.scores]
        powers = running[0].add_(place.scores, first, start, place.targets)
        shrink = (shrink - running[0].top[place.scores]).double().exp()
        for run, other, cross in zip(running[1:], rest, crossed, strict=True):
            run.add_(place.scores, other, start, place.targets)
            gained = (powers * (first - other)).sum(1).double().cpu()
            cross[place.scores] = cross[place.scores] * shrink + gained
    base_total = running[0].log_total
    pairs = [
        PairScores(
            scores=run.scores(),
            kl=(cross / running[0].total - base_total + run.log_total).float(),
        )
        for run, cross in zip(running[1:], crossed, strict=True)
    ]
    return running[0].scores(), pairs


def places(workload: Workload, number: int, limit: int) -> Iterator[Place]:
    """The scored tokens of a batch, at most `limit` at a time."""
    batch = workload.batches[number]
    length = batch.ids.shape[1]
    states, scores = [], []
    for row, member in enumerate(batch.members):
        sequence, found = workload.sequences[member], workload.slice(member)
        # The state at a position predicts the token after it.
        states.append(row * length + sequence.positions - 1)
        scores.append(torch.arange(found.start, found.stop))
    for some, where in zip(
        torch.cat(states).split(limit), torch.cat(scores).split(limit), strict=True
    ):
        yield Place(states=some, scores=where, targets=workload.targets[where].to(torch.int64))


def _check_finite(name: str, logits: Tensor, place: Place, workload: Workload) -> None:
    # The sum is finite unless a logit is not, or all overflow float32 together.
    if bool(torch.isfinite(logits.sum())):
        return
    bad = (~torch.isfinite(logits)).any(dim=1).nonzero()
    if len(bad):
        index = int(place.scores[int(bad[0])])
        member = bisect.bisect_right(workload.offsets, index) - 1
        sequence = workload.sequences[member]
        position = int(sequence.positions[index - workload.offsets[member]]) - 1
        raise EvaluationError(
            f"{name}: the logits at position {position} of {sequence.label} hold NaN or infinity; "
            "the model is damaged, or it overflows"
        )
