"""A tensor of a quantized checkpoint against the tensor it was made from, folds divided out.

Letters: O out features, I in features, G groups per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.source import Source
from quantkit.checks.coverage import Spelling
from quantkit.model.fold_vectors import folds_since
from quantkit.numbers.grid import grid_of
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import QuantizedTensor

# Elements compared at a time.
_ELEMENTS = 1 << 22
# Half of a row's weights stay within this many steps of the source.  Rounding to the nearest gives
# 0.25, GPTQ 0.3 to 0.6; the median ignores clipped outliers and dead columns.
_MEDIAN_STEPS = 1.5
# Unrelated weights of equal norm differ by 1.41; the coarsest scheme (2 bits) stays below 1.
_RELATIVE_ERROR = 1.2
# A fold rounds once to the stored dtype; a weight may be folded as reader and as producer.
_ROUNDINGS = 2
# Gemma's norms multiply by 1 + weight: what was divided is not the stored number itself.
_NORM_OFFSETS = (0.0, 1.0)


@dataclass(frozen=True)
class Vectors:
    """What transforms multiplied readers' columns by and divided producers' rows by.

    `retargeted`: codes are near a target that lies any number of steps away from the weight.
    """

    tensors: Mapping[str, Tensor]
    retargeted: bool = False

    def columns(self, name: str) -> Tensor | None:
        """Float32 [I], or None if the tensor's columns were not changed."""
        return self.tensors.get(f"{name}:columns")

    def rows(self, name: str) -> Tensor | None:
        """Float32 [O], or None if the tensor's rows were not changed."""
        return self.tensors.get(f"{name}:rows")

    def change(self, name: str) -> bool:
        """True if the tensor has vectors."""
        return self.rows(name) is not None or self.columns(name) is not None

    def folded(self, name: str, weight_OI: Tensor, start: int = 0) -> Tensor:
        """Rows `start`... of a source weight, in float32, as they were when it was quantized."""
        weight = weight_OI.to(torch.float32)
        if (columns := self.columns(name)) is not None:
            weight = weight * columns
        if (rows := self.rows(name)) is not None:
            weight = weight / rows[start : start + len(weight), None]
        return weight


def vectors_since(ours: Source, reference: Source, report: Mapping[str, Any]) -> Vectors:
    """What transforms did to the weights of `ours`, whose report is given, since `reference`.

    By the names that `ours` has for its tensors.  Raises CheckpointError for damaged files.
    """
    here = Spelling(ours.names())
    found: dict[str, Tensor] = {}
    for key, vector in folds_since(ours.home, reference.home).items():
        name, _, axis = key.rpartition(":")
        found[f"{here(name) or name}:{axis}"] = vector
    return Vectors(found, _retargeted(report))


def _retargeted(report: Mapping[str, Any]) -> bool:
    """Whether a recipe with a target or a refinement made the checkpoint of a report."""
    recipe = report.get("recipe") or {}
    return any(recipe.get(kind) is not None for kind in ("target", "refine"))


