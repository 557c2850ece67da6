"""The plan: one fate per tensor, decided before work starts, and the exact layout of the output."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch

from quantkit.checkpoint.dtypes import dtype_of
from quantkit.checkpoint.record import Fate
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.shards import Layout, ShardLayout, plan_shards
from quantkit.errors import FormatError, RecipeError
from quantkit.formats.format import Container, Format, PlannedWeight, WholeFormat
from quantkit.formats.registry import asked_format, check_supported, default_format, make_format
from quantkit.formats.stored import model_dtype
from quantkit.methods.recipe import Recipe
from quantkit.model.causal import CausalModel
from quantkit.model.fitting import fitted_line
from quantkit.model.fold_vectors import fold_shapes
from quantkit.model.refs import ScaleGroup, WeightRef
from quantkit.model.rotations.rotated import Rotated
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.cache import CachePlan, plan_cache
from quantkit.pipeline.decide import (
    check_enough,
    check_experts,
    check_rules,
    check_shared,
    decide_all,
    decide_fed,
    fit,
    head_name,
    kept_reason,
    notes_on,
    planned,
    planned_head,
    spread,
    table_ref,
    unquantizable,
)
from quantkit.pipeline.extra import (
    decide_extra,
    decide_towers,
    extra_config,
    extra_notes,
    extra_reason,
    extra_weights,
    unread,
)

_UNUSED = "no parameter of the model class takes it"
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class TensorFate:
    """What becomes of one tensor of the source, and why.

    `output` are the tensors it turns into (none if it is left out); bytes count the output.
    `block` is None outside blocks.
    """

    name: str
    fate: Fate
    reason: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int | None
    scheme: Scheme | None
    output: tuple[TensorInfo, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the output."""
        return sum(info.nbytes for info in self.output)

    @property
    def source_bytes(self) -> int:
        """Bytes in the source."""
        return self.parameters * self.dtype.itemsize

    @property
    def parameters(self) -> int:
        """Numbers of the source."""
        return 0 if self.fate == "added" else torch.Size(self.shape).numel()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every decision of a run.

    weights     all weights the blocks multiply by (and the head), with their scheme or None
    refs        the same weights as the model side addresses them, per block
    groups      the scale groups that transforms work on, per block
    folds       length of each vector that records what transforms did, per block
    quantization_config  what config.json says of it
    embedding   the table of embeddings, where it is quantized and is not the head
    extra       the quantized weights of layers that predict further tokens, and of towers
    notes       what the format's reader will do otherwise
    cache       scales for a cache of keys and values, if they are asked for
    """

    recipe: Recipe
    format: Format
    model_type: str
    fates: tuple[TensorFate, ...]
    weights: tuple[PlannedWeight, ...]
    refs: tuple[tuple[WeightRef, ...], ...]
    groups: tuple[tuple[ScaleGroup, ...], ...]
    head: WeightRef | None
    head_layout: tuple[TensorInfo, ...]
    unties_head: bool
    layout: Layout
    folds: tuple[Mapping[str, int], ...]
    folds_layout: ShardLayout | None
    readers: Mapping[str, str | None]
    quantization_config: Mapping[str, Any]
    embedding: WeightRef | None = None
    extra: tuple[WeightRef, ...] = ()
    notes: tuple[str, ...] = ()
    cache: CachePlan | None = None

    @cached_property
    def weight_of(self) -> Mapping[str, PlannedWeight]:
        """Checkpoint name -> planned weight."""
        return {weight.name: weight for weight in self.weights}

    @cached_property
    def fates_of_block(self) -> Mapping[int | None, tuple[TensorFate, ...]]:
        """Block index (None: outside) -> its tensors' fates."""
        found: dict[int | None, list[TensorFate]] = {}
        for fate in self.fates:
            found.setdefault(fate.block, []).append(fate)
        return {block: tuple(fates) for block, fates in found.items()}

    @property
    def planned_head(self) -> PlannedWeight:
        """The output head, under the name it has in the output."""
        return self.weights[-1]

    def scheme(self, ref: WeightRef) -> Scheme | None:
        """The scheme of a weight; None if it is kept."""
        weight = self.planned_head if ref.role == "head" else self.weight_of[ref.name]
        return weight.scheme

    def scheme_of(self, ref: WeightRef) -> Scheme:
        """The scheme of a weight that is quantized."""
        scheme = self.scheme(ref)
        assert scheme is not None
        return scheme

    def input_groups(self, index: int) -> Iterator[tuple[str, tuple[WeightRef, ...]]]:
        """(input key, quantized weights of one scheme that read it), in the order of use."""
        return self._by_input(self.refs[index])

    def extra_groups(self) -> Iterator[tuple[str, tuple[WeightRef, ...]]]:
        """The same of extra layers and towers."""
        return self._by_input(self.extra)

    def _by_input(self, refs: Sequence[WeightRef]) -> Iterator[tuple[str, tuple[WeightRef, ...]]]:
        found: dict[str, dict[Scheme, list[WeightRef]]] = {}
        for ref in refs:
            if (scheme := self.scheme(ref)) is not None:
                found.setdefault(ref.input, {}).setdefault(scheme, []).append(ref)
        return ((key, tuple(refs)) for key, groups in found.items() for refs in groups.values())

    @property
    def fitted(self) -> str | None:
        """A line on groups that are smaller than the method's own, as they would not divide."""
        extra = {ref.name for ref in self.extra}
        return fitted_line(self.recipe, [w for w in self.weights if w.name not in extra])

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter of the source: scales, zeros, unquantized tensors and all."""
        parameters = sum(fate.parameters for fate in self.fates)
        return 8 * sum(fate.num_bytes for fate in self.fates) / max(parameters, 1)

    @property
    def bits_per_quantized_weight(self) -> float:
        """Stored bits per parameter among quantized weights only."""
        quantized = [fate for fate in self.fates if fate.fate == "quantized"]
        parameters = sum(fate.parameters for fate in quantized)
        return 8 * sum(fate.num_bytes for fate in quantized) / max(parameters, 1)


def make_plan(
    model: CausalModel,
    recipe: Recipe,
    *,
    format_name: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    allow_unreadable: bool = False,
) -> Plan:
    """The plan for a model; reads no weights.

    Raises ModelError (too much of it cannot be quantized), RecipeError (a rule that splits weights
    sharing an input, or matches nothing), ShapeError, FormatError (a scheme or shape the format
    cannot hold, no runtime reads it, or one could not tell kept from quantized modules).
    """
    refs = _block_weights(model)
    check_rules(recipe, model)
    check_enough(recipe, model)
    check_experts(recipe, model)
    fmt = asked_format(format_name, recipe.scheme)
    container = None if fmt is None else open_container(model, fmt)
    decisions = decide_all(recipe, model, fmt, refs)
    if fmt is not None and container is not None:
        if max_shard_bytes != DEFAULT_SHARD_BYTES:
            raise FormatError(f"--max-shard-size: {fmt.name} is one file; leave it out")
        decisions |= spread(recipe, container, fmt, refs)
    decisions |= decide_fed(recipe, model, refs)
    if recipe.head is not None:
        whole = model.projection.name
        head = whole if container is not None else head_name(model) or whole
        decisions[head] = recipe.head, "--lm-head"
    decisions |= decide_extra(recipe, model, container is not None)
    decisions |= decide_towers(recipe, model, container is not None)
    if container is None:
        # A container says itself what it keeps in one tensor, and its reader fuses nothing.
        if recipe.fit:
            decisions = fit(model, recipe, decisions, fmt)
        asked = extra_weights(model) if recipe.mtp is not None else ()
        for block in [*refs, *asked]:
            check_shared(block, {name: scheme for name, (scheme, _) in decisions.items()})
    return lay_out(
        model,
        recipe,
        decisions,
        fmt=fmt,
        container=container,
        max_shard_bytes=max_shard_bytes,
        allow_unreadable=allow_unreadable,
    )


def open_container(model: CausalModel, fmt: Format) -> Container | None:
    """How the model lies in a format that is a container of its own; None for other formats."""
    if not isinstance(fmt, WholeFormat):
        return None
    if model.head is None:
        raise FormatError(
            f"--format {fmt.name}: written for models that predict tokens, and this one has no "
            "head; choose a format of safetensors"
        )
    return fmt.container(
        model.source, model.text_config, head_tied=model.head_tied, unused=model.unmapped
    )


def lay_out(
    model: CausalModel,
    recipe: Recipe,
    decisions: Mapping[str, tuple[Scheme | None, str]],
    *,
    fmt: Format | None = None,
    container: Container | None = None,
    plain: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    allow_unreadable: bool = False,
) -> Plan:
    """The plan when each weight's scheme (None: kept), with the reason, is decided.

    A weight without a decision is kept; without a format the scheme's own is taken.  Raises as
    `make_plan` does.  `plain`: nothing at all may be quantized.
    """
    refs = _block_weights(model)
    schemes = {name: scheme for name, (scheme, _) in decisions.items()}
    weights = [planned(model, ref, schemes.get(ref.name)) for block in refs for ref in block]
    head_is = head_name(model) if container is None else model.projection.name
    head_scheme = schemes.get(head_is or "")
    head = model.head if head_scheme is not None else None
    unties = head is not None and model.head_tied and container is None
    outside = {} if container is None else container.matrices()
    embedding = next(
        (
            table_ref(name, shape)
            for name, shape in outside.items()
            if name != head_is and schemes.get(name) is not None
        ),
        None,
    )
    if embedding is not None:
        weights.append(planned(model, embedding, schemes[embedding.name]))
    extra, towers = (
        tuple(ref for ref in many if schemes.get(ref.name) is not None)
        for many in (chain.from_iterable(extra_weights(model)), model.towers.weights)
    )
    # transformers puts them into no fused parameter.
    weights += [
        dataclasses.replace(planned(model, ref, schemes[ref.name]), expert=False)
        for ref in (*extra, *towers)
    ]
    weights += planned_head(model, head_scheme, head_is)
    for weight in weights:
        if weight.scheme is not None:
            weight.scheme.check_shape(weight.name, weight.shape)
    quantized = [weight for weight in weights if weight.scheme is not None]
    if not quantized and not plain:
        raise RecipeError("no weight is quantized: every one is skipped by a rule or is a router")
    fmt = fmt or make_format(default_format(quantized[0].scheme or recipe.scheme))
    check_supported(fmt, weights)
    model_type = str(model.source.config.get("model_type", ""))
    readers = {**fmt.readers(weights, model_type), **unread(model, fmt, weights)}
    if not allow_unreadable and all(reason is not None for reason in readers.values()):
        listed = "; ".join(f"{runtime}: {reason}" for runtime, reason in readers.items())
        raise FormatError(
            f"no runtime reads {model_type} in {fmt.name} with {recipe.scheme.name}: {listed}. "
            "Choose another --format or --scheme, or pass --allow-unreadable"
        )
    groups = _transformed_groups(model, recipe, schemes)
    rescaled: dict[str, str] = {}
    if isinstance(model.source, Rotated):
        rescaled |= dict.fromkeys(model.source.turns, "rotated")
    folded = "folded by " + ", ".join(part.name for part in recipe.transforms)
    for block in groups:
        for group in block:
            rescaled |= dict.fromkeys(group.producer_names, folded)
            rescaled |= dict.fromkeys((ref.name for ref in group.readers), folded)
    reasons = {name: reason for name, (_, reason) in decisions.items()}
    fates = _fates(model, fmt, container, weights, reasons, rescaled)
    cache = None if recipe.kv is None else plan_cache(model, recipe.kv, fmt)
    if cache is not None:
        fates += _added(cache)
    infos = [info for fate in fates for info in fate.output]
    head_layout: tuple[TensorInfo, ...] = ()
    if head is not None:
        head_layout = fmt.layout(weights[-1], model.source.info(head.name).dtype)
    if unties:
        infos += head_layout
    shapes = {name: model.source.info(name).shape for name in model.source.names()}
    folds = tuple(dict(fold_shapes(block, shapes)) for block in groups)
    vectors = [
        TensorInfo(name=name, dtype=torch.float32, shape=(length,))
        for block in folds
        for name, length in block.items()
    ]
    layout = (
        plan_shards(infos, max_shard_bytes)
        if container is None
        else container.lay_out(recipe.scheme, {w.name: w.scheme for w in weights})
    )
    notes = [
        *notes_on(model, recipe),
        *extra_notes(model, extra),
        *(() if container is None else container.notes),
    ]
    if cache is not None:
        notes.append(cache.note(layout.num_bytes))
    # Blocks may run in another dtype here than the model has.
    dtype = dtype_of(model_dtype(model.source))
    others = _others(model, weights, fates)
    config = fmt.config(weights, model_type=model_type, dtype=dtype, others=others)
    config |= extra_config(model, fmt, weights, cache)
    return Plan(
        recipe=recipe if model.head is not None else dataclasses.replace(recipe, heal=None),
        format=fmt,
        model_type=model_type,
        fates=fates,
        weights=tuple(weights),
        refs=refs,
        groups=groups,
        head=head,
        head_layout=head_layout,
        unties_head=unties,
        layout=layout,
        folds=folds,
        folds_layout=plan_shards(vectors, 1 << 62, stem="folds") if vectors else None,
        readers=readers,
        quantization_config=config,
        cache=cache,
        embedding=embedding,
        extra=(*extra, *towers),
        notes=tuple(notes),
    )


def _block_weights(model: CausalModel) -> tuple[tuple[WeightRef, ...], ...]:
    return tuple(model.weights(index) for index in range(model.num_blocks))


def _transformed_groups(
    model: CausalModel, recipe: Recipe, schemes: Mapping[str, Scheme | None]
) -> tuple[tuple[ScaleGroup, ...], ...]:
    """The scale groups with a quantized reader; none if no transform has anything to do."""
    schemes_used = {scheme for scheme in schemes.values() if scheme is not None}
    transforms = recipe.make_transforms()
    if not any(part.needs(scheme) for part in transforms for scheme in schemes_used):
        return tuple(() for _ in range(model.num_blocks))
    return tuple(
        tuple(
            group
            for group in model.scale_groups(index)
            if any(schemes[ref.name] is not None for ref in group.readers)
        )
        for index in range(model.num_blocks)
    )


def _fates(
    model: CausalModel,
    fmt: Format,
    container: Container | None,
    weights: Sequence[PlannedWeight],
    reasons: Mapping[str, str],
    rescaled: Mapping[str, str],
) -> tuple[TensorFate, ...]:
    """One fate for every tensor of the source in the output's order: outside first, then blocks."""
    planned = {weight.name: weight for weight in weights}
    block_of = {n: i for i in range(model.num_blocks) for n in model.block_tensors(i)}
    kept = unquantizable(model)
    head_is = None if model.head is None else model.head.name
    found: list[TensorFate] = []
    for name in sorted(model.source.names(), key=lambda n: (block_of.get(n, -1), n)):
        info = model.source.info(name)
        weight = planned.get(name)
        scheme = None if weight is None else weight.scheme
        fate: Fate = "kept"
        output = (info,) if container is None else container.place(name)
        if weight is not None and scheme is not None:
            fate, reason = "quantized", reasons.get(name, "--lm-head")
            output = fmt.layout(weight, info.dtype)
        elif container is not None and not output:
            fate = "left out"
            reason = _UNUSED if name in model.unmapped else container.left_out
        elif name in rescaled:
            fate, reason = "rescaled", rescaled[name]
        elif name in model.unmapped:
            fate, reason = "copied", extra_reason(model, name) or _UNUSED
        elif name in kept:
            reason = kept[name]
        elif weight is not None and name != head_is:
            reason = reasons.get(name, "as stored")
        else:
            reason = reasons.get(name) or kept_reason(model, info, name in block_of)
            reason = "output head" if name == head_is else reason
        found.append(
            TensorFate(
                name=name,
                fate=fate,
                reason=reason,
                shape=info.shape,
                dtype=info.dtype,
                block=block_of.get(name),
                scheme=scheme,
                output=output,
            )
        )
    return tuple(found)


