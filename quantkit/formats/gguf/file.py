"""The header of a GGUF file, read with suspicion: nothing it claims is believed before it is
checked against the file's size and our limits.  docs/formats/gguf.md draws the bytes.

A file is: magic, version, counts; metadata (key, type, value); tensors (name, sizes, type, offset);
padding; then the tensors' bytes, each at an aligned offset.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.checkpoint.door import open_plain, read_start
from quantkit.checkpoint.safetensors import refuse_git_lfs
from quantkit.errors import CheckpointError

MAGIC = b"GGUF"
ARRAY, STRING = 9, 8
# The owner's own limits: dimensions and length of a tensor's name (GGML_MAX_DIMS, GGML_MAX_NAME).
MAX_DIMENSIONS, MAX_NAME_BYTES = 4, 63
# Ours: the largest known headers (262,144 tokens and their merges) stay far below.
MAX_HEADER_BYTES = 64 * 2**20
MAX_KEYS = 4096
MAX_TENSORS = 65_536
MAX_STRINGS = 2_000_000
MAX_STRING_BYTES = 2**20

# Number in the file -> struct code.  8 is a string, 9 an array.
SCALARS: Mapping[int, str] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip

# Type number -> (name, weights in a block, bytes of a block): all that ggml has in 2026.
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}  # fmt: skip

Value = int | float | bool | str | tuple[str, ...] | NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor: shape as PyTorch orders it (the file has it reversed), offset in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """Metadata by key and tensors by name, in the order of the file."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]

    def text(self, key: str) -> str:
        """A metadata string.  CheckpointError if it is missing or no string."""
        value = self._value(key)
        if not isinstance(value, str):
            raise damaged(self.path, f"metadata {key} is no string")
        return value

    def count(self, key: str) -> int:
        """A metadata integer >= 0.  CheckpointError if it is missing or something else."""
        value = self._value(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise damaged(self.path, f"metadata {key} is no count")
        return value

    def number(self, key: str) -> float:
        """A finite metadata number.  CheckpointError if it is missing or something else."""
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise damaged(self.path, f"metadata {key} is no number")
        if not math.isfinite(value):
            raise damaged(self.path, f"metadata {key} is {value}")
        return float(value)

    def _value(self, key: str) -> Value:
        if key not in self.metadata:
            raise damaged(self.path, f"metadata {key} is missing")
        return self.metadata[key]


def is_gguf(path: Path) -> bool:
    """True for a file that starts with GGUF's magic, or ends in .gguf."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    return read_start(path, len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> GgufHeader:
    """The header of a GGUF file of version 2 or 3; every field is checked.

    Raises CheckpointError naming the field for damage, truncation, absurd claims or types that
    ggml does not have.  Holds the header only, at most 64 MiB of it.
    """
    try:
        with os.fdopen(open_plain(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            refuse_git_lfs(path, os.pread(file.fileno(), 100, 0))
            return _Parser(path, file.fileno(), size).parse()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file whose header cannot be right."""
    return CheckpointError(f"{path}: the file is damaged: {what}; download or copy it again")


class _Parser:
    """Reads forward; `_need` brings bytes into memory before anything looks at them."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path, self.descriptor, self.size = path, descriptor, size
        self.buffer = b""
        self.position = 0
        self.strings = 0

    def parse(self) -> GgufHeader:
        version, num_tensors, num_keys = self._counts()
        metadata: dict[str, Value] = {}
        for index in range(num_keys):
            key = self._string(f"key {index}", 65_535)
            if key in metadata:
                raise damaged(self.path, f"metadata {shown(key)} comes twice")
            metadata[key] = self._value(key, self._number("<I", f"type of {shown(key)}"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 65_536 or alignment % 8:
            raise damaged(self.path, f"general.alignment is {alignment!r}, no multiple of 8")
        claimed: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        expected = 0
        for index in range(num_tensors):
            name = self._string(f"name of tensor {index}", MAX_NAME_BYTES)
            if name in claimed:
                raise damaged(self.path, f"tensor {shown(name)} comes twice")
            label, shape, num_bytes, offset = self._tensor(name)
            if offset != expected:
                raise damaged(
                    self.path,
                    f"tensor {shown(name)}: offset {offset}, its neighbour ends at {expected}",
                )
            claimed[name] = (label, shape, num_bytes, offset)
            expected += -(-num_bytes // alignment) * alignment
        start = -(-self.position // alignment) * alignment
        tensors = {}
        for name, (label, shape, num_bytes, offset) in claimed.items():
            if start + offset + num_bytes > self.size:
                raise CheckpointError(
                    f"{self.path}: the file is truncated: {self.size} bytes, tensor {shown(name)} "
                    f"ends at {start + offset + num_bytes}; download or copy it again"
                )
            tensors[name] = GgufTensor(
                name=name, type=label, shape=shape, offset=start + offset, num_bytes=num_bytes
            )
        return GgufHeader(path=self.path, version=version, metadata=metadata, tensors=tensors)

    def _counts(self) -> tuple[int, int, int]:
        if self.size < 24:
            raise CheckpointError(f"{self.path}: the file is truncated: {self.size} bytes")
        magic = self._take(4, "magic")
        if magic != MAGIC:
            raise damaged(self.path, f"it starts with {magic!r}, not {MAGIC!r}")
        version = self._number("<I", "version")
        if version not in (2, 3):
            spelled = "big-endian" if version in (2 << 24, 3 << 24) else f"version {version}"
            raise CheckpointError(f"{self.path}: {spelled} is not read; convert it to version 3")
        num_tensors = self._number("<Q", "number of tensors")
        num_keys = self._number("<Q", "number of keys")
        # The shortest entries: a name of one byte, one dimension; a key of one byte, one byte.
        for label, number, limit, least in (
            ("tensors", num_tensors, MAX_TENSORS, 33),
            ("metadata keys", num_keys, MAX_KEYS, 14),
        ):
            if number > limit or number * least > self.size:
                raise damaged(
                    self.path, f"it claims {number} {label} (at most {limit}, {self.size} bytes)"
                )
        return version, num_tensors, num_keys

    def _tensor(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        """(type, shape, bytes, offset) of one tensor."""
        where = f"tensor {shown(name)}"
        dimensions = self._number("<I", f"{where}: number of dimensions")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise damaged(self.path, f"{where}: {dimensions} dimensions, 1 to {MAX_DIMENSIONS}")
        sizes = [self._number("<Q", f"{where}: sizes") for _ in range(dimensions)]
        number = self._number("<I", f"{where}: type")
        offset = self._number("<Q", f"{where}: offset")
        if number not in TENSOR_TYPES:
            raise CheckpointError(f"{self.path}: {where}: type {number} is not one of ggml's known")
        label, block, block_bytes = TENSOR_TYPES[number]
        if any(size == 0 for size in sizes) or math.prod(sizes) >= 2**50:
            raise damaged(self.path, f"{where}: sizes {sizes} are absurd")
        if sizes[0] % block:
            raise damaged(self.path, f"{where}: {sizes[0]} columns in blocks of {block} ({label})")
        num_bytes = math.prod(sizes) // block * block_bytes
        return label, tuple(reversed(sizes)), num_bytes, offset

    def _value(self, key: str, kind: int) -> Value:
        where = f"metadata {shown(key)}"
        if kind == STRING:
            return self._string(where, MAX_STRING_BYTES)
        if kind in SCALARS:
            value: int | float | bool = self._number(SCALARS[kind], where)
            return value
        if kind != ARRAY:
            raise damaged(self.path, f"{where}: value type {kind} does not exist")
        element = self._number("<I", where)
        length = self._number("<Q", where)
        if element == STRING:
            self.strings += length
            if self.strings > MAX_STRINGS or 8 * length > self.size - self.position:
                raise damaged(self.path, f"{where}: an array of {length} strings")
            return tuple(self._string(where, MAX_STRING_BYTES) for _ in range(length))
        if element not in SCALARS:
            raise damaged(self.path, f"{where}: an array of value type {element}")
        dtype = np.dtype(SCALARS[element].replace("b", "i1").replace("B", "u1"))
        return np.frombuffer(self._take(length * dtype.itemsize, where), dtype=dtype)

    def _number(self, code: str, where: str) -> int:
        (value,) = struct.unpack(code, self._take(struct.calcsize(code), where))
        return value

    def _string(self, where: str, longest: int) -> str:
        length = self._number("<Q", where)
        if length > longest:
            raise damaged(self.path, f"{where}: a text of {length} bytes (at most {longest})")
        raw = self._take(length, where)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"{where}: {raw[:20]!r} is no text") from error

    def _take(self, count: int, where: str) -> bytes:
        stop = self.position + count
        if stop > self.size:
            raise CheckpointError(
                f"{self.path}: the file is truncated: {where} ends at {stop} of {self.size} bytes; "
                "download or copy it again"
            )
        if stop > MAX_HEADER_BYTES:
            raise damaged(self.path, f"{where}: its header is longer than {MAX_HEADER_BYTES} bytes")
        if stop > len(self.buffer):
            wanted = min(self.size, MAX_HEADER_BYTES, max(stop, 2 * len(self.buffer), 1 << 16))
            self.buffer += os.pread(self.descriptor, wanted - len(self.buffer), len(self.buffer))
            if stop > len(self.buffer):
                raise CheckpointError(f"{self.path}: the file was truncated while in use")
        found = self.buffer[self.position : stop]
        self.position = stop
        return found


def shown(name: str) -> str:
    """A name from a file as messages may print it."""
    return ascii(name[:100])[1:-1]
