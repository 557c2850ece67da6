"""Where output weights go: safetensors shards laid out up front and filled by name in any order.

All names, dtypes and shapes are known before the work starts, so headers, offsets and the disk
needed are exact, a full disk shows at the start, and the same tensors give the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, Self

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.disk import disk_errors, open_own, reserve, sync_directory, write_file
from quantkit.checkpoint.dtypes import LABELS
from quantkit.checkpoint.safetensors import (
    PIECE_BYTES,
    StoredTensor,
    TensorInfo,
    build_header,
    read_into,
    write_from,
)
from quantkit.checkpoint.source import Source
from quantkit.errors import FormatError, OutputError, ResumeError


class TensorWriter(Protocol):
    """Fills an output by tensor names, in any order, each once; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a whole tensor."""
        ...

    def copy(self, name: str, source: Source, source_name: str | None = None) -> None:
        """Copies a tensor (`source_name`, by default the same name) in pieces."""
        ...

    def sync(self) -> None:
        """Returns when everything put so far is on the disk; then the journal may say so."""
        ...

    def close(self) -> None:
        """Ends the work; FormatError if a planned tensor was never written."""
        ...


class Elsewhere:
    """What stands in a writer's place in a process whose tensors another one writes."""

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Nothing: the other process has the tensor too."""

    def copy(self, name: str, source: Source, source_name: str | None = None) -> None:
        """Nothing: the other process copies it."""

    def sync(self) -> None:
        """Nothing: nothing was written here."""

    def close(self) -> None:
        """Nothing: the other process sees what is missing."""


class Layout(Protocol):
    """Every file of an output and where each tensor lies in it, before anything is written."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the files."""
        ...

    @property
    def file_bytes(self) -> int:
        """The same with what files hold beside tensors."""
        ...

    @property
    def side_files(self) -> Mapping[str, bytes] | None:
        """Files beside it by name, where the file describes the model itself; None where that is
        for config.json and the files of the source."""
        ...

    def holds_file(self, name: str) -> bool:
        """Whether a file of the source's folder has a place, by itself or in the metadata."""
        ...

    def index(self) -> bytes | None:
        """Content of the index of shards; None if there is none."""
        ...

    def writer(self, directory: Path, *, committed: Collection[str] = ()) -> TensorWriter:
        """What fills the files; `committed` names tensors that an interrupted run has written."""
        ...


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file: its name, header and tensors, each with its offset from the start of the file."""

    file: str
    header: bytes
    tensors: tuple[StoredTensor, ...]

    @cached_property
    def num_bytes(self) -> int:
        """Exact size of the file."""
        return len(self.header) + sum(tensor.info.nbytes for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """Every output file and where each tensor lies in it.

    slices   name of a tensor that is written in slices -> those, in order
    """

    shards: tuple[Shard, ...]
    slices: Mapping[str, tuple[TensorInfo, ...]] = field(default_factory=dict)

    @cached_property
    def num_bytes(self) -> int:
        """Exact bytes of all shards on disk, without the index."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def file_bytes(self) -> int:
        """The same: headers are counted."""
        return self.num_bytes

    @cached_property
    def places(self) -> Mapping[str, tuple[Shard, StoredTensor]]:
        """Tensor name -> its shard and its place there; slices by their own names."""
        return {
            part.info.name: (shard, part)
            for shard in self.shards
            for tensor in shard.tensors
            for part in self.parts(tensor)
        }

    def parts(self, tensor: StoredTensor) -> tuple[StoredTensor, ...]:
        """What a tensor is written in: itself, or its slices, which lie one after the other."""
        slices = self.slices.get(tensor.info.name)
        if slices is None:
            return (tensor,)
        return tuple(
            StoredTensor(info=info, offset=tensor.offset + number * info.nbytes)
            for number, info in enumerate(slices)
        )

    @property
    def side_files(self) -> None:
        """None: config.json and the source's own files go with shards."""

    def holds_file(self, name: str) -> bool:
        """True: every file lies beside them."""
        return True

    def writer(self, directory: Path, *, committed: Collection[str] = ()) -> ShardWriter:
        """What fills the shards in `directory`."""
        return ShardWriter(directory, self, committed=committed)

    @property
    def index_file(self) -> str:
        """Name of the index: model.safetensors.index.json unless planned with another stem."""
        return self.shards[0].file.split("-00001-of-")[0] + ".safetensors.index.json"

    def index(self) -> bytes | None:
        """Content of the index file; None for a single shard, which needs none."""
        if len(self.shards) == 1:
            return None
        total = sum(tensor.info.nbytes for shard in self.shards for tensor in shard.tensors)
        weight_map = {t.info.name: shard.file for shard in self.shards for t in shard.tensors}
        fields = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def plan_shards(
    infos: Sequence[TensorInfo], max_shard_bytes: int, *, stem: str = "model"
) -> ShardLayout:
    """The files that will hold these tensors, filled in the given order.

    A shard holds at most `max_shard_bytes` of tensors; a larger tensor gets one of its own.  Inside
    a shard wider dtypes come first, as readers view each tensor at an aligned address.  Slices of
    one tensor lie where its first one would.
    """
    if max_shard_bytes < 1:
        raise OutputError(f"max shard size {max_shard_bytes}: must be at least 1 byte")
    infos, slices = joined(infos)
    names = [info.name for info in infos]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError(f"{twice}: the tensor is planned twice; a checkpoint holds a name once")
    for info in infos:
        if info.label not in LABELS:
            raise FormatError(f"{info.name}: safetensors cannot hold {info.dtype}")
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in infos:
        if groups[-1] and filled + info.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(info)
        filled += info.nbytes
    count = len(groups)
    shards = []
    for number, group in enumerate(groups, start=1):
        part = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
        file = f"{stem}{part}.safetensors"
        ordered = sorted(group, key=lambda info: -info.dtype.itemsize)
        header = build_header(ordered)
        position = len(header)
        tensors = []
        for info in ordered:
            tensors.append(StoredTensor(info=info, offset=position))
            position += info.nbytes
        shards.append(Shard(file=file, header=header, tensors=tuple(tensors)))
    return ShardLayout(shards=tuple(shards), slices=slices)


