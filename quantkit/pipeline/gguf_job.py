"""What `--format gguf` will write, decided before work starts: every tensor's type, memory, disk.

Letters: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.calibration.tokens import Calibration, CalibrationSource, load_calibration
from quantkit.checkpoint.files import refuse_quantized
from quantkit.checkpoint.source import Source
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.checkpoint.version import __version__
from quantkit.errors import RecipeError, SchemeError, ShapeError
from quantkit.formats.gguf.blocks import BLOCK_TYPES
from quantkit.formats.gguf.families import Family, family_of
from quantkit.formats.gguf.metadata import Described, Entry, describe
from quantkit.formats.gguf.mixes import RECIPES, Choice, Weight, check_recipe, choose_types
from quantkit.formats.gguf.names import Place
from quantkit.formats.gguf.tokenizer import describe_tokenizer
from quantkit.formats.gguf.writer import PlannedTensor, import_gguf
from quantkit.formats.open import open_source
from quantkit.methods.recipe import Rule
from quantkit.model.causal import CausalModel
from quantkit.model.decoded import Unpacked
from quantkit.pipeline.gguf_export import dense_tensor, place_tensors
from quantkit.pipeline.gguf_predict import predict_gguf
from quantkit.pipeline.predict import Prediction

METHODS = ("gptq", "rtn")
_HEADS = ("output.weight", "token_embd.weight")


@dataclass(frozen=True, kw_only=True)
class GgufRequest:
    """What the command line or the Python API asks for.

    skip   globs of checkpoint names to keep as they are
    head   ggml type of the output head, as in "q8_0"; None: the recipe's
    """

    scheme: str
    method: str = "gptq"
    calibration: CalibrationSource = "demo"
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    revision: str | None = None
    skip: tuple[str, ...] = ()
    head: str | None = None
    max_ram: int | None = None
    requantize: bool = False


@dataclass(frozen=True, kw_only=True)
class GgufFate:
    """What becomes of one tensor of the file: `sources` are the checkpoint's that it holds."""

    name: str
    fate: str
    type: str
    reason: str
    shape: tuple[int, ...]
    num_bytes: int
    sources: tuple[str, ...]
    source_bytes: int


@dataclass(frozen=True, kw_only=True)
class GgufJob:
    """Everything decided: `types` are those of the matrices that are quantized, by GGUF name."""

    request: GgufRequest
    model: CausalModel
    family: Family
    config: Any
    described: Described
    tokenizer: tuple[Entry, ...]
    tokens: Calibration | None
    placed: Mapping[str, list[tuple[str, Place]]]
    types: Mapping[str, Choice]
    fates: tuple[GgufFate, ...]
    notes: tuple[str, ...]
    prediction: Prediction
    fingerprint: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(fate.num_bytes for fate in self.fates)

    def bits_per_weight(self, *, quantized: bool = False) -> float:
        """Stored bits per parameter; `quantized`: among quantized tensors alone."""
        chosen = [fate for fate in self.fates if fate.fate == "quantized" or not quantized]
        total = sum(torch.Size(fate.shape).numel() for fate in chosen)
        return 8 * sum(fate.num_bytes for fate in chosen) / max(total, 1)


def prepare_gguf(model_path: str, request: GgufRequest) -> GgufJob:
    """The job for a request; reads configuration, headers and calibration text, no weights.

    Raises the QuantkitError of whatever does not work out, before anything is written.
    """
    check_recipe(request.scheme)
    if request.method not in METHODS:
        raise RecipeError(f"method {request.method!r}: with --format gguf it is one of {METHODS}")
    import_gguf()
    source = open_source(model_path, revision=request.revision)
    if request.requantize and isinstance(source.config.get("quantization_config"), dict):
        source = Unpacked.open(source)
    refuse_quantized(source)
    model = CausalModel.open(source, trust_remote_code=False, dtype=torch.float32)
    config = model.text_config
    family = family_of(str(config.model_type))
    described = describe(family, config)
    placed = place_tensors(source.names(), family, model.head_tied)
    types, reasons = _types(request, placed, model, family, config)
    tokens = None
    if request.method == "gptq":
        tokens = load_calibration(
            request.calibration,
            tokenizer=load_tokenizer(source),
            samples=request.samples,
            seq_len=request.seq_len,
            seed=request.seed,
            max_length=getattr(config, "max_position_embeddings", None),
            vocab_size=config.vocab_size,
        )
    fates = tuple(_fates(source, placed, types, reasons, family, config))
    prediction = predict_gguf(model, types, placed, tokens, sum(fate.num_bytes for fate in fates))
    prediction.check(request.max_ram)
    fallbacks = tuple(
        f"{name}: {choice.fallback} does not divide its rows, {choice.type} is written"
        for name, choice in types.items()
        if choice.fallback is not None
    )
    return GgufJob(
        request=request,
        model=model,
        family=family,
        config=config,
        described=described,
        tokenizer=describe_tokenizer(source, config.vocab_size),
        tokens=tokens,
        placed=placed,
        types=types,
        fates=fates,
        notes=described.notes + fallbacks,
        prediction=prediction,
        fingerprint={
            "model": source.fingerprint(),
            "format": "gguf",
            "scheme": request.scheme,
            "method": request.method,
            "skip": ", ".join(request.skip) or "nothing",
            "head": request.head or "as the recipe says",
            "calibration": "none" if tokens is None else tokens.fingerprint,
            "requantize": str(request.requantize),
            "threads": str(torch.get_num_threads()),
            "torch version": torch.__version__,
            "quantkit version": __version__,
        },
    )


