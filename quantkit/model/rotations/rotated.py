"""A source whose weights make up for rotated activations: the same model in another basis.

Where activations x become x R, weights that read them become W R and those that write them Rᵀ W.
A norm's weight goes into the columns of its readers first, so that what is left of it commutes
with R.  Each tensor is worked out from the source's when it is read; all tensors that stay are the
source's.  What was done lies beside the result as a record, so that `verify --against` does it too.

Letters: O out features, I in features.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.disk import disk_errors, write_file
from quantkit.checkpoint.door import RECORD_BYTES, read_json, read_plain
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source, View
from quantkit.errors import CheckpointError, NumericsError, RecipeError
from quantkit.methods.parts import Rotation, make_part
from quantkit.methods.rules import PartSpec

ROTATION_FILE = "quantkit/rotation.json"
# Numbers that are turned at a time, in float64, and how many copies of them there are then.
_CHUNK = 1 << 20
_COPIES = 6


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis of a weight that is rotated in parts of `size`, all by the matrix of `key`.

    Of `first` to `last` only, a whole number of parts; None means up to the end.
    """

    key: str
    size: int
    first: int = 0
    last: int | None = None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What is done to one tensor [O, I], or a bias [O].

    columns, rows  how each axis is rotated, if it is
    norm           the tensor whose entries, `offset` added, its columns are multiplied by before
    plain          it is itself such a norm: its entries become 1 - `offset`
    origin         the tensor it is made from, if that has another name: a tied head's embedding
    flipped        the file holds [I, O]
    """

    columns: Axis | None = None
    rows: Axis | None = None
    norm: str | None = None
    offset: float = 0.0
    plain: bool = False
    origin: str | None = None
    flipped: bool = False


class Rotated(View):
    """A source in the basis of a rotation.  Holds the tensor read last, if it was read in parts."""

    def __init__(
        self, source: Source, part: Rotation, spec: PartSpec, turns: Mapping[str, Turn]
    ) -> None:
        super().__init__(source)
        self.part, self.spec, self.turns = part, spec, turns
        added = {name for name, turn in turns.items() if turn.origin is not None}
        self._names = tuple(sorted({*source.names(), *added}))
        self.unties_head = bool(added)
        self._last: tuple[str, Tensor] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The source's, with a head of its own if it has been untied."""
        config = self.source.config
        if not self.unties_head:
            return config
        config = {**config, "tie_word_embeddings": False}
        inner = config.get("text_config")
        if isinstance(inner, dict) and "tie_word_embeddings" in inner:
            config["text_config"] = {**inner, "tie_word_embeddings": False}
        return config

    @property
    def working_bytes(self) -> int:
        """What reading a tensor holds beside it: the source's, and a part of it in float64."""
        whole = [self.info(name).nbytes for name, turn in self.turns.items() if turn.rows]
        return max(whole, default=0) + 8 * _COPIES * _CHUNK

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        turn = self.turns.get(name)
        if turn is None or turn.origin is None:
            return self.source.info(name)
        info = self.source.info(turn.origin)
        return TensorInfo(name=name, dtype=info.dtype, shape=info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened tensor, fresh memory.

        A weight whose rows are rotated is made whole for it, others by rows.
        """
        turn = self.turns.get(name)
        if turn is None:
            return self.source.read_flat(name, start, stop)
        info = self.info(name)
        if not 0 <= start <= stop <= info.numel:
            raise IndexError(f"{name}: elements {start}..{stop} of {info.numel}")
        if turn.plain:
            return torch.full((stop - start,), 1.0 - turn.offset, dtype=info.dtype)
        if turn.rows is None and not turn.flipped:
            width = info.shape[1]
            first, last = start // width, -(-stop // width)
            found = torch.empty(last - first, width, dtype=info.dtype)
            step = max(1, _CHUNK // width)
            for row in range(first, last, step):
                rows = self.source.read_rows(turn.origin or name, row, min(row + step, last))
                found[row - first : row - first + len(rows)] = self._kept(name, turn, rows)
            return found.reshape(-1)[start - first * width : stop - first * width].clone()
        if start == 0 and stop == info.numel:
            self._last = None
            return self._whole(name, turn).reshape(-1)
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self._whole(name, turn).reshape(-1)
        return self._last[1][start:stop].clone()

    def _whole(self, name: str, turn: Turn) -> Tensor:
        """The tensor in its stored layout; chunks are float64, it and the source's are not."""
        value = self.source.read(turn.origin or name)
        found = torch.empty_like(value)
        w_OI, to_OI = (v.unsqueeze(1) if v.ndim == 1 else v for v in (value, found))
        if turn.flipped and value.ndim == 2:
            w_OI, to_OI = w_OI.t(), to_OI.t()
        for rows, columns in _chunks(turn, w_OI.shape):
            to_OI[rows, columns] = self._kept(name, turn, w_OI[rows, columns], rows, columns)
        return found

    def _kept(
        self,
        name: str,
        turn: Turn,
        w_OI: Tensor,
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> Tensor:
        """A part of a weight, turned and rounded to its dtype; all parts of an axis are whole."""
        value = w_OI.double()
        if turn.norm is not None:
            value = value * (self.source.read(turn.norm).double() + turn.offset)[columns]
        if turn.columns is not None:
            value = self._turned(turn.columns, value, columns)
        if turn.rows is not None:
            value = self._turned(turn.rows, value.t(), rows).t()
        kept = value.to(w_OI.dtype)
        if not bool(kept.isfinite().all()):
            raise NumericsError(
                f"{name}: rotated it is NaN or overflows {kept.dtype}; use a method without a "
                "rotation, or a bfloat16 copy of the model"
            )
        return kept

    def _turned(self, axis: Axis, x_nI: Tensor, part: slice) -> Tensor:
        """The columns of x turned, from which `part` says where they are."""
        start = part.start or 0
        width = x_nI.shape[1]
        first = max(axis.first - start, 0)
        last = width if axis.last is None else min(max(axis.last - start, 0), width)
        if first >= last:
            return x_nI
        turned = self.part(x_nI[:, first:last].reshape(-1, axis.size), axis.key)
        turned = turned.reshape(len(x_nI), last - first)
        return torch.cat([x_nI[:, :first], turned, x_nI[:, last:]], dim=1)


def _chunks(turn: Turn, shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Parts of a weight that are turned one after the other: whole blocks of each axis."""
    number_rows, number_columns = shape
    row_size = 1 if turn.rows is None else turn.rows.size
    column_size = 1 if turn.columns is None else turn.columns.size
    if row_size <= column_size:
        first = 0 if turn.rows is None else turn.rows.first
        for rows in _parts(number_rows, row_size, first, number_columns):
            yield rows, slice(0, number_columns)
    else:
        first = 0 if turn.columns is None else turn.columns.first
        for columns in _parts(number_columns, column_size, first, number_rows):
            yield slice(0, number_rows), columns


def _parts(length: int, size: int, first: int, other: int) -> Iterator[slice]:
    step = max(_CHUNK // max(other * size, 1), 1) * size
    start = 0
    # So that blocks of `size` begin where `first` says.
    for stop in [*range(first % size or step, length, step), length]:
        if stop > start:
            yield slice(start, stop)
        start = stop


def keep_rotation(source: Source, partial: Path) -> None:
    """Writes the record beside what is made from a source: of its rotation, or of the one that
    the source has had; nothing if there is none."""
    content = _record_at(source.home)
    if isinstance(source, Rotated):
        turns = {
            name: {key: v for key, v in dataclasses.asdict(turn).items() if v is not None}
            for name, turn in sorted(source.turns.items())
        }
        record = {"rotation": source.spec.to_value(), "tensors": turns}
        content = (json.dumps(record, indent=1) + "\n").encode()
    if content is not None:
        with disk_errors(partial / ROTATION_FILE):
            (partial / ROTATION_FILE).parent.mkdir(exist_ok=True)
            write_file(partial / ROTATION_FILE, content)


def rotated_since(home: Path | None, reference: Source) -> Source:
    """The reference in the basis of the checkpoint at `home`; itself if they share theirs.

    `reference` has its experts one by one.  Raises CheckpointError for a damaged record, and where
    the reference is rotated in another way.
    """
    ours, theirs = _record_at(home), _record_at(reference.home)
    if ours == theirs:
        return reference
    if home is None or ours is None or theirs is not None:
        raise CheckpointError(
            f"{reference.home} is rotated in a way in which {home} is not; compare with the model "
            "that both were made from"
        )
    path = home / ROTATION_FILE
    data = read_json(path, largest=RECORD_BYTES)
    try:
        spec = PartSpec.from_value("rotation", _built_in(data["rotation"]))
        turns = {str(name): _turn(value) for name, value in data["tensors"].items()}
        part: Rotation = make_part("rotation", spec.name, dict(spec.options))
        for name, turn in turns.items():
            _check(name, turn, reference)
    except (KeyError, TypeError, AttributeError, ValueError, RecipeError) as error:
        raise CheckpointError(f"{path}: no record of this model's rotation: {error}") from error
    return Rotated(reference, part, spec, turns)


def _record_at(home: Path | None) -> bytes | None:
    if home is None or not os.path.lexists(home / ROTATION_FILE):
        return None
    return read_plain(home / ROTATION_FILE, largest=RECORD_BYTES)


def _check(name: str, turn: Turn, source: Source) -> None:
    """ValueError unless the source has what a turn is of, in a shape that can be turned."""
    names = set(source.names())
    for wanted in (turn.origin or name, turn.norm):
        if wanted is not None and wanted not in names:
            raise ValueError(f"the source has no {wanted}")
    shape = source.info(turn.origin or name).shape
    if len(shape) > 2 or not shape or (len(shape) == 1 and turn.columns is not None):
        raise ValueError(f"{name} is {list(shape)}")
    as_OI = shape[::-1] if turn.flipped else (*shape, 1)[:2]
    if turn.norm is not None and source.info(turn.norm).shape != as_OI[1:]:
        raise ValueError(f"{turn.norm} does not belong to the columns of {name}")
    for axis, length in ((turn.rows, as_OI[0]), (turn.columns, as_OI[1])):
        if axis is None:
            continue
        last = length if axis.last is None else axis.last
        if not 0 <= axis.first <= last <= length or (last - axis.first) % axis.size:
            raise ValueError(f"{name}: {length} channels are no whole number of {axis.size}")


def _built_in(spec: Any) -> Any:
    """The part of a record, which nobody may name who has only handed over a file."""
    if ":" in str(spec["name"]):
        raise ValueError(
            f"the rotation {str(spec['name'])[:100]} is no part of quantkit's, so it is not undone"
        )
    return spec


def _turn(value: Any) -> Turn:
    axes = {
        key: Axis(
            key=str(value[key]["key"]),
            size=int(value[key]["size"]),
            first=int(value[key].get("first", 0)),
            last=value[key].get("last"),
        )
        for key in ("columns", "rows")
        if key in value
    }
    for axis in axes.values():
        if axis.size < 1 or not (axis.last is None or isinstance(axis.last, int)):
            raise ValueError(f"an axis of parts of {axis.size}")
    offset = float(value.get("offset", 0.0))
    if not math.isfinite(offset):
        raise ValueError("offset is not finite")
    return Turn(
        columns=axes.get("columns"),
        rows=axes.get("rows"),
        norm=value.get("norm"),
        offset=offset,
        plain=value.get("plain") is True,
        origin=value.get("origin"),
        flipped=value.get("flipped") is True,
    )
