"""A GGUF file as a checkpoint: transformers' names and shapes, blocks decoded as they are read."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.dtypes import dtype_of
from quantkit.checkpoint.safetensors import TensorInfo, read_into
from quantkit.checkpoint.source import Reader
from quantkit.errors import CheckpointError
from quantkit.formats.gguf.blocks import decode, unpack
from quantkit.formats.gguf.file import GgufTensor, damaged, read_gguf, shown
from quantkit.formats.gguf.floats import FLOAT_TYPES, unpack_floats
from quantkit.formats.gguf.metadata import llama3_rope, reconstruct
from quantkit.formats.gguf.names import checkpoint_names
from quantkit.numbers.superblock import BLOCK_TYPES, Blocks

if TYPE_CHECKING:
    from torch import Tensor

_DENSE = ("F32", "F16", "BF16")
# Tensors that follow from the metadata, or that transformers computes itself.
_COMPUTED = ("rope_freqs.weight",)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A checkpoint tensor and where its values lie: `first` counts weights of the file's tensor."""

    tensor: GgufTensor
    first: int
    shape: tuple[int, ...]
    heads: int | None
    transposed: bool
    shift: float


def _block(label: str) -> tuple[int, int]:
    """Weights and bytes of a block of this type."""
    if label in FLOAT_TYPES:
        return FLOAT_TYPES[label][1:]
    kind = BLOCK_TYPES[label]
    return kind.size, kind.num_bytes


