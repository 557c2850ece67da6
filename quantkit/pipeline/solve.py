"""From weights and statistics to quantized tensors: the arithmetic of one block, without any I/O.

Letters: O out features, I in features, G groups per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.calibration.spans import phase
from quantkit.errors import RecipeError
from quantkit.methods.extent import Extent, share_scales
from quantkit.methods.fidelity import Cost, beyond_half, cost_of, unheld_groups
from quantkit.methods.parts import (
    GroupRange,
    Outputs,
    Range,
    Reader,
    Refine,
    Rounding,
    Target,
    Transform,
)
from quantkit.methods.stats import Stats
from quantkit.model.refs import ScaleGroup, WeightRef
from quantkit.numbers.activations import static_input_scale
from quantkit.numbers.grid import blocks
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.superblock import BlockScale
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

# Weights on block types of ggml that are solved together: a function of the shape alone.
BLOCK_CHUNK = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A quantized weight and what it cost.

    cost         its error, what the grid alone would give, and the clipped share
    beyond_half  scales that float16 would round
    degraded     what had to be done instead of what the recipe says, and what was lost; or None
    """

    ref: WeightRef
    tensor: QuantizedTensor
    cost: Cost
    beyond_half: int
    degraded: str | None


def quantize_weights(
    refs: Sequence[WeightRef],
    weights: Sequence[Tensor],
    scheme: Scheme,
    stats: Stats | None,
    *,
    target: Target | None,
    range_part: Range,
    rounding: Rounding,
    dtype: torch.dtype,
) -> list[Solved]:
    """Quantized weights [O, I] of one input and scheme; one rounding call serves them all.

    `scheme.half_scales` says that the file will store their scales in float16.  Block types of ggml
    are solved rows by rows, which bounds their memory.
    """
    floats = [weight.to(torch.float32) for weight in weights]
    astray: str | None = None
    if target is not None:
        with phase("target"):
            moved = target(_stack(floats), stats)
        floats = list(moved.weight.split([len(weight) for weight in floats]))
        astray = moved.degraded
    if scheme.kind == "ggml":
        return [
            _solve_blocks(ref, weight, scheme, stats, range_part, rounding, dtype, astray)
            for ref, weight in zip(refs, floats, strict=True)
        ]
    with phase("range"):
        found = share_scales(
            [
                range_part(ref.name, weight, scheme, stats)
                for ref, weight in zip(refs, floats, strict=True)
            ],
            scheme,
        )
    input_scale, unseen = _input_scale(scheme, stats)
    stackable = all(group_range.coding.ndim == 2 for group_range in found)
    batches = [list(range(len(refs)))] if stackable else [[k] for k in range(len(refs))]
    solved: list[Solved] = []
    for batch in batches:
        with phase("rounding"):
            rounded = rounding(
                _stack([floats[k] for k in batch]),
                scheme,
                _stack([found[k].coding for k in batch]),
                _stack_zeros([found[k] for k in batch]),
                stats,
            )
        stop = 0
        for k in batch:
            rows = slice(stop, stop := stop + len(floats[k]))
            scale, zero = found[k].scale, found[k].zero
            if rounded.scale is not None:
                scale = PlainScale(tensor=rounded.scale[rows].contiguous())
                zero = None if rounded.zero is None else rounded.zero[rows].contiguous()
            tensor = QuantizedTensor(
                codes=rounded.codes[rows].contiguous(),
                scale=scale,
                zero=None if zero is None else zero.to(torch.uint8),
                scheme=dataclasses.replace(scheme, half_scales=False),
                dtype=dtype,
                input_scale=input_scale,
            )
            notes = (astray, found[k].degraded, rounded.degraded, unseen)
            solved.append(_solved(refs[k], floats[k], tensor, scheme, stats, notes))
    return solved


def refine_weights(
    part: Refine, solved: Sequence[Solved], half: Sequence[bool], outputs: Outputs
) -> tuple[list[Solved], tuple[float, float]]:
    """A block's weights refined, and the loss of its outputs before and after.

    half: whether the file stores a weight's scales in float16.  Costs stay those of each weight for
    itself before.
    """
    given = [
        dataclasses.replace(
            weight.tensor, scheme=dataclasses.replace(weight.tensor.scheme, half_scales=is_half)
        )
        for weight, is_half in zip(solved, half, strict=True)
    ]
    with phase("refine"):
        answer = part(given, outputs)
    found = []
    for weight, moved in zip(solved, answer.tensors, strict=True):
        tensor = dataclasses.replace(moved, scheme=weight.tensor.scheme)
        tensor.check(weight.ref.name)
        found.append(dataclasses.replace(weight, tensor=tensor, beyond_half=beyond_half(tensor)))
    return found, (float(f"{answer.before:.6g}"), float(f"{answer.after:.6g}"))