def same_numbers(tensor: QuantizedTensor, expected: QuantizedTensor) -> bool:
    """Whether two weights decode to the same values, whatever their codes count from."""
    if tensor.shape != expected.shape:
        return False
    step = max(1, _ELEMENTS // max(tensor.shape[1], 1))
    flat = tensor.scheme.flat or expected.scheme.flat
    # Blocks that straddle rows cannot be decoded by rows.
    step = tensor.shape[0] if flat else step
    return all(
        torch.equal(tensor.decode(rows), expected.decode(rows))
        for rows in (slice(start, start + step) for start in range(0, tensor.shape[0], step))
    )


def compare_copied(name: str, original: str, ours: Source, theirs: Source) -> Iterator[str]:
    """A problem if the two tensors differ in dtype, shape or any bit; `original` is its name in the
    source."""
    info, its_info = ours.info(name), theirs.info(original)
    if (info.dtype, info.shape) != (its_info.dtype, its_info.shape):
        yield f"{name}: {info.dtype} {info.shape}, in the source {its_info.dtype} {its_info.shape}"
        return
    for start in range(0, info.numel, _ELEMENTS):
        stop = min(start + _ELEMENTS, info.numel)
        mine = ours.read_flat(name, start, stop)
        its = theirs.read_flat(original, start, stop)
        if not torch.equal(mine.view(torch.uint8), its.view(torch.uint8)):
            yield f"{name}: not the same bits as in the source, though it was not to be changed"
            return


def compare_recast(
    name: str, original: str, ours: Source, theirs: Source, vectors: Vectors
) -> Iterator[str]:
    """A problem if the tensor is not the source's in another dtype, its folds applied."""
    mine, its = ours.read(name), theirs.read(original)
    if mine.shape != its.shape:
        yield f"{name}: {list(mine.shape)}, in the source {list(its.shape)}"
    elif vectors.change(name):
        yield from compare_rescaled(name, original, ours, theirs, vectors)
    elif not any(_close(mine, its, offset) for offset in _NORM_OFFSETS):
        yield f"{name}: not the source's tensor, though it was not to be changed"


def compare_rescaled(
    name: str, original: str, ours: Source, theirs: Source, vectors: Vectors
) -> Iterator[str]:
    """A problem if the tensor is not the source's with its folds applied, up to rounding."""
    mine, its = ours.read(name), theirs.read(original)
    if mine.shape != its.shape or (mine.dtype != its.dtype and not ours.recast):
        yield f"{name}: {mine.dtype} {mine.shape}, in the source {its.dtype} {its.shape}"
        return
    rows, columns = vectors.rows(name), vectors.columns(name)
    # A rotation is worked out anew, on another machine perhaps.
    fits = not vectors.change(name) and _close(mine, its.float(), 0.0)
    if mine.ndim == 1 and rows is not None and len(rows) == len(mine):
        fits = any(_close(mine, (its.float() + o) / rows - o, o) for o in _NORM_OFFSETS)
    elif mine.ndim == 2 and vectors.change(name):
        # Conv1D stores [I, O]; of a square weight the vectors' lengths do not tell.
        for flipped in (False, True):
            mine_OI, its_OI = (mine.t(), its.t()) if flipped else (mine, its)
            if _fit(its_OI, rows, columns):
                fits = fits or _close(mine_OI, vectors.folded(name, its_OI), 0.0)
    if not fits:
        yield f"{name}: not the source's tensor with the recorded folds applied"


def compare_quantized(
    name: str, original: str, tensor: QuantizedTensor, theirs: Source, vectors: Vectors
) -> tuple[float, list[str]]:
    """Relative error of a weight, and problems if it is more than its scheme can cause.

    `original` is its name in the source, which may store it [I, O].
    """
    shape = theirs.info(original).shape
    if shape not in (tensor.shape, tensor.shape[::-1]):
        return 0.0, [f"{name}: shape {tensor.shape}, in the source {shape}"]
    attempts = []
    for transposed in (False, True):
        if shape == (tensor.shape[::-1] if transposed else tensor.shape):
            attempts.append(_compare(name, original, tensor, theirs, vectors, transposed))
            if not attempts[-1][1]:
                break
    return min(attempts, key=lambda attempt: attempt[0])


def _compare(
    name: str,
    original: str,
    tensor: QuantizedTensor,
    theirs: Source,
    vectors: Vectors,
    transposed: bool,
) -> tuple[float, list[str]]:
    if not _fit(tensor.codes, vectors.rows(name), vectors.columns(name)):
        return 0.0, [f"{name}: its fold vectors do not fit {tensor.shape}"]
    values = tensor.scale.values()
    num_rows = tensor.shape[0]
    # Blocks that straddle rows cannot be decoded by rows.
    by_rows = values.ndim == 2
    chunk = max(1, _ELEMENTS // tensor.shape[1]) if by_rows else num_rows
    whole = theirs.read(original).t() if transposed else None
    squares = total = 0.0
    bad_row: int | None = None
    for start in range(0, num_rows, chunk):
        rows = slice(start, min(start + chunk, num_rows))
        source = theirs.read_rows(original, rows.start, rows.stop) if whole is None else whole[rows]
        weight = vectors.folded(name, source, start)
        difference = (tensor.decode(rows) - weight).abs_()
        # Squares of float32 numbers may be none, or zero.
        squares += float(difference.double().square_().sum())
        total += float(weight.double().square_().sum())
        within = difference <= _MEDIAN_STEPS * _steps(tensor, values, rows)
        failing = (within.float().mean(dim=1) < 0.5).nonzero()
        if bad_row is None and len(failing) and not vectors.retargeted:
            bad_row = start + int(failing[0])
    error = (squares / total) ** 0.5 if total else float("inf") if squares else 0.0
    problems = []
    if bad_row is not None:
        problems.append(
            f"{name}: most of row {bad_row} is more than {_MEDIAN_STEPS} quantization steps away "
            "from the source"
        )
    if not error <= _RELATIVE_ERROR:
        problems.append(
            f"{name}: relative error {error:.3f}, more than {tensor.scheme.name} causes"
        )
    return error, problems


def _steps(tensor: QuantizedTensor, values: Tensor, rows: slice) -> Tensor:
    """Distance between neighbouring values of the grid around each weight [rows, I]."""
    scheme: Scheme = tensor.scheme
    width = grid_of(scheme).spacing
    columns = tensor.shape[1]
    if values.ndim == 2:
        part = values[rows].abs() * width
        steps = part.repeat_interleave(columns // part.shape[1], dim=1)
        if tensor.columns is None:
            return steps
        return torch.empty_like(steps).index_copy_(1, tensor.columns, steps)
    assert scheme.group_size is not None
    flat = (values.abs() * width).repeat_interleave(scheme.group_size)
    return flat[: tensor.codes.numel()].view(tensor.shape)[rows]


def _fit(weight_OI: Tensor, rows: Tensor | None, columns: Tensor | None) -> bool:
    return (rows is None or len(rows) == weight_OI.shape[0]) and (
        columns is None or len(columns) == weight_OI.shape[1]
    )


def _close(mine: Tensor, expected: Tensor, offset: float) -> bool:
    info = torch.finfo(mine.dtype)
    tolerance = _ROUNDINGS * info.eps * expected.abs() + info.smallest_normal * info.eps
    # The offset is added and taken away in float32.
    tolerance = tolerance + 4 * torch.finfo(torch.float32).eps * offset
    return bool(((mine.float() - expected).abs() <= tolerance).all())