def joined(
    infos: Sequence[TensorInfo],
) -> tuple[list[TensorInfo], dict[str, tuple[TensorInfo, ...]]]:
    """The tensors of the files, and the slices of those that are written so.

    Raises FormatError unless slices are numbered from 0 on and alike.
    """
    found: dict[str, list[TensorInfo]] = {}
    for info in infos:
        found.setdefault(info.stored, []).append(info)
    wholes, slices = [], {}
    for name, parts in found.items():
        if parts[0].whole is None:
            wholes += parts
            continue
        parts.sort(key=lambda part: -1 if part.whole is None else part.whole[1])
        first = parts[0]
        for number, part in enumerate(parts):
            like = (first.label, first.shape, (name, number))
            if (part.label, part.shape, part.whole) != like:
                raise FormatError(
                    f"{name}: slice {number} of {len(parts)} is planned as {part.name} "
                    f"({part.dtype} {list(part.shape)}), not as {first.name} is; all experts of a "
                    "layer are stored in one tensor and alike"
                )
        wholes.append(TensorInfo(name=name, dtype=first.label, shape=(len(parts), *first.shape)))
        slices[name] = tuple(parts)
    return wholes, slices


class ShardWriter:
    """Fills the shards of a layout in `directory`; a tensor may be put in any order, once.

    Creates the files at their final size with their headers, or takes up those of an interrupted
    run: `committed` names the tensors its journal vouches for.  Raises OutputError for a full disk
    and ResumeError if files of committed tensors are gone or changed.
    """

    def __init__(
        self, directory: Path, layout: ShardLayout, *, committed: Collection[str] = ()
    ) -> None:
        self.directory = directory
        self.layout = layout
        unknown = sorted(set(committed) - set(layout.places))
        if unknown:
            raise ResumeError(
                f"{directory}: {unknown[0]} was written by the earlier run, but is not planned "
                "now; use --fresh to start over"
            )
        self._written = set(committed)
        self._dirty: set[str] = set()
        self._descriptors: dict[str, int] = {}
        try:
            for shard in layout.shards:
                self._descriptors[shard.file] = self._open(shard)
            sync_directory(directory)
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._release()

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a whole tensor.

        Raises FormatError unless name, dtype and shape are as planned and the name is new.
        """
        shard, place = self._claim(name, tensor.dtype, tuple(tensor.shape))
        with self._disk():
            write_from(
                self._descriptors[shard.file], tensor.detach().contiguous().cpu(), place.offset
            )
        self._done(name, shard)

    def copy(self, name: str, source: Source, source_name: str | None = None) -> None:
        """Copies a tensor (`source_name`, by default the same name) in pieces of 8 MiB."""
        original = source_name or name
        info = source.info(original)
        shard, place = self._claim(name, info.dtype, info.shape)
        step = PIECE_BYTES // info.dtype.itemsize
        for start in range(0, info.numel, step):
            stop = min(start + step, info.numel)
            offset = place.offset + start * info.dtype.itemsize
            with self._disk():
                # No name for the piece: it would live on while the next one is read.
                write_from(
                    self._descriptors[shard.file], source.read_flat(original, start, stop), offset
                )
        self._done(name, shard)

    def read(self, name: str) -> torch.Tensor:
        """A tensor put earlier or by the interrupted run, in fresh memory."""
        shard, place = self._place(name)
        if name not in self._written:
            raise FormatError(f"{name}: the tensor has not been written yet")
        buffer = torch.empty(place.info.shape, dtype=place.info.dtype)
        with self._disk():
            done = read_into(self._descriptors[shard.file], buffer, place.offset)
        if done < buffer.nbytes:
            raise OutputError(f"{self.directory / shard.file}: {name}: the file was cut short")
        return buffer

    def missing(self) -> tuple[str, ...]:
        """Names planned, but neither put nor committed, sorted."""
        return tuple(sorted(set(self.layout.places) - self._written))

    def sync(self) -> None:
        """Returns when everything put so far is on the disk; then the journal may say so."""
        with self._disk():
            for file in sorted(self._dirty):
                os.fsync(self._descriptors[file])
        self._dirty.clear()

    def close(self) -> None:
        """Ends the work: checks that every tensor was written, syncs, writes the index.

        Raises FormatError naming the tensors never written; the files then stay as they are.
        """
        missing = self.missing()
        if missing:
            self._release()
            raise FormatError(
                f"{self.directory}: {len(missing)} planned tensors were never written, "
                f"{', '.join(missing[:3])} among them"
            )
        self.sync()
        self._release()
        index = self.layout.index()
        if index is not None:
            write_file(self.directory / self.layout.index_file, index)

    def _open(self, shard: Shard) -> int:
        """A descriptor of the shard's file, at full size and with its header on the disk."""
        path = self.directory / shard.file
        with self._disk():
            descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
            try:
                if (
                    os.fstat(descriptor).st_size == shard.num_bytes
                    and os.pread(descriptor, len(shard.header), 0) == shard.header
                ):
                    return descriptor
                parts = (part for t in shard.tensors for part in self.layout.parts(t))
                lost = sorted({part.info.name for part in parts} & self._written)
                if lost:
                    raise ResumeError(
                        f"{path}: the file with {lost[0]} is gone or changed since the earlier "
                        "run; use --fresh to start over"
                    )
                os.ftruncate(descriptor, 0)
                reserve(descriptor, shard.num_bytes)
                os.pwrite(descriptor, shard.header, 0)
                os.fsync(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        return descriptor

    def _place(self, name: str) -> tuple[Shard, StoredTensor]:
        try:
            return self.layout.places[name]
        except KeyError:
            raise FormatError(f"{name}: no such tensor is planned for the output") from None

    def _claim(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> tuple[Shard, StoredTensor]:
        """The place of a tensor about to be written; FormatError unless it is as planned."""
        shard, place = self._place(name)
        if (dtype, shape) != (place.info.dtype, place.info.shape):
            raise FormatError(
                f"{name}: planned as {place.info.dtype} {list(place.info.shape)}, "
                f"but written as {dtype} {list(shape)}"
            )
        if name in self._written:
            raise FormatError(f"{name}: the tensor is written twice")
        return shard, place

    def _done(self, name: str, shard: Shard) -> None:
        self._written.add(name)
        self._dirty.add(shard.file)

    def _disk(self) -> AbstractContextManager[None]:
        return disk_errors(self.directory, self.layout.num_bytes)

    def _release(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