def _solve_blocks(
    ref: WeightRef,
    weight_OI: Tensor,
    scheme: Scheme,
    stats: Stats | None,
    range_part: Range,
    rounding: Rounding,
    dtype: torch.dtype,
    astray: str | None,
) -> Solved:
    """A weight on a block type's grid; rows are independent, so parts of them are solved apart."""
    scales, codes, notes = [], [], [astray]
    step = max(1, BLOCK_CHUNK // weight_OI.shape[1])
    for start in range(0, len(weight_OI), step):
        part = weight_OI[start : start + step].contiguous()
        with phase("range"):
            chosen = range_part(ref.name, part, scheme, stats)
        if not isinstance(chosen.scale, BlockScale):
            raise RecipeError(f"{scheme.name}: the recipe's range fits no block types of ggml")
        with phase("rounding"):
            rounded = rounding(part, scheme, chosen.coding, chosen.zero, stats)
        scales.append(chosen.scale)
        codes.append(rounded.codes)
        notes += [chosen.degraded, rounded.degraded]
    tensor = QuantizedTensor(
        codes=codes[0] if len(codes) == 1 else torch.cat(codes),
        scale=BlockScale.joined(scales),
        zero=None,
        scheme=dataclasses.replace(scheme, half_scales=False),
        dtype=dtype,
    )
    return _solved(ref, weight_OI, tensor, scheme, stats, tuple(dict.fromkeys(notes)))


def _solved(
    ref: WeightRef,
    weight_OI: Tensor,
    tensor: QuantizedTensor,
    scheme: Scheme,
    stats: Stats | None,
    fallbacks: Sequence[str | None],
) -> Solved:
    """The weight with its cost and what had to be done instead; `scheme` as it was solved for."""
    with phase("error"):
        tensor.check(ref.name)
        cost = cost_of(weight_OI, tensor, stats)
        return Solved(
            ref=ref,
            tensor=tensor,
            cost=cost,
            beyond_half=beyond_half(tensor),
            degraded=_notes(weight_OI, scheme, stats, cost, fallbacks),
        )


def choose_scale(
    transform: Transform,
    group: ScaleGroup,
    weights: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme | None],
    stats: Stats,
) -> Tensor | None:
    """The vector [C] a scale group is folded by, one entry per producer channel, or None."""
    readers = [
        Reader(name=ref.name, weight=weights[ref.name].to(torch.float32), scheme=schemes[ref.name])
        for ref in group.readers
    ]
    identity = torch.arange(len(group.channel_map))
    shared = None if torch.equal(group.channel_map, identity) else group.channel_map
    scale_I = transform(readers, stats, shared)
    return None if scale_I is None else group.pool(scale_I)


def _input_scale(scheme: Scheme, stats: Stats | None) -> tuple[Tensor | None, str | None]:
    """What calibration gives the input of these weights, and a note if it saw none."""
    if not scheme.static_input:
        return None, None
    if stats is None or stats.count == 0:
        return torch.tensor(1.0), "input scale 1: no calibration token reached this weight"
    return torch.tensor(static_input_scale(float(stats.max_abs.max()), scheme)), None


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _stack_zeros(found: Sequence[GroupRange]) -> Tensor | None:
    zeros = [group_range.zero for group_range in found if group_range.zero is not None]
    return _stack(zeros) if zeros else None


def _notes(
    weight_OI: Tensor,
    scheme: Scheme,
    stats: Stats | None,
    cost: Cost,
    fallbacks: Sequence[str | None],
) -> str | None:
    groups = blocks(weight_OI, scheme)
    # Faster than aminmax.
    lowest, highest = groups.amin(1), groups.amax(1)
    extent = Extent(low=lowest.clamp(max=0), high=highest.clamp(min=0))
    lost = (unheld_groups(extent, scheme), cost.note)
    notes = [note for note in (*fallbacks, *lost) if note is not None]
    zero_rows = int((weight_OI.abs().amax(1) == 0).sum())
    if zero_rows:
        notes.append(f"{zero_rows} rows are all zero")
    if constant := int(((lowest == highest) & (highest != 0)).sum()):
        notes.append(f"{constant} groups are constant")
    if stats is not None and stats.count == 0 and not any(fallbacks):
        notes.append("no calibration token reached this expert")
    elif stats is not None and stats.count:
        dead = int((stats.sum_sq == 0).sum())
        if dead:
            notes.append(f"{dead} input channels are dead in calibration")
        if stats.gram is not None and stats.gram.ndim == 2 and stats.count < stats.features:
            notes.append(
                f"rank-deficient Hessian: {stats.count} tokens for {stats.features} channels"
            )
    return "; ".join(notes) or None
