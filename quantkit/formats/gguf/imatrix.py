"""Importance matrices of llama.cpp: mean squares of each weight's inputs, in both of its files.

GGUF (general.type "imatrix"), for a tensor NAME of the model's file, E experts or 1, I inputs:

    NAME.in_sum2    float32 [E, I], squares of the inputs added up over tokens
    NAME.counts     float32 [E, 1], the tokens

The older file (.dat), little-endian: int32 number of entries; of each int32 length and bytes of
NAME, int32 calls, int32 number of values, float32 values [E·I], which are mean squares times calls;
then, in most, int32 calls and a name of the text.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.checkpoint.door import given_path, open_plain
from quantkit.errors import CheckpointError
from quantkit.formats.gguf.file import MAGIC, MAX_NAME_BYTES, MAX_TENSORS, read_gguf
from quantkit.formats.gguf.writer import import_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"
# Ours: those of the largest models have some hundred MB.
_MAX_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What reached one weight, or all experts of a layer: mean squares and tokens.

    mean_sq   float32 [E·I]
    counts    float64 [E], or one number where the file does not tell experts apart
    """

    mean_sq: NDArray[np.float32]
    counts: NDArray[np.float64]

    def of(self, name: str, features: int, expert: int | None) -> tuple[NDArray[np.float32], int]:
        """(mean squares [I], tokens) of one weight.  CheckpointError if sizes differ."""
        experts = self.mean_sq.size // features
        number = expert or 0
        if self.mean_sq.size % features or number >= experts or (expert is None and experts > 1):
            raise CheckpointError(
                f"{name}: the imatrix holds {self.mean_sq.size} numbers of it, the weight has "
                f"{features} columns; it was made of another model"
            )
        count = self.counts[number if len(self.counts) > 1 else 0]
        return self.mean_sq.reshape(experts, features)[number], int(count)


def read_imatrix(path: str | Path) -> dict[str, Importance]:
    """Tensor name in the model's GGUF -> what reached it.

    Raises CheckpointError for a file that is none, is damaged, or holds what no square can be.
    """
    path = given_path(path)
    try:
        with os.fdopen(open_plain(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_BYTES:
                raise CheckpointError(f"{path}: {size} bytes are more than an imatrix has")
            start = file.read(len(MAGIC))
            file.seek(0)
            found = (
                _read_gguf(path, file.fileno())
                if start == MAGIC
                else _read_dat(path, file.readall())
            )
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not found:
        raise CheckpointError(f"{path}: is no imatrix: no tensor ends in {_SUMS}")
    for name, entry in found.items():
        numbers = entry.mean_sq
        if not (np.isfinite(numbers).all() and (numbers >= 0).all() and (entry.counts >= 0).all()):
            raise CheckpointError(f"{path}: {name}: a mean of squares is negative, NaN or infinite")
    return found


def _read_gguf(path: Path, descriptor: int) -> dict[str, Importance]:
    header = read_gguf(path)

    def read(name: str) -> NDArray[np.float64]:
        tensor = header.tensors.get(name)
        if tensor is None or tensor.type != "F32":
            told = "is missing" if tensor is None else f"is {tensor.type}, not F32"
            raise CheckpointError(f"{path}: {name} {told}; the imatrix is damaged")
        data = os.pread(descriptor, tensor.num_bytes, tensor.offset)
        return np.frombuffer(data, "<f4").astype(np.float64)

    found = {}
    for full in header.tensors:
        if not full.endswith(_SUMS):
            continue
        name = full.removesuffix(_SUMS)
        sums, counts = read(full), read(name + _COUNTS)
        if not len(counts) or len(sums) % len(counts):
            raise CheckpointError(f"{path}: {full}: {len(sums)} sums for {len(counts)} counts")
        means = sums.reshape(len(counts), -1) / np.maximum(counts, 1)[:, None]
        found[name] = Importance(mean_sq=means.reshape(-1).astype(np.float32), counts=counts)
    return found


def _read_dat(path: Path, data: bytes) -> dict[str, Importance]:
    position = 0

    def take(size: int) -> bytes:
        nonlocal position
        if size < 0 or position + size > len(data):
            raise CheckpointError(f"{path}: is no imatrix, or it was cut short")
        position += size
        return data[position - size : position]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    entries = number()
    if not 0 < entries <= MAX_TENSORS:
        raise CheckpointError(f"{path}: is no imatrix: it claims {entries} entries")
    found = {}
    for _ in range(entries):
        length = number()
        if not 0 < length <= MAX_NAME_BYTES:
            raise CheckpointError(f"{path}: is no imatrix: a name of {length} bytes")
        name = take(length).decode("utf-8", "replace")
        calls, size = number(), number()
        values = np.frombuffer(take(4 * size), "<f4")
        # Where calls are not counted, the values are the means.
        found[name] = Importance(
            mean_sq=(values / max(calls, 1)).astype(np.float32),
            counts=np.array([max(calls, 1)], np.float64),
        )
    return found


def write_imatrix(
    path: Path,
    sums: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
    *,
    dataset: str,
    chunks: int,
    chunk_size: int,
) -> None:
    """Writes NAME -> (in_sum2 [E, I], counts [E, 1]) as llama.cpp's GGUF, in the order of names.

    Raises FormatError if the `gguf` package is missing.
    """
    gguf = import_gguf()
    # Such a file names no architecture, which the owner's class would write at once.
    bare = type("ImatrixWriter", (gguf.GGUFWriter,), {"add_architecture": lambda self: None})
    writer: Any = bare(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name in sorted(sums):
        squares, counts = sums[name]
        writer.add_tensor(name + _SUMS, np.ascontiguousarray(squares, np.float32))
        writer.add_tensor(name + _COUNTS, np.ascontiguousarray(counts, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
