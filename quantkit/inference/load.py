"""Quantized checkpoints as Hugging Face models, and quantized weights put into a live model."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quantkit_kernels.ops import int8_dot
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkit.checkpoint.output import refuse_unfinished
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError, ModelError, ShapeError
from quantkit.formats.format import Format, StoredWeight
from quantkit.formats.open import open_source
from quantkit.formats.registry import reader_of
from quantkit.inference.backend import Backend, check_backend, moved
from quantkit.inference.experts import PackedExperts
from quantkit.inference.fused import fuse_
from quantkit.inference.layers import QuantExperts, QuantLinear, RowParts
from quantkit.inference.save import SavedTensors, attach_quantizer_, find_module
from quantkit.model import skeleton, stacks
from quantkit.model.decoded import Decoded
from quantkit.model.experts import uses_interface
from quantkit.model.extra_layers import find_extra_layers
from quantkit.model.names import NameMap, check_complete, map_names, read_parameter
from quantkit.model.refs import Piece
from quantkit.numbers.tensor import QuantizedTensor

_GENERATION = "generation_config.json"
Quantized = Callable[[str], QuantizedTensor]
# (checkpoint name, bias, dtype of the activations) -> the layer
_Layer = Callable[[str, Tensor | None, torch.dtype], QuantLinear]
_LOG = logging.getLogger(__name__)


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    fuse: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a checkpoint, ready for `generate`; quantized layers stay so in memory.

    `dtype` is what it computes in (default: the config's).  `backend` says what multiplies: auto,
    triton (CUDA), cpu, cpu-int8 (the fastest at decoding: codes times activations rounded to int8,
    compiled on first use) or reference (plain PyTorch); weights that have no kernel run on the
    reference, with a warning that says why.  `fuse` multiplies q/k/v, and gate with up, at once
    where they have one scheme; results and what is saved stay the same.  An unquantized checkpoint
    gives the plain model.  Raises CheckpointError for an unfinished or damaged output, FormatError
    for a quantized one in an unknown format, BackendError for a backend that cannot run on the
    device.
    """
    chosen = check_backend(backend, device)
    refuse_unfinished(path)
    source = open_source(path, revision=revision)
    fmt = reader_of(source)
    stored = fmt.weights(source) if fmt is not None else {}
    view = Decoded(source, fmt, stored)
    model = skeleton.build(view, trust_remote_code=trust_remote_code, dtype=dtype)
    view.transposed = skeleton.conv1d_names(model, view.names())
    names = map_names(model, view)
    check_all_used(stored, names, model, view)
    check_complete(names, list(model.state_dict()))

    def unpack(name: str) -> QuantizedTensor:
        assert fmt is not None
        return moved(fmt.unpack(stored[name], source), lambda part: part.to(device))

    # Rows are taken from embeddings: those of a file of blocks are decoded, a tied head with them.
    tables = names.named(skeleton.tables(model))
    replace_modules_(
        model,
        names,
        frozenset(stored) - tables,
        unpack,
        lambda path, old: _read(names, path, view, old),
        chosen,
    )
    if fuse:
        _LOG.info("%d products of projections that share an input", fuse_(model))
    _fill_(model, names, view)
    _tie_(model, names)
    if fmt is not None:
        opaque = (p.name for pieces in names.pieces.values() for p in pieces if p.opaque)
        unfilled = dict.fromkeys((*names.unmapped, *opaque))
        extra = (*stored_names(unfilled, stored), *view.cache_names)
        saved = SavedTensors(
            pieces=pieces_of(names), transposed=view.transposed, extra=extra, source=source
        )
        told = source.config.get("quantization_config", {"quant_method": fmt.name})
        attach_quantizer_(model, fmt, told, saved)
    _attach_generation_config_(model, source)
    model.config._name_or_path = os.fspath(path)
    model.name_or_path = os.fspath(path)
    model.eval()
    model.requires_grad_(False)
    return model.to(device)