class GgufSource(Reader):
    """A GGUF file of one of the families in gguf_families.py, or of a type built like it.

    Quantized tensors are float32 to whoever reads them.  Opening reads the header only.  Raises
    CheckpointError for damage, other architectures, or tensors that the family does not have.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header = read_gguf(self.path)
        family, self._config = reconstruct(self.header)
        self._family = family
        self._parts: dict[str, _Part] = {}
        for tensor in self.header.tensors.values():
            if tensor.name not in _COMPUTED:
                self._place(tensor)
        self._config["dtype"] = self._dtype()
        if "rope_freqs.weight" in self.header.tensors:
            self._restore_rope_()

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of the model, from the file's metadata."""
        copied: dict[str, Any] = json.loads(self._config_bytes())
        return copied

    @property
    def home(self) -> Path:
        """The file's directory."""
        return self.path.parent

    @property
    def address(self) -> str:
        """The file."""
        return str(self.path)

    def names(self) -> tuple[str, ...]:
        """Names as transformers' checkpoints have them, sorted."""
        return tuple(sorted(self._parts))

    def info(self, name: str) -> TensorInfo:
        """Dtype (float32 for quantized tensors) and shape as in transformers' checkpoints."""
        part = self._part(name)
        shape = part.shape[::-1] if part.transposed else part.shape
        label = part.tensor.type if part.tensor.type in _DENSE else "F32"
        return TensorInfo(name=name, dtype=label, shape=shape)

    @property
    def packed_as(self) -> str | None:
        """ "gguf" if any tensor lies in blocks."""
        types = {part.tensor.type for part in self._parts.values()}
        return "gguf" if types - {*_DENSE} else None

    @property
    def recast(self) -> bool:
        """True: norms are float32, and those of Gemma larger by one."""
        return True

    def num_bytes(self, name: str) -> int:
        """Of its share of the file's tensor, which may hold all experts."""
        part = self._part(name)
        return part.tensor.num_bytes * torch.Size(part.shape).numel() // part.tensor.numel

    def tokens(self) -> tuple[str, ...] | None:
        """The vocabulary of the metadata."""
        found = self.header.metadata.get("tokenizer.ggml.tokens")
        return tuple(map(str, found)) if isinstance(found, list | tuple) else None

    def stored_shape(self, name: str) -> tuple[int, int]:
        """(O, I) of a matrix as the file has it, whatever the checkpoint's storage."""
        rows, columns = self._part(name).shape
        return rows, columns

    def type_of(self, name: str) -> str:
        """Ggml's type of a tensor, as in "Q4_K"; CheckpointError if there is none of this name."""
        return self._part(name).tensor.type

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened tensor, decoded; fresh memory."""
        part = self._part(name)
        numel = torch.Size(part.shape).numel()
        if not 0 <= start <= stop <= numel:
            raise IndexError(f"{name}: elements {start}..{stop} of {numel}")
        if part.heads is None and not part.transposed:
            value = self._decode(part.tensor, part.first + start, part.first + stop)
            return value - part.shift if part.shift else value
        whole = self._decode(part.tensor, part.first, part.first + numel).view(part.shape)
        if part.heads is not None:
            # ggml pairs neighbouring rows of a head, transformers its two halves.
            halves = whole.view(part.heads, -1, 2, *part.shape[1:]).transpose(1, 2)
            whole = halves.reshape(part.shape)
        if part.transposed:
            whole = whole.T
        return whole.reshape(-1)[start:stop].clone()

    def blocks(self, name: str) -> Blocks:
        """The stored numbers of a quantized matrix, rows in transformers' order."""
        return unpack(BLOCK_TYPES[self.type_of(name)], self.packed_rows(name))

    def packed_rows(self, name: str) -> Tensor:
        """The bytes of a quantized matrix, uint8 [O, bytes of a row], in transformers' order."""
        part = self._part(name)
        size, num_bytes = _block(part.tensor.type)
        rows, columns = part.shape
        width = columns // size * num_bytes
        data = torch.empty(rows, width, dtype=torch.uint8)
        self._read(part.tensor, data, part.first // size * num_bytes)
        if part.heads is not None:
            data = data.view(part.heads, -1, 2, width).transpose(1, 2).reshape(rows, width)
        return data

    def side_files(self) -> dict[str, Path | bytes]:
        """None: the tokenizer is in the file's metadata."""
        return {}

    def _config_bytes(self) -> bytes:
        return json.dumps(self._config, sort_keys=True).encode()

    def _part(self, name: str) -> _Part:
        try:
            return self._parts[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: there is no tensor {name}") from None

    def _place(self, tensor: GgufTensor) -> None:
        where = f"tensor {shown(tensor.name)}"
        found = checkpoint_names(self._family, tensor.name)
        if found is None:
            raise CheckpointError(
                f"{self.path}: {where}: a {self._family.architecture} model of transformers has no "
                "such tensor"
            )
        if tensor.type not in (*_DENSE, *BLOCK_TYPES, *FLOAT_TYPES):
            known = ", ".join((*_DENSE, *BLOCK_TYPES, *FLOAT_TYPES))
            raise CheckpointError(
                f"{self.path}: {where}: {tensor.type} is not decoded; {known} are"
            )
        template, stem = found
        block = re.match(r"blk\.(\d+)\.", tensor.name)
        if block is not None and int(block[1]) >= self._config[self._family.block_count]:
            raise damaged(self.path, f"{where} is beyond the last block")
        shape, count = tensor.shape, 1
        if "{e}" in template:
            if len(shape) != 3:
                raise damaged(self.path, f"{where} has {len(shape)} dimensions, experts have 3")
            count, shape = shape[0], shape[1:]
        elif len(shape) > 2:
            raise damaged(self.path, f"{where} has {len(shape)} dimensions, 1 or 2 are expected")
        field = self._family.interleave.get(stem)
        heads = None if field is None else int(self._config[field])
        if heads is not None and (heads < 1 or shape[0] % (2 * heads)):
            raise damaged(self.path, f"{where}: {shape[0]} rows are no {heads} heads")
        size = torch.Size(shape).numel()
        for expert in range(count):
            self._parts[template.replace("{e}", str(expert))] = _Part(
                tensor=tensor,
                first=expert * size,
                shape=shape,
                heads=heads,
                transposed=stem in self._family.transposed and len(shape) == 2,
                shift=self._family.norm_shift if stem.endswith("norm") else 0.0,
            )

    def _dtype(self) -> str:
        """What the model computes in: bfloat16 if the file has any, float32 if it has only that."""
        types = {tensor.type for tensor in self.header.tensors.values()}
        if "BF16" in types:
            return "bfloat16"
        return "float32" if types == {"F32"} else "float16"

    def _restore_rope_(self) -> None:
        tensor = self.header.tensors["rope_freqs.weight"]
        if tensor.type != "F32" or not 1 <= tensor.numel <= 4096:
            raise damaged(self.path, f"tensor {tensor.name}: {tensor.type} {list(tensor.shape)}")
        rope = self._config["rope_parameters"]
        found = llama3_rope(rope["rope_theta"], self._decode(tensor, 0, tensor.numel))
        if found is None:
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name}: these are not the frequencies of Llama 3"
            )
        self._config["rope_parameters"] = found

    def _decode(self, tensor: GgufTensor, start: int, stop: int) -> Tensor:
        """Weights start..stop of a file's tensor, flattened."""
        if tensor.type in _DENSE:
            buffer = torch.empty(stop - start, dtype=dtype_of(tensor.type))
            self._read(tensor, buffer, start * buffer.dtype.itemsize)
            return buffer
        size, num_bytes = _block(tensor.type)
        first, last = start // size, -(-stop // size)
        data = torch.empty((last - first) * num_bytes, dtype=torch.uint8)
        self._read(tensor, data, first * num_bytes)
        if tensor.type in FLOAT_TYPES:
            found = unpack_floats(tensor.name, tensor.type, data.view(1, -1), torch.float32)
            values = found.dequantize(torch.float32).view(-1)
        else:
            values = decode(BLOCK_TYPES[tensor.type], data).view(-1)
        return values[start - first * size : stop - first * size].clone()

    def _read(self, tensor: GgufTensor, buffer: Tensor, position: int) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = read_into(descriptor, buffer, tensor.offset + position)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
        if done < buffer.nbytes:
            raise CheckpointError(
                f"{self.path}: {tensor.name}: the file was truncated while in use"
            )
