"""Writing a GGUF file: the header through the `gguf` package, tensors in pieces after it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.disk import disk_errors
from quantkit.checkpoint.safetensors import write_from
from quantkit.errors import FormatError
from quantkit.formats.gguf.file import TENSOR_TYPES, GgufTensor, read_gguf
from quantkit.formats.gguf.metadata import Entry

# The version of quantized blocks that all ggml since 2023 has.
_QUANTIZATION_VERSION = 2
_NUMBERS = {label: number for number, (label, _, _) in TENSOR_TYPES.items()}


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor to write: `pieces` gives its bytes in order, uint8 and contiguous, when asked."""

    name: str
    type: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Exact bytes in the file."""
        _, block, block_bytes = TENSOR_TYPES[_NUMBERS[self.type]]
        assert self.shape[-1] % block == 0, self.name
        return torch.Size(self.shape).numel() // block * block_bytes


def write_gguf(
    path: Path, architecture: str, entries: Sequence[Entry], tensors: Sequence[PlannedTensor]
) -> None:
    """Writes the file; holds the header and one piece of a tensor.

    Raises FormatError if the `gguf` package is missing, OutputError if the disk is full.
    """
    with disk_errors(path):
        _write_header(path, architecture, entries, tensors)
        placed = read_gguf_layout(path, tensors)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            end = max((place.offset + place.num_bytes for place in placed), default=0)
            os.ftruncate(descriptor, -(-end // 32) * 32)
            for tensor, place in zip(tensors, placed, strict=True):
                position = place.offset
                for piece in tensor.pieces():
                    write_from(descriptor, piece, position)
                    position += piece.nbytes
                assert position == place.offset + place.num_bytes, tensor.name
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_gguf_layout(path: Path, tensors: Sequence[PlannedTensor]) -> list[GgufTensor]:
    """Where each tensor lies, by our own reader of the header that the owner's writer made."""
    size = path.stat().st_size
    padded = sum(-(-tensor.num_bytes // 32) * 32 for tensor in tensors)
    # The reader refuses tensors outside the file: give them room first.
    os.truncate(path, -(-size // 32) * 32 + padded)
    header = read_gguf(path)
    return [header.tensors[tensor.name] for tensor in tensors]


def _write_header(
    path: Path, architecture: str, entries: Sequence[Entry], tensors: Sequence[PlannedTensor]
) -> None:
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, architecture)
    kinds = gguf.GGUFValueType
    scalars = {"u32": kinds.UINT32, "f32": kinds.FLOAT32, "bool": kinds.BOOL, "str": kinds.STRING}
    arrays = {"strings": kinds.STRING, "i32s": kinds.INT32, "f32s": kinds.FLOAT32}
    for entry in entries:
        if entry.kind in scalars:
            writer.add_key_value(entry.key, entry.value, scalars[entry.kind])
        else:
            inner = arrays[entry.kind]
            writer.add_key_value(entry.key, list(entry.value), kinds.ARRAY, sub_type=inner)  # type: ignore[arg-type]
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    for tensor in tensors:
        # float32 stands for "the sizes are those of the weights"; the type follows.
        numpy_type = torch.empty(0).numpy().dtype
        raw = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, numpy_type, tensor.num_bytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def import_gguf() -> Any:
    """The owner's `gguf` package.  Raises FormatError that says how to install it."""
    try:
        import gguf
    except ImportError as error:
        raise FormatError(
            "writing gguf files needs the gguf package: pip install 'quantkit[gguf]'"
        ) from error
    return gguf
