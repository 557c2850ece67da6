"""Writing a GGUF file: the header through the `gguf` package, tensors by name in any order."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.disk import disk_errors, open_own, reserve, sync_directory
from quantkit.checkpoint.dtypes import dtype_of
from quantkit.checkpoint.safetensors import write_from
from quantkit.checkpoint.source import Source
from quantkit.errors import FormatError, ResumeError
from quantkit.formats.gguf.file import TENSOR_TYPES, GgufTensor, read_gguf
from quantkit.formats.gguf.metadata import Entry

if TYPE_CHECKING:
    from torch import Tensor

DENSE = ("F32", "F16", "BF16")
# The version of quantized blocks that all ggml since 2023 has.
_QUANTIZATION_VERSION = 2
_NUMBERS = {label: number for number, (label, _, _) in TENSOR_TYPES.items()}
_IN_METADATA = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|[^/]*\.model"
    r"|[^/]*\.tiktoken|chat_template.*"
)
# Weights copied at a time.
_PIECE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Member:
    """How a checkpoint's tensor lies in the file.

    order    int64 [O]: which of its rows comes where; None: as they are
    turned   the checkpoint holds [I, O]
    shift    is added (Gemma's norms are 1 + w in the file)
    """

    order: Tensor | None = None
    turned: bool = False
    shift: float = 0.0

    @property
    def plain(self) -> bool:
        """True if values lie as the checkpoint has them."""
        return self.order is None and not self.turned and not self.shift


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor of the file: `members` are the checkpoint's that it holds, experts in order."""

    name: str
    type: str
    shape: tuple[int, ...]
    members: tuple[str, ...]
    member: Member = Member()

    @property
    def num_bytes(self) -> int:
        """Exact bytes in the file."""
        _, block, block_bytes = TENSOR_TYPES[_NUMBERS[self.type]]
        assert self.shape[-1] % block == 0, self.name
        return torch.Size(self.shape).numel() // block * block_bytes


@dataclass(frozen=True, kw_only=True)
class GgufLayout:
    """One file and what lies in it; `constants` are tensors that no checkpoint has, float32."""

    file: str
    architecture: str
    entries: tuple[Entry, ...]
    tensors: tuple[PlannedTensor, ...]
    constants: Mapping[str, Tensor]
    side_files: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @cached_property
    def file_bytes(self) -> int:
        """Exact size of the file, with metadata and tokenizer; writes a header to find out."""
        with tempfile.TemporaryDirectory(prefix="quantkit-header-") as folder:
            path = Path(folder) / self.file
            write_header(path, self.architecture, self.entries, self.tensors)
            read_gguf_layout(path, self.tensors)
            return path.stat().st_size

    @cached_property
    def places(self) -> Mapping[str, tuple[PlannedTensor, int]]:
        """The checkpoint's tensor name -> the file's tensor and which of its members."""
        return {
            name: (tensor, index)
            for tensor in self.tensors
            for index, name in enumerate(tensor.members)
        }

    def holds_file(self, name: str) -> bool:
        """True for what the metadata holds: the tokenizer and its templates."""
        return _IN_METADATA.fullmatch(name) is not None

    def index(self) -> bytes | None:
        """None: there is one file."""
        return None

    def writer(self, directory: Path, *, committed: Collection[str] = ()) -> GgufWriter:
        """What fills the file in `directory`."""
        return GgufWriter(directory, self, committed=committed)


class GgufWriter:
    """Fills a file by the checkpoint's tensor names, in any order, each once.

    Creates it at its final size, or takes up that of an interrupted run: `committed` names the
    tensors its journal vouches for.  Raises OutputError for a full disk and ResumeError if the file
    of committed tensors is gone or changed.
    """

    def __init__(
        self, directory: Path, layout: GgufLayout, *, committed: Collection[str] = ()
    ) -> None:
        self.directory, self.layout = directory, layout
        unknown = sorted(set(committed) - set(layout.places))
        if unknown:
            raise ResumeError(
                f"{directory}: {unknown[0]} was written by the earlier run, but is not planned "
                "now; use --fresh to start over"
            )
        self._written = set(committed)
        path = directory / layout.file
        fresh = directory / f"{layout.file}.header"
        with self._disk():
            write_header(fresh, layout.architecture, layout.entries, layout.tensors)
            header = fresh.read_bytes()
            placed = read_gguf_layout(fresh, layout.tensors)
            size = fresh.stat().st_size
            fresh.unlink()
            self._offsets = {tensor.name: tensor.offset for tensor in placed}
            self._descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
            try:
                whole = os.fstat(self._descriptor).st_size == size
                if not whole or os.pread(self._descriptor, len(header), 0) != header:
                    if self._written:
                        raise ResumeError(
                            f"{path}: the file is gone or changed since the earlier run; use "
                            "--fresh to start over"
                        )
                    os.ftruncate(self._descriptor, 0)
                    reserve(self._descriptor, size)
                    os.pwrite(self._descriptor, header, 0)
                    for name, value in layout.constants.items():
                        write_from(self._descriptor, value, self._offsets[name])
                    os.fsync(self._descriptor)
                    sync_directory(directory)
            except BaseException:
                os.close(self._descriptor)
                raise

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._release()

    def put(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor: packed rows of a quantized one, else values as the checkpoint has them.

        Raises FormatError unless the name is planned and new, and the size as planned.
        """
        planned, offset = self._claim(name)
        value = tensor.detach().cpu()
        if planned.type in DENSE:
            value = _converted(value, planned)
        elif planned.member.order is not None:
            value = value[planned.member.order]
        size = planned.num_bytes // len(planned.members)
        if value.nbytes != size:
            raise FormatError(f"{name}: planned with {size} bytes, but {value.nbytes} are written")
        with self._disk():
            write_from(self._descriptor, value.contiguous(), offset)
        self._written.add(name)

    def copy(self, name: str, source: Source, source_name: str | None = None) -> None:
        """Copies a dense tensor of the source, in pieces of 4 million weights."""
        planned, offset = self._claim(name)
        original = source_name or name
        info = source.info(original)
        if not planned.member.plain or len(info.shape) < 2:
            self.put(name, source.read(original))
            return
        dtype, columns = dtype_of(planned.type), info.numel // info.shape[0]
        step = max(1, _PIECE // columns)
        for start in range(0, info.shape[0], step):
            rows = source.read_rows(original, start, min(start + step, info.shape[0])).to(dtype)
            with self._disk():
                write_from(
                    self._descriptor, rows.contiguous(), offset + start * columns * dtype.itemsize
                )
        self._written.add(name)

    def missing(self) -> tuple[str, ...]:
        """Names planned, but neither put nor committed, sorted."""
        return tuple(sorted(set(self.layout.places) - self._written))

    def sync(self) -> None:
        """Returns when everything put so far is on the disk; then the journal may say so."""
        with self._disk():
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Checks that every tensor was written, and syncs.

        Raises FormatError naming the tensors never written; the file then stays as it is.
        """
        if missing := self.missing():
            self._release()
            raise FormatError(
                f"{self.directory}: {len(missing)} planned tensors were never written, "
                f"{', '.join(missing[:3])} among them"
            )
        self.sync()
        self._release()

    def _claim(self, name: str) -> tuple[PlannedTensor, int]:
        """The tensor of the file and where this member of it lies."""
        if name not in self.layout.places:
            raise FormatError(f"{name}: no such tensor is planned for the output")
        if name in self._written:
            raise FormatError(f"{name}: the tensor is written twice")
        planned, index = self.layout.places[name]
        return planned, self._offsets[planned.name] + index * (
            planned.num_bytes // len(planned.members)
        )

    def _disk(self) -> AbstractContextManager[None]:
        return disk_errors(self.directory / self.layout.file, self.layout.num_bytes)

    def _release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def _converted(value: Tensor, planned: PlannedTensor) -> Tensor:
    member = planned.member
    value = value.T if member.turned else value
    value = value if member.order is None else value[member.order]
    if member.shift:
        value = value.to(torch.float32) + member.shift
    return value.to(dtype_of(planned.type))


def read_gguf_layout(path: Path, tensors: Sequence[PlannedTensor]) -> list[GgufTensor]:
    """Where each tensor lies, by our own reader of the header that the owner's writer made.

    Gives the file its final size: the reader refuses tensors outside of it.
    """
    size = -(-path.stat().st_size // 32) * 32
    padded = sum(-(-tensor.num_bytes // 32) * 32 for tensor in tensors)
    os.truncate(path, size + padded)
    header = read_gguf(path)
    placed = [header.tensors[tensor.name] for tensor in tensors]
    end = max((place.offset + place.num_bytes for place in placed), default=0)
    os.truncate(path, -(-end // 32) * 32)
    return placed


def write_header(
    path: Path, architecture: str, entries: Sequence[Entry], tensors: Sequence[PlannedTensor]
) -> None:
    """Writes what stands before the tensors, as the owner's package does."""
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
