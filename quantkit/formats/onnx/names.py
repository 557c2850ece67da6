"""Which numbers of an exported graph are which tensor of the checkpoint: written beside the graph.

A graph names nodes after its own modules, fuses projections and transposes; `quantkit/names.json`
says where each tensor of the checkpoint went, and holds its config.json.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.config import check_config
from quantkit.checkpoint.door import read_json
from quantkit.checkpoint.dtypes import dtype_of, label_of
from quantkit.checkpoint.safetensors import tensor_bytes
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError
from quantkit.formats.onnx.file import OnnxFile
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

NAMES = "quantkit/names.json"
_VERSION = 1
_LARGEST = 64 * 2**20
_DTYPES = ("float32", "float16", "bfloat16", "int64", "int32")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows `row`... of a node's matrix that are the rows `start` to `stop` of a weight."""

    node: str
    row: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class QuantizedPlace:
    """Where a quantized weight [O, I] is, and what it was before: `scale_dtype` as stored then."""

    scheme: Scheme
    shape: tuple[int, int]
    dtype: torch.dtype
    scale_dtype: torch.dtype
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class KeptPlace:
    """Where a kept tensor is: an initializer, transposed, with `shift` added, from `first` on.

    Gemma's norms are stored as 1 + weight; biases of fused projections one after the other.
    """

    initializer: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    shift: int = 0
    first: int = 0

    def read(self, file: OnnxFile) -> Tensor:
        """The tensor as the checkpoint had it."""
        value = file.read(self.initializer)
        if self.transposed:
            value = value.T
        elif value.shape != self.shape:
            numel = torch.Size(self.shape).numel()
            value = value.reshape(-1)[self.first : self.first + numel]
        if value.numel() != torch.Size(self.shape).numel():
            raise CheckpointError(f"{file.path}: {self.initializer!a} is no {list(self.shape)}")
        value = value.reshape(self.shape)
        return (value - self.shift if self.shift else value).to(self.dtype).contiguous()


@dataclass(frozen=True, kw_only=True)
class Names:
    """Everything: the model's config, its quantized and its kept tensors; `lost` are in neither."""

    config: Mapping[str, Any]
    quantized: Mapping[str, QuantizedPlace]
    kept: Mapping[str, KeptPlace]
    lost: tuple[str, ...]

    def to_json(self) -> bytes:
        """The content of names.json."""
        return (json.dumps({"version": _VERSION, **_plain(asdict(self))}, indent=1) + "\n").encode()


def find_kept(file: OnnxFile, source: Source, names: Iterable[str]) -> dict[str, KeptPlace]:
    """Where in the graph the named tensors are, told by their numbers; those found."""
    by_digest: dict[tuple[tuple[int, ...], str], str] = {}
    vectors: dict[str, Tensor] = {}
    for name in (*file.stored, *file.inline):
        stored = file.info(name)
        if stored.label == "F32" and stored.numel > 1:
            value = file.read(name)
            by_digest.setdefault((stored.shape, _digest(value)), name)
            if value.ndim == 1:
                vectors[name] = value
    found = {}
    for name in names:
        original = source.read(name)
        if original.is_floating_point():
            place = _find(original, by_digest, vectors)
            if place is not None and torch.equal(place.read(file), original):
                found[name] = place
    return found


def read_names(path: Path, file: OnnxFile) -> Names:
    """What names.json says, every field checked.  CheckpointError naming the field."""
    data = read_json(path, largest=_LARGEST)
    try:
        if data["version"] != _VERSION:
            raise CheckpointError(f"{path}: version {data['version']!a}; {_VERSION} is read")
        if not isinstance(data["config"], dict):
            raise CheckpointError(f"{path}: config is no object")
        check_config(data["config"], str(path))
        names = Names(
            config=data["config"],
            quantized={str(k): _quantized_place(v) for k, v in data["quantized"].items()},
            kept={str(k): _kept_place(v) for k, v in data["kept"].items()},
            lost=tuple(map(str, data["lost"])),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error!r}; export the model again") from (
            error
        )
    for name, place in names.kept.items():
        stored = file.info(place.initializer)
        numel = torch.Size(place.shape).numel()
        if place.transposed and len(place.shape) != 2:
            raise CheckpointError(f"{path}: {name!a}: {list(place.shape)} cannot be transposed")
        same = stored.shape == (place.shape[::-1] if place.transposed else place.shape)
        part = not place.transposed and len(place.shape) == 1
        if not same and not (part and 0 <= place.first <= stored.numel - numel):
            raise CheckpointError(f"{path}: {name!a}: {place.initializer!a} is {stored.shape}")
    return names


def _find(
    original: Tensor,
    by_digest: Mapping[tuple[tuple[int, ...], str], str],
    vectors: Mapping[str, Tensor],
) -> KeptPlace | None:
    value = original.to(torch.float32)
    shape = tuple(original.shape)
    tries = [(value, False, 0)]
    tries += [(value.T, True, 0)] if value.ndim == 2 else [(value + 1, False, 1)]
    for stored, transposed, shift in tries:
        name = by_digest.get((tuple(stored.shape), _digest(stored)))
        if name is not None:
            return KeptPlace(
                initializer=name,
                shape=shape,
                dtype=original.dtype,
                transposed=transposed,
                shift=shift,
            )
    if value.ndim == 1 and value.numel():
        for name, vector in vectors.items():
            for first in torch.nonzero(vector == value[0]).flatten().tolist():
                if torch.equal(vector[first : first + len(value)], value):
                    return KeptPlace(
                        initializer=name, shape=shape, dtype=original.dtype, first=first
                    )
    return None


def _digest(value: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(value.contiguous())).hexdigest()


def _plain(value: Any) -> Any:
    """Dataclasses' fields as JSON values."""
    if isinstance(value, dict):
        if "kind" in value and "activation_bits" in value:
            return Scheme(**value).name
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _quantized_place(data: Mapping[str, Any]) -> QuantizedPlace:
    rows, columns = _counts(data["shape"])
    parts = []
    expected = 0
    for part in data["parts"]:
        row, start, stop = _counts([part["row"], part["start"], part["stop"]])
        if start != expected or stop <= start:
            raise ValueError(f"parts {part!a}")
        expected = stop
        parts.append(Part(node=str(part["node"]), row=row, start=start, stop=stop))
    if expected != rows or not columns:
        raise ValueError(f"parts of {rows} rows end at {expected}")
    return QuantizedPlace(
        scheme=Scheme.parse(str(data["scheme"])),
        shape=(rows, columns),
        dtype=_dtype(data["dtype"]),
        scale_dtype=_dtype(data["scale_dtype"]),
        parts=tuple(parts),
    )


def _kept_place(data: Mapping[str, Any]) -> KeptPlace:
    shift, first = _counts([data["shift"], data["first"]])
    return KeptPlace(
        initializer=str(data["initializer"]),
        shape=tuple(_counts(data["shape"])),
        dtype=_dtype(data["dtype"]),
        transposed=data["transposed"] is True,
        shift=shift,
        first=first,
    )


def _dtype(name: object) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!a}")
    return dtype_of(label_of(str(name)))


def _counts(values: Any) -> list[int]:
    """A list of numbers >= 0, ValueError for anything else."""
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**40 for v in values):
        raise ValueError(f"{values!a} are no counts")
    return values