def install_(
    model: PreTrainedModel,
    tensors: Mapping[str, QuantizedTensor],
    rescaled: Mapping[str, Tensor],
    *,
    names: NameMap,
    fmt: Format,
    quantization_config: Mapping[str, Any],
    beside: Mapping[str, Tensor] | None = None,
) -> None:
    """Replaces modules of a live model by quantized ones and writes the tensors folds have changed.

    Both mappings go by checkpoint names; entries are read block by block, so they may be lazy: once
    each, twice those of experts that turn out not to fit one kernel.  `names` is the map of the
    model before this call; `beside` are small tensors of the checkpoint that no module holds.
    A quantized head that was tied gets untied.  Afterwards `save_pretrained` writes the canonical
    quantized checkpoint.
    """
    names = _untie_(model, names, frozenset(tensors))
    pieces = pieces_of(names)
    by_name = {piece.name: piece for piece in pieces}
    for name in (*tensors, *rescaled):
        if name not in by_name:
            raise ModelError(f"{name}: the model has no parameter for this tensor")
    transposed = skeleton.conv1d_names(model, tuple(by_name))
    for name, value in rescaled.items():
        _write_(model, by_name[name], value)
    replace_modules_(
        model,
        names,
        frozenset(tensors),
        lambda name: moved(tensors[name], lambda part: part.to(model.device)),
        lambda path, old: old.detach(),
        "auto",
    )
    saved = SavedTensors(
        pieces=pieces, transposed=transposed, extra=(), source=None, beside=beside or {}
    )
    attach_quantizer_(model, fmt, quantization_config, saved)
    model.eval()


@dataclass(frozen=True, kw_only=True)
class Target:
    """A module to replace and the parameters of it that are quantized, with their pieces."""

    path: str
    module: nn.Module
    parameters: dict[str, tuple[Piece, ...]]


def replace_modules_(
    model: nn.Module,
    names: NameMap,
    quantized: frozenset[str],
    tensor: Quantized,
    keep: Callable[[str, Tensor], Tensor],
    backend: Backend,
) -> None:
    """Puts QuantLinear and QuantExperts where `quantized` checkpoint names are held.

    `tensor(name)` gives a quantized weight; `keep(path, old)` the value of a parameter that stays
    beside it (a bias, a fused projection with some experts kept).  Logs what has no kernel, and
    what decodes slowly on CPUs where a backend that must be asked for does not.
    """
    fallbacks: Counter[tuple[str, str]] = Counter()
    slow = 0

    def layer(name: str, bias: Tensor | None, dtype: torch.dtype) -> QuantLinear:
        nonlocal slow
        weight = tensor(name)
        linear = QuantLinear(weight, bias, backend=backend, dtype=dtype)
        if linear.fallback is not None:
            kernel = "the plain reference path"
            if linear.kernel.name != "reference":
                kernel = f"{linear.kernel.name} instead of {backend}"
            fallbacks[kernel, f"{linear.scheme.name}: {linear.fallback}"] += 1
        slow += linear.kernel.decodes_always and weight.codes.device.type == "cpu"
        return linear

    for target in targets_of(model, names, quantized):
        if _is_fused(target):
            new: nn.Module = _experts(target, quantized, tensor, layer, keep, backend)
        else:
            new = _linear(target, quantized, layer, keep)
        parent, _, leaf = target.path.rpartition(".")
        setattr(find_module(model, parent), leaf, new)
    for (kernel, reason), count in sorted(fallbacks.items()):
        _LOG.warning("%d weights run on %s, %s", count, kernel, reason)
    if slow and backend == "auto" and int8_dot.processor_suits():
        _LOG.warning(
            "%d weights are decoded whole for every token, which is slow; backend cpu-int8 "
            "multiplies their codes, with activations rounded to int8",
            slow,
        )


def targets_of(model: nn.Module, names: NameMap, quantized: frozenset[str]) -> Iterable[Target]:
    """The modules that hold a quantized weight."""
    found: dict[str, dict[str, tuple[Piece, ...]]] = {}
    for parameter, pieces in names.pieces.items():
        if any(piece.name in quantized for piece in pieces):
            path, _, leaf = parameter.rpartition(".")
            found.setdefault(path, {})[leaf] = pieces
    for path, parameters in found.items():
        yield Target(path=path, module=find_module(model, path), parameters=parameters)