def dense_kind(types: Mapping[str, Choice], target: str) -> str | None:
    """The type of a matrix no block type fits; None: as stored."""
    return "F16" if target in types else None


def _types(
    request: GgufRequest,
    placed: Mapping[str, list[tuple[str, Place]]],
    model: CausalModel,
    family: Family,
    config: Any,
) -> tuple[dict[str, Choice], dict[str, str]]:
    """The type of every matrix to quantize (blocks', embedding, head), and reasons of others."""
    refs = [ref for index in range(model.num_blocks) for ref in model.weights(index)]
    shapes = {ref.name: ref.shape for ref in refs if ref.role != "router"}
    weights = []
    for target, members in placed.items():
        name, place = members[0]
        if place.stem in ("token_embd", "output") and target.endswith(".weight"):
            columns = model.source.info(name).shape[1]
        elif name in shapes:
            columns = shapes[name][1]
        else:
            continue
        block = int(target.split(".")[1]) if target.startswith("blk.") else -1
        weights.append(Weight(name=target, stem=place.stem, block=block, columns=columns))
    heads = getattr(config, "num_attention_heads", 1)
    types = choose_types(
        request.scheme,
        weights,
        layers=getattr(config, family.block_count),
        heads=heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        experts=getattr(config, "num_local_experts", 0) if family.experts else 0,
        tied=model.head_tied,
    )
    reasons: dict[str, str] = {}
    if request.head is not None:
        head = next(name for name in _HEADS if name in types)
        columns = next(weight.columns for weight in weights if weight.name == head)
        types[head] = Choice(type=_head_type(request.head, head, columns))
        reasons[head] = "--lm-head"
    for target, glob in _skipped(request.skip, placed, set(types)).items():
        del types[target]
        reasons[target] = f"--skip {glob!r}"
    if not any(choice.type in BLOCK_TYPES for choice in types.values()):
        raise RecipeError("no matrix is quantized: every one is skipped or fits no block type")
    return types, reasons


def _head_type(text: str, head: str, columns: int) -> str:
    label = text.upper()
    if label == "F16":
        return label
    if label not in BLOCK_TYPES:
        known = ", ".join(name.lower() for name in BLOCK_TYPES)
        raise SchemeError(f"--lm-head {text}: with --format gguf it is a type: {known} or f16")
    if columns % BLOCK_TYPES[label].size:
        raise ShapeError(
            f"{head}: {columns} columns are no whole blocks of {BLOCK_TYPES[label].size}, which "
            f"--lm-head {text} needs; use q8_0 or f16"
        )
    return label


def _skipped(
    globs: Sequence[str], placed: Mapping[str, list[tuple[str, Place]]], matrices: set[str]
) -> dict[str, str]:
    """GGUF name -> the glob that keeps it, of all matrices that would be quantized."""
    found: dict[str, str] = {}
    for glob in globs:
        rule = Rule(match=glob, scheme=None)
        hit = False
        for target, members in placed.items():
            matched = [name for name, _ in members if rule.matches(name)]
            hit = hit or bool(matched)
            if not matched or target not in matrices:
                continue
            if len(matched) < len(members):
                raise RecipeError(
                    f"--skip {glob!r} matches {matched[0]} but not all of its layer's experts, "
                    f"which gguf keeps in one tensor, {target}: skip all of them or none"
                )
            found[target] = glob
        if not hit:
            names = ", ".join(members[0][0] for members in list(placed.values())[:2])
            raise RecipeError(f"--skip {glob!r} matches no tensor; names look like {names}")
    return found


def _fates(
    source: Source,
    placed: Mapping[str, list[tuple[str, Place]]],
    types: Mapping[str, Choice],
    reasons: Mapping[str, str],
    family: Family,
    config: Any,
) -> Iterator[GgufFate]:
    """One fate for every tensor of the file, and one for each of the source that has no place."""
    held = {name for members in placed.values() for name, _ in members}
    for target, members in placed.items():
        planned = dense_tensor(target, members, source, family, config, dense_kind(types, target))
        choice = types.get(target)
        reason = reasons.get(target, "norm, bias or table")
        if choice is not None and choice.type in BLOCK_TYPES:
            planned = PlannedTensor(
                name=target, type=choice.type, shape=planned.shape, pieces=planned.pieces
            )
        if choice is not None and target not in reasons:
            reason = "recipe" if choice.fallback is None else f"{choice.fallback} does not fit"
        quantized = planned.type in BLOCK_TYPES
        yield GgufFate(
            name=target,
            fate="quantized" if quantized else "kept",
            type=planned.type,
            reason=reason,
            shape=planned.shape,
            num_bytes=planned.num_bytes,
            sources=tuple(name for name, _ in members),
            source_bytes=sum(source.info(name).nbytes for name, _ in members),
        )
    for name in sorted(set(source.names()) - held):
        info = source.info(name)
        yield GgufFate(
            name=name,
            fate="left out",
            type="",
            reason="llama.cpp computes it, or it is the embedding",
            shape=(0,),
            num_bytes=0,
            sources=(name,),
            source_bytes=info.nbytes,
        )


def recipe_type(scheme: str) -> int:
    """The owner's number of a recipe's file type."""
    return RECIPES[scheme][1]
