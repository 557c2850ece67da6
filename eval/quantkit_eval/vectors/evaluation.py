"""Quantized embedding models and rerankers measured against their original."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.checkpoint.memory import current_rss, format_size, peak_rss, release_free_memory
from quantkit.checkpoint.source import Source
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.errors import BudgetError
from quantkit.formats.open import open_source
from quantkit.inference.backend import check_backend
from quantkit.inference.load import load
from quantkit.model import skeleton
from quantkit.model.decoded import open_decoded
from quantkit_eval.errors import EvaluationError
from quantkit_eval.gate import hold, worst
from quantkit_eval.limits import VECTOR_METRICS, Limit, parse_limit
from quantkit_eval.machine import machine_facts, version_facts
from quantkit_eval.records import Fact
from quantkit_eval.setting import EvaluationRequest
from quantkit_eval.subjects import Subject, check_source, open_original, open_subject
from quantkit_eval.texts import Text, read_text
from quantkit_eval.vectors.figures import (
    ScoreFigures,
    VectorFigures,
    compare_scores,
    compare_vectors,
)
from quantkit_eval.vectors.kinds import is_causal
from quantkit_eval.vectors.pooling import Pooling, read_pooling
from quantkit_eval.vectors.records import (
    VECTOR_SCHEMA,
    TextsUsed,
    VectorCandidate,
    VectorNoise,
    VectorReport,
)
from quantkit_eval.vectors.running import longest, scores, vectors
from quantkit_eval.vectors.texts import Query, choose_queries, choose_texts

VectorKind = Literal["vectors", "scores"]
# What the headline asks if nobody says what matters.
DEFAULT_VECTOR_LIMITS: dict[VectorKind, tuple[str, ...]] = {
    "vectors": ("neighbours<90%",),
    "scores": ("order<98%",),
}
_NOISE_DTYPE = torch.bfloat16
# As where models are loaded whole to write text: copies of the weights, and room to run.
_LOAD_FACTOR, _RUN_BYTES = 1.3, 512 * 2**20
_FEW = 30


@dataclass(frozen=True, kw_only=True)
class VectorWishes:
    """What is decided before any model runs."""

    kind: VectorKind
    text: Text
    texts: tuple[str, ...]
    queries: tuple[Query, ...]
    pooling: Pooling | None
    longest: int
    limits: tuple[Limit, ...]
    bytes: int


def vector_wishes(request: EvaluationRequest, source: Source, kind: VectorKind) -> VectorWishes:
    """The texts and limits of a request; reads no weights.

    Raises EvaluationError for options that only models of tokens have, BudgetError if a whole model
    does not fit in --max-ram.
    """
    for option, asked in (
        ("--tasks", request.tasks),
        ("--sensitivity", request.sensitivity),
        ("--stride", request.stride),
        ("--protocol", request.protocol != "standard"),
        ("--kv", request.kv != "stored"),
    ):
        if asked:
            raise EvaluationError(f"{option}: this model predicts no tokens; leave it out")
    check_backend(request.backend, request.device)
    limits = tuple(map(parse_limit, request.limits or DEFAULT_VECTOR_LIMITS[kind]))
    for limit in limits:
        if limit.metric not in VECTOR_METRICS[kind]:
            raise EvaluationError(
                f"--fail-if {limit.text!r}: of this model are measured "
                f"{', '.join(VECTOR_METRICS[kind])}"
            )
    trust = request.trust_remote_code
    view = open_decoded(source, trust_remote_code=trust)
    model = skeleton.build(view, trust_remote_code=trust, dtype=None)
    tokenizer = load_tokenizer(source, trust_remote_code=trust)
    needed = int(_LOAD_FACTOR * 4 * sum(p.numel() for p in model.parameters()))
    needed += current_rss() + _RUN_BYTES
    if request.max_ram is not None and needed > request.max_ram:
        raise BudgetError(
            f"--max-ram {format_size(request.max_ram)} is too small: vectors and scores are those "
            f"of a whole model in float32, about {format_size(needed)}; give that much"
        )
    text = read_text(request.text)
    pooling = None
    texts: Sequence[str] = ()
    queries: Sequence[Query] = ()
    if kind == "vectors":
        pooling = read_pooling(source, causal=is_causal(model))
        texts = choose_texts(text.content, text.source, request.windows)
    else:
        queries = choose_queries(text.content, text.source, request.windows)
    return VectorWishes(
        kind=kind,
        text=text,
        texts=tuple(texts),
        queries=tuple(queries),
        pooling=pooling,
        longest=longest(model, tokenizer, None if pooling is None else pooling.max_tokens),
        limits=limits,
        bytes=needed,
    )


def evaluate_vectors(
    request: EvaluationRequest,
    kind: VectorKind,
    *,
    names: Sequence[str] | None = None,
) -> VectorReport:
    """The report on every quantized model; one whole model is in memory at a time.

    The original runs in float32; so do quantized models with decoded weights, but for another
    `backend` than auto, which multiplies in the original's own dtype.  Raises as
    `evaluation.evaluate` does.
    """
    began = time.monotonic()
    trust = request.trust_remote_code
    original = open_original(request.model, name=request.original_name, trust_remote_code=trust)
    tokenizer = load_tokenizer(original.source, trust_remote_code=trust)
    called: Sequence[str | None] = names or [None] * len(request.quantized)
    subjects = [
        open_subject(path, original, name=name, trust_remote_code=trust)
        for path, name in zip(request.quantized, called, strict=True)
    ]
    for subject in subjects:
        check_source(original, subject, tokenizer, any_base=request.any_base)
    wishes = vector_wishes(request, open_source(request.model), kind)

    def run(path: str, dtype: torch.dtype, backend: str) -> Tensor:
        where = Path(path) if Path(path).exists() else path
        model = load(
            where, dtype=dtype, device=request.device, backend=backend, trust_remote_code=trust
        )
        with torch.no_grad():
            found = _run(model, tokenizer, wishes)
        del model
        release_free_memory()
        return found

    base = run(request.model, torch.float32, "reference")
    candidates = []
    for path, subject in zip(request.quantized, subjects, strict=True):
        exact = request.backend == "auto"
        dtype = torch.float32 if exact else _own_dtype(original)
        other = run(path, dtype, "reference" if exact else request.backend)
        candidates.append(_candidate(wishes, subject, base, other))
    noise = None
    if request.noise_floor:
        other = run(request.model, _NOISE_DTYPE, "reference")
        found = _figures(wishes, base, other)
        noise = VectorNoise(
            dtype=str(_NOISE_DTYPE).removeprefix("torch."), vectors=found[0], scores=found[1]
        )
    pooling = wishes.pooling
    return VectorReport(
        schema=VECTOR_SCHEMA,
        title=request.title or f"What quantization cost {original.name}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        kind=kind,
        pooling=None if pooling is None else pooling.described(),
        prompt="" if pooling is None else pooling.prompt,
        original=original.identity,
        text=_used(wishes),
        noise=noise,
        candidates=tuple(candidates),
        computed=(Fact(name=kind, value=_computed(request, original)),),
        seed=request.seed,
        limits_given=bool(request.limits),
        machine=machine_facts(request.device),
        versions=version_facts(),
        seconds=round(time.monotonic() - began, 1),
        peak_rss_bytes=peak_rss(),
        max_ram_bytes=request.max_ram,
    )


def _run(model: PreTrainedModel, tokenizer: Any, wishes: VectorWishes) -> Tensor:
    if wishes.pooling is None:
        return scores(model, tokenizer, wishes.queries)
    return vectors(model, tokenizer, wishes.texts, wishes.pooling)


def _figures(
    wishes: VectorWishes, base: Tensor, other: Tensor
) -> tuple[VectorFigures | None, ScoreFigures | None]:
    if wishes.kind == "vectors":
        return compare_vectors(base, other), None
    return None, compare_scores(base, other)


def _candidate(
    wishes: VectorWishes, subject: Subject, base: Tensor, other: Tensor
) -> VectorCandidate:
    vector, score = _figures(wishes, base, other)
    judgements = []
    for limit in wishes.limits:
        figures = vector or score
        estimate = getattr(figures, limit.metric)
        interval = getattr(figures, f"{limit.metric}_interval")
        unit = "texts" if wishes.kind == "vectors" else "queries"
        judgements.append(hold(limit, estimate, interval, len(base), unit))
    notes = []
    if len(base) < _FEW:
        notes.append(f"{len(base)} texts or queries only: intervals are narrower than they should.")
    return VectorCandidate(
        identity=subject.identity,
        vectors=vector,
        scores=score,
        judgements=tuple(judgements),
        outcome=worst(judgement.outcome for judgement in judgements),
        notes=tuple(notes),
    )


def _used(wishes: VectorWishes) -> TextsUsed:
    return TextsUsed(
        source=wishes.text.source,
        sha256=wishes.text.sha256,
        facts=tuple(Fact(name=name, value=value) for name, value in wishes.text.details.items()),
        texts=len(wishes.texts) or len(wishes.queries),
        candidates=len(wishes.queries[0].candidates) if wishes.queries else None,
        longest=wishes.longest,
    )


def _own_dtype(original: Subject) -> torch.dtype:
    found = getattr(torch, original.identity.dtype, torch.bfloat16)
    return found if found in (torch.float16, torch.bfloat16) else torch.bfloat16


def _computed(request: EvaluationRequest, original: Subject) -> str:
    if request.backend == "auto":
        return "float32, whole models, quantized weights decoded"
    dtype = str(_own_dtype(original)).removeprefix("torch.")
    return f"the original in float32, quantized models in {dtype} by backend {request.backend}"