def _is_fused(target: Target) -> bool:
    return any(
        piece.expert is not None for pieces in target.parameters.values() for piece in pieces
    )


def _linear(
    target: Target,
    quantized: frozenset[str],
    layer: _Layer,
    keep: Callable[[str, Tensor], Tensor],
) -> QuantLinear | RowParts:
    module = target.module
    if not isinstance(module, (nn.Linear, Conv1D)) or set(target.parameters) != {"weight"}:
        raise ModelError(
            f"{target.path}: a {type(module).__name__} cannot be replaced by a quantized layer"
        )
    pieces = target.parameters["weight"]
    name = pieces[0].name
    bias = module.bias
    kept = None if bias is None else keep(f"{target.path}.bias", bias)
    if len(pieces) > 1:
        dtype = module.weight.dtype
        if any(piece.name not in quantized for piece in pieces):
            raise ModelError(
                f"{target.path}: some of its rows are quantized and some are not; give all of "
                f"{', '.join(piece.name for piece in pieces)} one scheme, or keep all"
            )
        return RowParts([layer(piece.name, None, dtype) for piece in _in_order(pieces)], kept)
    linear = layer(name, kept, module.weight.dtype)
    shape = tuple(module.weight.shape)
    expected = shape[::-1] if isinstance(module, Conv1D) else shape
    found = (linear.out_features, linear.in_features)
    if found != expected:
        raise ShapeError(f"{name}: quantized as {found}, the model holds {expected}")
    return linear


def _experts(
    target: Target,
    quantized: frozenset[str],
    tensor: Quantized,
    layer: _Layer,
    keep: Callable[[str, Tensor], Tensor],
    backend: Backend,
) -> QuantExperts:
    projections: dict[str, list[list[nn.Module]] | PackedExperts] = {}
    for leaf, pieces in target.parameters.items():
        old = target.module.get_parameter(leaf)
        if uses_interface(target.module) and all(piece.name in quantized for piece in pieces):
            packed = _packed_experts(pieces, tensor, old.dtype, backend)
            if packed is not None:
                projections[leaf] = packed
                continue
        kept = None
        if any(piece.name not in quantized for piece in pieces):
            kept = keep(f"{target.path}.{leaf}", old)
        experts: list[list[nn.Module]] = [[] for _ in range(old.shape[0])]
        for piece in _in_order(pieces):
            assert piece.expert is not None
            if piece.name in quantized:
                experts[piece.expert].append(layer(piece.name, None, old.dtype))
            else:
                assert kept is not None
                experts[piece.expert].append(_plain(piece.part_of(kept)))
        projections[leaf] = experts
    return QuantExperts(target.module, projections)


def _packed_experts(
    pieces: Sequence[Piece], tensor: Quantized, dtype: torch.dtype, backend: Backend
) -> PackedExperts | None:
    """All experts of a projection in one product, or None if their weights differ in kind."""
    names: dict[int, list[str]] = {}
    for piece in _in_order(pieces):
        names.setdefault(piece.expert or 0, []).append(piece.name)
    experts = iter(names.values())
    first = [tensor(name) for name in next(experts)]
    if PackedExperts.supported(first[0], dtype, backend) is not None:
        return None
    rest = ([tensor(name) for name in found] for found in experts)
    return PackedExperts.of(itertools.chain([first], rest))


def _in_order(pieces: Iterable[Piece]) -> list[Piece]:
    return sorted(pieces, key=lambda piece: (piece.expert or 0, piece.rows or (0, 0)))


