"""The evaluation of embedding models or rerankers as one value: what report.json holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantkit_eval.gate import Judgement, Outcome
from quantkit_eval.records import Fact
from quantkit_eval.subjects import Identity
from quantkit_eval.vectors.figures import ScoreFigures, VectorFigures

VECTOR_SCHEMA = "quantkit.evaluation.vectors/1"


@dataclass(frozen=True, kw_only=True)
class TextsUsed:
    """The evaluation text, and what was made of it.

    facts      its config, split, revision, hashes: what there is of them
    texts      how many texts got vectors, or queries with `candidates` each
    longest    tokens that are read of a text at most
    """

    source: str
    sha256: str
    facts: tuple[Fact, ...]
    texts: int
    candidates: int | None
    longest: int


@dataclass(frozen=True, kw_only=True)
class VectorNoise:
    """The original in `dtype` against itself in float32: what no quantization can be blamed for."""

    dtype: str
    vectors: VectorFigures | None
    scores: ScoreFigures | None


@dataclass(frozen=True, kw_only=True)
class VectorCandidate:
    """One quantized model; of `vectors` and `scores` it has what its kind gives.

    outcome    the worst of its judgements: the verdict
    notes      what a reader should know before trusting the numbers
    """

    identity: Identity
    vectors: VectorFigures | None
    scores: ScoreFigures | None
    judgements: tuple[Judgement, ...]
    outcome: Outcome
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class VectorReport:
    """Everything that was measured, and what it depends on.

    kind      whether the models give vectors of texts or scores of pairs
    pooling   how a text becomes a vector, None for scores
    prompt    what stands before every text
    """

    schema: str
    title: str
    created: str
    kind: Literal["vectors", "scores"]
    pooling: str | None
    prompt: str
    original: Identity
    text: TextsUsed
    noise: VectorNoise | None
    candidates: tuple[VectorCandidate, ...]
    computed: tuple[Fact, ...]
    seed: int
    limits_given: bool
    machine: tuple[Fact, ...]
    versions: tuple[Fact, ...]
    seconds: float
    peak_rss_bytes: int
    max_ram_bytes: int | None
