"""How far vectors and scores of two models lie apart.

N texts or queries, C candidates for each query, E size of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_eval.figures.statistics import Interval, bootstrap_mean

NEIGHBOURS = 10


@dataclass(frozen=True, kw_only=True)
class VectorFigures:
    """What became of the vectors of N texts.

    cosine       mean cosine of a text's vector to the original's
    lowest       the lowest of them
    neighbours   share of each text's nearest (`nearest` of them, among the other texts) that stay
    Intervals are bootstraps over texts.
    """

    texts: int
    nearest: int
    cosine: float
    cosine_interval: Interval
    lowest: float
    neighbours: float
    neighbours_interval: Interval


@dataclass(frozen=True, kw_only=True)
class ScoreFigures:
    """What became of the scores of N queries with C candidates each.

    order        share of the pairs of a query's candidates that stay in the same order
    tau          Kendall's tau-a of the two orders, the mean over queries
    first        share of the queries whose best candidate stays the best
    difference   mean absolute difference of scores
    spread       standard deviation of the original's scores within a query, the mean over queries
    Intervals are bootstraps over queries.
    """

    queries: int
    candidates: int
    order: float
    order_interval: Interval
    tau: float
    tau_interval: Interval
    first: float
    first_interval: Interval
    difference: float
    difference_interval: Interval
    spread: float


def compare_vectors(original_NE: Tensor, other_NE: Tensor) -> VectorFigures:
    """The figures of vectors of length 1; N must exceed NEIGHBOURS + 1."""
    cosines = (original_NE.double() * other_NE.double()).sum(-1).clamp(-1, 1)
    before, after = nearest(original_NE), nearest(other_NE)
    kept = (before[:, :, None] == after[:, None, :]).any(-1).double().mean(-1)
    return VectorFigures(
        texts=len(cosines),
        nearest=NEIGHBOURS,
        cosine=cosines.mean().item(),
        cosine_interval=bootstrap_mean(cosines),
        lowest=cosines.min().item(),
        neighbours=kept.mean().item(),
        neighbours_interval=bootstrap_mean(kept),
    )


def nearest(vectors_NE: Tensor) -> Tensor:
    """Numbers of the NEIGHBOURS texts nearest to each by cosine, int64 [N, NEIGHBOURS].

    Of equally near ones the earlier.
    """
    similar_NN = vectors_NE.double() @ vectors_NE.double().T
    similar_NN.fill_diagonal_(-torch.inf)
    return similar_NN.sort(dim=-1, descending=True, stable=True).indices[:, :NEIGHBOURS]


def compare_scores(original_NC: Tensor, other_NC: Tensor) -> ScoreFigures:
    """The figures of scores; C must be two or more."""
    before, after = original_NC.double(), other_NC.double()
    count = before.shape[1]
    first, second = torch.triu_indices(count, count, offset=1)
    signs = [(scores[:, first] - scores[:, second]).sign() for scores in (before, after)]
    order = (signs[0] == signs[1]).double().mean(-1)
    tau = (signs[0] * signs[1]).mean(-1)
    best = (before.argmax(-1) == after.argmax(-1)).double()
    difference = (after - before).abs().mean(-1)
    return ScoreFigures(
        queries=len(before),
        candidates=count,
        order=order.mean().item(),
        order_interval=bootstrap_mean(order),
        tau=tau.mean().item(),
        tau_interval=bootstrap_mean(tau),
        first=best.mean().item(),
        first_interval=bootstrap_mean(best),
        difference=difference.mean().item(),
        difference_interval=bootstrap_mean(difference),
        spread=before.std(-1).mean().item(),
    )