def _plain(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


def _read(names: NameMap, path: str, source: Source, old: Tensor) -> Tensor:
    return read_parameter(names, path, source, old.dtype if old.is_floating_point() else None)


def _fill_(model: PreTrainedModel, names: NameMap, source: Source) -> None:
    """Computes buffers that are not stored, then reads all that is still on the meta device."""
    # First: initialising a module for its buffers would overwrite its weight (Gemma's embedding).
    skeleton.fill_buffers(model, model, "")
    read_missing_(model, names, source)
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    empty = [path for path, tensor in tensors if tensor.is_meta and path not in names.tied]
    if empty:
        raise ModelError(
            f"{empty[0]}: nothing of the checkpoint fills it, nor does the model's code"
        )


def read_missing_(model: PreTrainedModel, names: NameMap, source: Source) -> None:
    """Reads every parameter and buffer that is still on the meta device."""
    for path in names.pieces:
        parent, _, leaf = path.rpartition(".")
        module = find_module(model, parent)
        module = module.base if isinstance(module, QuantExperts) else module
        old = getattr(module, leaf, None)
        if not isinstance(old, Tensor) or not old.is_meta:
            continue
        value = _read(names, path, source, old)
        if isinstance(old, nn.Parameter):
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        else:
            setattr(module, leaf, value)


def _tie_(model: PreTrainedModel, names: NameMap) -> None:
    """Makes tied parameters one object, whichever of the two the checkpoint holds."""
    for path, origin in names.tied.items():
        parent, _, leaf = path.rpartition(".")
        source, _, source_leaf = origin.rpartition(".")
        setattr(find_module(model, parent), leaf, getattr(find_module(model, source), source_leaf))


def _untie_(model: PreTrainedModel, names: NameMap, quantized: frozenset[str]) -> NameMap:
    """The names of the model after a quantized head was given a weight of its own."""
    known = {piece.name for pieces in names.pieces.values() for piece in pieces}
    heads = [name for name in quantized if name not in known]
    pieces = dict(names.pieces)
    tied = dict(names.tied)
    for name in heads:
        paths = [path for path in tied if path == name or path.endswith(f".{name}")]
        if len(paths) != 1:
            continue
        pieces[paths[0]] = (Piece(name=name, parameter=paths[0]),)
        del tied[paths[0]]
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
        model.all_tied_weights_keys = {
            key: value
            for key, value in model.all_tied_weights_keys.items()
            if paths[0] not in (key, value)
        }
    return dataclasses.replace(names, pieces=pieces, tied=tied)


def _write_(model: nn.Module, piece: Piece, value: Tensor) -> None:
    """Copies a checkpoint tensor into the parameter it fills."""
    parent, _, leaf = piece.parameter.rpartition(".")
    whole: Tensor = getattr(find_module(model, parent), leaf)
    part = piece.part_of(whole)
    if part.shape != value.shape:
        raise ShapeError(f"{piece.name}: {list(value.shape)} given, the model holds {part.shape}")
    with torch.no_grad():
        part.copy_(value)


def pieces_of(names: NameMap) -> tuple[Piece, ...]:
    """The pieces of all parameters but those that a conversion fills."""
    return tuple(piece for pieces in names.pieces.values() for piece in pieces if not piece.opaque)


def stored_names(names: Iterable[str], stored: Mapping[str, StoredWeight]) -> tuple[str, ...]:
    """The tensors of a checkpoint behind names, of quantized weights those that they lie in."""
    found = (stored[name].tensors if name in stored else (name,) for name in names)
    return tuple(dict.fromkeys(itertools.chain.from_iterable(found)))


def check_all_used(
    stored: Mapping[str, StoredWeight], names: NameMap, model: PreTrainedModel, source: Source
) -> None:
    """CheckpointError if a quantized weight has no place, in the model nor in extra layers."""
    lost = sorted(set(stored).intersection(names.unmapped))
    if lost:
        stack = stacks.find_stack(model)
        known = tuple(layer.prefix for layer in find_extra_layers(names, source, stack.paths))
        lost = [name for name in lost if not name.startswith(known)]
    if lost:
        raise CheckpointError(f"{lost[0]}: quantized, but the model has no parameter for it")


def _attach_generation_config_(model: PreTrainedModel, source: Source) -> None:
    if not model.can_generate():
        return
    found = source.side_files().get(_GENERATION)
    if isinstance(found, Path):
        try:
            model.generation_config = GenerationConfig.from_pretrained(found.parent)
        # transformers checks some fields by using them, and raises whatever comes of that.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{found}: no settings for generating ({ascii(reason)[1:-1][:200]}); mend or "
                "remove it"
            ) from error
    else:
        model.generation_config = GenerationConfig.from_model_config(model.config)