def _added(cache: CachePlan) -> tuple[TensorFate, ...]:
    """Scales that calibration makes, block by block."""
    return tuple(
        TensorFate(
            name=info.name,
            fate="added",
            reason=f"--kv {cache.scheme.name}",
            shape=info.shape,
            dtype=info.dtype,
            block=index,
            scheme=None,
            output=(info,),
        )
        for index, block in enumerate(cache.infos)
        for infos in block.values()
        for info in infos
    )


def _others(
    model: CausalModel, weights: Sequence[PlannedWeight], fates: Sequence[TensorFate]
) -> list[TensorInfo]:
    """What stays as it is: tensors by checkpoint name, linear layers by their module's name too.

    Readers look layers up by module, and transformers renames those of other towers.
    """
    infos = [info for fate in fates if fate.scheme is None for info in fate.output]
    skipped = {weight.module for weight in weights if weight.scheme is not None}
    skipped |= {info.name.removesuffix(".weight") for info in infos}
    return (
        infos
        + [
            TensorInfo(name=f"{path}.weight", dtype=model.dtype, shape=shape)
            for path, shape in model.linears.items()
            if path not in skipped
        ]
        + [
            TensorInfo(name=ref.parameter, dtype=model.dtype, shape=ref.shape)
            for layer in extra_weights(model)
            for ref in layer
            if ref.parameter.removesuffix(".weight") not in skipped
        ]
    )
