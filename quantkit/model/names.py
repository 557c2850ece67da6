"""Which checkpoint tensor fills which module parameter, by transformers' own conversion rules.

transformers 5 renames tensors on loading and fuses experts into 3-D parameters; quantkit addresses
weights by the checkpoint's names, so the same rules are followed backwards.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from quantkit.checkpoint.files import Source
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.errors import CheckpointError, ModelError, NumericsError
from quantkit.formats.format import fused_name
from quantkit.model.experts import uses_interface
from quantkit.model.refs import Piece

_MAX_LISTED = 3


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Tensors that transformers computes parameters from in other ways than by putting together.

    sources   pattern -> the checkpoint's tensors that match it, in their order
    first     the parameter that transformers' renaming gives for them; there may be more
    """

    model: nn.Module
    rule: WeightConverter
    first: str
    sources: Mapping[str, list[str]]

    def targets(self, source: Source) -> dict[str, TensorInfo]:
        """Path -> dtype and shape of the parameters; reads headers only."""

        def empty(name: str) -> torch.Tensor:
            info = source.info(name)
            return torch.empty(info.shape, dtype=info.dtype, device="meta")

        return {
            path: TensorInfo(name=path, dtype=value.dtype, shape=tuple(value.shape))
            for path, value in self._convert(empty).items()
        }

    def run(self, source: Source) -> dict[str, torch.Tensor]:
        """Path -> value, by transformers' own code.  Raises NumericsError for NaN or infinity."""
        return self._convert(lambda name: read_finite(source, name, None))

    def _convert(self, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        own = self.rule.copy(
            list(self.rule.source_patterns),
            list(self.rule.target_patterns),
            operations=self.rule.operations,
        )
        for pattern, names in self.sources.items():
            for name in names:
                own.add_tensor(self.first, name, pattern, lambda name=name: read(name))
        try:
            made = own.convert(self.first, model=self.model, config=self.model.config)
        # Of transformers' operations each fails in its own way.
        except Exception as error:
            kinds = " + ".join(type(op).__name__ for op in self.rule.operations)
            raise ModelError(
                f"{self.first}: transformers' conversion by {kinds} fails: {error}"
            ) from error
        return {path: v[0] if isinstance(v, list) else v for path, v in made.items()}


@dataclass(frozen=True, kw_only=True)
class NameMap:
    """Checkpoint names of every parameter, and what is left over.

    `pieces`: parameter (or persistent buffer) path -> the checkpoint tensors that fill it.
    `unmapped`: checkpoint tensors that no parameter takes.  `tied`: path -> the path it shares.
    `buffers`: the paths that are no parameters; a limit among them may be infinite.
    `conversions`: path -> what fills it from tensors that are no parts of it.
    """

    pieces: dict[str, tuple[Piece, ...]]
    unmapped: tuple[str, ...]
    tied: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    buffers: frozenset[str] = frozenset()
    conversions: Mapping[str, Conversion] = field(default_factory=dict)

    def of(self, path: str) -> tuple[Piece, ...]:
        """The pieces of a parameter, through tying.  Raises CheckpointError if it is missing."""
        pieces = self.pieces.get(path) or self.pieces.get(self.tied.get(path, ""))
        if not pieces:
            raise CheckpointError(
                f"{path}: the checkpoint has no tensor for it; the model needs all its weights"
            )
        return pieces

    def named(self, paths: Iterable[str]) -> frozenset[str]:
        """Checkpoint names of what fills parameters, none of those that share another's."""
        return frozenset(piece.name for path in paths for piece in self.pieces.get(path, ()))

    def shared_below(self, blocks: str) -> frozenset[str]:
        """Checkpoint names of what several of the blocks in the list at a path hold, as zamba's."""
        prefix = f"{blocks}."
        return frozenset(
            piece.name
            for path, origin in self.tied.items()
            if path.startswith(prefix) and origin.startswith(prefix)
            for piece in self.of(path)
        )

    def readable(self, path: str, expert: int | None) -> list[Piece]:
        """The pieces of a parameter, or of one of its slices.  ModelError if none is its own."""
        pieces = self.of(path)
        if pieces[0].opaque or (pieces[0].transposed and expert is None):
            raise ModelError(
                f"{pieces[0].name}: transformers computes {path} from this tensor on loading; "
                "quantkit follows renaming, the stacking of experts and rows put together in blocks"
            )
        found = [piece for piece in pieces if piece.expert == expert]
        if not found:
            raise ModelError(
                f"{pieces[0].name}: the checkpoint stores all experts in one tensor; quantkit "
                "quantizes checkpoints that store experts one by one"
            )
        return found

    def module(self, path: str) -> str:
        """What the checkpoint calls the module at a path: its tensors' names less their own."""
        for inner, pieces in self.under(path).items():
            if (prefix := pieces[0].name.removesuffix(f".{inner}")) != pieces[0].name:
                return prefix
        return path

    def under(self, prefix: str) -> dict[str, tuple[Piece, ...]]:
        """Parameters below a module path, by their paths within it."""
        start = f"{prefix}."
        return {
            path.removeprefix(start): pieces
            for path, pieces in self.pieces.items()
            if path.startswith(start)
        }


def map_names(model: nn.Module, source: Source) -> NameMap:
    """The map between a skeleton's parameters and a checkpoint's tensors; reads headers only.

    Raises ModelError for a conversion that fails, CheckpointError for a tensor whose shape does not
    fit.
    """
    state = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = getattr(model, "base_model_prefix", "")
    plain: dict[str, str] = {}
    fused: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    stacked: dict[str, list[Piece]] = defaultdict(list)
    unmapped = []

    def renamed(name: str) -> tuple[str, str | None]:
        """The parameter that transformers fills with a tensor, and the pattern of a conversion."""
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(
                name, [], [], base_model_prefix=prefix, meta_state_dict=state
            )
        return target, pattern

    turned = {None, *(p for p, rule in by_pattern.items() if _only_turns(rule))}
    for name in sorted(source.names(), key=dot_natural_key):
        target, pattern = renamed(name)
        if (
            target not in state
            and (piece := _stacked_piece(model, name, source, renamed, turned)) is not None
        ):
            stacked[piece.parameter].append(piece)
        elif target not in state:
            unmapped.append(name)
        elif pattern is None:
            plain[target] = name
        else:
            fused[target][pattern].append(name)
    computed = _computed(converters)
    pieces: dict[str, tuple[Piece, ...]] = {
        path: (Piece(name=name, parameter=path, split=computed(path)),)
        for path, name in plain.items()
    }
    conversions: dict[str, Conversion] = {}
    for path, by_source in fused.items():
        rule = by_pattern[next(iter(by_source))]
        found = _fused_pieces(path, rule, by_source, source, tuple(state[path].shape))
        if found is not None:
            pieces[path] = found
            continue
        made = Conversion(model=model, rule=rule, first=path, sources=dict(by_source))
        names = tuple(name for names in by_source.values() for name in names)
        for target in made.targets(source):
            conversions[target] = made
            pieces[target] = tuple(
                Piece(name=name, parameter=target, opaque=True) for name in names
            )
    pieces.update({path: tuple(found) for path, found in stacked.items()})
    shapes = {path: tuple(tensor.shape) for path, tensor in state.items()}
    for path, found in pieces.items():
        _check_shapes(path, found, shapes[path], source)
    parameters = {path for path, _ in model.named_parameters(remove_duplicate=False)}
    return NameMap(
        pieces=pieces,
        unmapped=tuple(unmapped),
        tied=_tied(model, pieces),
        shapes=shapes,
        buffers=frozenset(state.keys() - parameters),
        conversions=conversions,
    )


def _fused_pieces(
    path: str,
    rule: WeightConverter,
    by_source: dict[str, list[str]],
    source: Source,
    shape: tuple[int, ...],
) -> tuple[Piece, ...] | None:
    """Pieces of a parameter that several tensors make, one above the other, for each expert if the
    rule stacks experts; or one, transposed.  None if its parts are no tensors of the file."""
    if len(rule.operations) == 1 and isinstance(turn := rule.operations[0], Transpose):
        (name,) = next(iter(by_source.values()))
        stored = source.info(name).shape
        if turn.check_dims and stored == shape:
            return (Piece(name=name, parameter=path),)
        if {turn.dim0 % len(shape), turn.dim1 % len(shape)} == {len(shape) - 1, len(shape) - 2}:
            return (Piece(name=name, parameter=path, transposed=True),)
    stacks = bool(rule.operations) and isinstance(rule.operations[0], MergeModulelist)
    rest = rule.operations[stacks:]
    known = (
        all(isinstance(op, MergeModulelist) and op.dim == 0 for op in rule.operations[:stacks])
        and len(rest) <= 1
        and all(isinstance(op, Concatenate) and op.dim == int(stacks) for op in rest)
    )
    if not known:
        return None
    pieces = []
    start = 0
    for pattern in rule.source_patterns:
        names = by_source.get(pattern, [])
        if not names:
            raise CheckpointError(f"{path}: the checkpoint has no tensors like {pattern}")
        stop = start + source.info(names[0]).shape[0]
        pieces += [
            Piece(
                name=name,
                parameter=path,
                expert=number if stacks else None,
                rows=(start, stop) if rest else None,
            )
            for number, name in enumerate(names)
        ]
        start = stop
    return tuple(sorted(pieces, key=lambda piece: piece.expert or 0))


def _computed(converters: Sequence[WeightConverter]) -> Callable[[str], bool]:
    """Whether transformers, saving, would make other tensors of the parameter at a path."""
    followed = (Transpose, MergeModulelist, Concatenate)
    reverse = []
    for rule in converters:
        if not all(isinstance(operation, followed) for operation in rule.operations):
            # Of operations some have no reverse.
            with suppress(AttributeError, NotImplementedError, ValueError):
                reverse.append(rule.reverse_transform())
    return lambda path: any(rule.rename_source_key(path)[1] is not None for rule in reverse)


def _only_turns(rule: WeightConverter) -> bool:
    return all(isinstance(op, Transpose) for op in rule.operations)


def _stacked_piece(
    model: nn.Module,
    name: str,
    source: Source,
    renamed: Callable[[str], tuple[str, str | None]],
    turned: Collection[str | None],
) -> Piece | None:
    """The slice of a fused parameter that a tensor named by `format.expert_name` fills, or None.

    Experts are [O, I] by then, so of conversions those in `turned`, which transpose, say nothing.
    Outside of transformers' interface the shapes tell whether the parameter holds [I, O].
    """
    fused = fused_name(name)
    if fused is None:
        return None
    path, pattern = renamed(fused[0])
    owner = model
    try:
        owner = model.get_submodule(path.rpartition(".")[0])
    except AttributeError:
        return None
    parameter = owner._parameters.get(path.rpartition(".")[2])
    if parameter is None or parameter.dim() != 3 or pattern not in turned:
        return None
    if uses_interface(owner):
        transposed = bool(getattr(owner, "is_transposed", False))
    else:
        transposed = source.info(name).shape != tuple(parameter.shape[1:])
    return Piece(name=name, parameter=path, expert=fused[1], split=True, transposed=transposed)


def _check_shapes(
    path: str, pieces: tuple[Piece, ...], shape: tuple[int, ...], source: Source
) -> None:
    if any(piece.opaque for piece in pieces):
        return
    for piece in pieces:
        stored = source.info(piece.name).shape
        expected = (*shape[:-2], shape[-1], shape[-2]) if piece.transposed else shape
        if piece.expert is None and piece.rows is not None:
            expected = (piece.rows[1] - piece.rows[0], *shape[1:])
        elif piece.expert is not None:
            if piece.expert >= shape[0]:
                raise CheckpointError(
                    f"{piece.name}: config.json asks for {shape[0]} experts; weights and config "
                    "belong to different models"
                )
            slice_ = shape[:0:-1] if piece.transposed else shape[1:]
            rows = piece.rows or (0, slice_[0])
            expected = (rows[1] - rows[0], *slice_[1:])
        if stored != expected:
            raise CheckpointError(
                f"{piece.name}: the checkpoint holds {list(stored)}, config.json asks for "
                f"{list(expected)}; weights and config belong to different models"
            )
    filled = sum(math.prod(source.info(piece.name).shape) for piece in pieces)
    if filled != math.prod(shape):
        raise CheckpointError(
            f"{path}: {filled} of {math.prod(shape)} elements are in the checkpoint; "
            f"the first tensor is {pieces[0].name}; an expert is missing"
        )


def _tied(model: nn.Module, pieces: dict[str, tuple[Piece, ...]]) -> dict[str, str]:
    """Missing parameters that share another's tensor, whichever of the two the file holds."""
    tied = {}
    for target, origin in getattr(model, "all_tied_weights_keys", {}).items():
        if target not in pieces and origin in pieces:
            tied[target] = origin
        elif origin not in pieces and target in pieces:
            tied[origin] = target
    return tied


def check_complete(names: NameMap, paths: list[str]) -> None:
    """Raises CheckpointError that lists the parameters for which the checkpoint has no tensor."""
    missing = [path for path in paths if path not in names.pieces and names.tied.get(path) is None]
    if missing:
        listed = ", ".join(missing[:_MAX_LISTED])
        more = f" and {len(missing) - _MAX_LISTED} more" if len(missing) > _MAX_LISTED else ""
        raise CheckpointError(
            f"the checkpoint has no tensor for {listed}{more}; "
            "all of the model's weights are needed"
        )


def load_into(
    part: nn.Module,
    path: str,
    names: NameMap,
    source: Source,
    device: torch.device,
    *,
    only: str | None = None,
) -> None:
    """Reads all parameters and persistent buffers of `part`, which is at `path` in the model.

    With `only` just the one of that name that `part` holds itself.  Each gets the dtype that it has
    in the skeleton (integers keep theirs).  Holds one checkpoint tensor beside the part.
    """
    for inner, module in part.named_modules() if only is None else [("", part)]:
        prefix = "".join(f"{part}." for part in (path, inner) if part)
        for key, old in module._parameters.items():
            if old is not None and old.is_meta and only in (None, key):
                value = read_parameter(names, f"{prefix}{key}", source, old.dtype).to(device)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
        for key, buffer in module._buffers.items():
            if key in module._non_persistent_buffers_set or only not in (None, key):
                continue
            if buffer is not None and buffer.is_meta:
                value = read_parameter(names, f"{prefix}{key}", source, buffer.dtype)
                module._buffers[key] = value.to(device)


def read_parameter(
    names: NameMap, path: str, source: Source, dtype: torch.dtype | None
) -> torch.Tensor:
    """The parameter's value, put together from its pieces; `dtype` None keeps the stored one.

    Fresh memory; holds one checkpoint tensor beside it.  Raises NumericsError for NaN or infinity
    in a parameter.
    """
    pieces = names.of(path)
    if pieces[0].opaque:
        value = names.conversions[pieces[0].parameter].run(source)[pieces[0].parameter]
        return value if dtype is None or not value.is_floating_point() else value.to(dtype)
    if path in names.buffers:
        return read_finite(source, pieces[0].name, dtype, limits=True)
    if pieces[0].expert is None and pieces[0].rows is None and not pieces[0].transposed:
        return read_finite(source, pieces[0].name, dtype)
    first = source.info(pieces[0].name).dtype
    whole = torch.empty(names.shapes[path], dtype=dtype or first)
    for piece in pieces:
        piece.part_of(whole).copy_(read_finite(source, piece.name, dtype))
    return whole


def read_finite(
    source: Source, name: str, dtype: torch.dtype | None, *, limits: bool = False
) -> torch.Tensor:
    """A checkpoint tensor in `dtype` (of floating point); NumericsError if it is not finite.

    `limits` lets infinity through, as where nothing is to be cut off.
    """
    tensor = source.read(name)
    if not tensor.is_floating_point():
        return tensor
    if dtype is not None:
        tensor = tensor.to(dtype)
    # aminmax lets NaN through and needs no memory, unlike isfinite.
    edges = torch.aminmax(tensor) if tensor.numel() else ()
    if not all(bool(edge.isnan().logical_not() if limits else edge.isfinite()) for edge in edges):
        where = "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}"
        raise NumericsError(
            f"{name}: the weight holds NaN or infinity{where}; the checkpoint is damaged or was "
            "saved in a type too small for it; get it anew"
        )
    return tensor
