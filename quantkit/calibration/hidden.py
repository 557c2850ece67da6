"""Hidden states between two blocks, in two generations of files that outlive a kill.

Read and written in ranges (never memory-mapped: mapped pages would count as resident memory), and
written while the next range is computed.  A GPU with room to spare holds both generations instead,
and a generation reaches its file when it is saved.
Letters: N sequences, T tokens, H hidden size; where a model has several streams, T stands for
tokens and streams.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from quantkit.checkpoint.disk import disk_errors, open_own
from quantkit.checkpoint.safetensors import read_into, write_from

# Times the room of both generations that a GPU must have free to hold them.
_SPARE = 8
# Bytes after which what was written is sent to the disk, so that little is left for the end.
_SENT = 64 * 2**20


class HiddenStore:
    """Hidden states [N, T, H]; generation i enters block i, even and odd share two files.

    `kept_on`: a GPU that holds them, if it has several times their room; `saved` is then the
    generation that is on the disk, whose file no other takes.
    """

    def __init__(
        self,
        directory: Path,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        name: str = "hidden",
        *,
        kept_on: str | None = None,
        mine: int | None = None,
    ) -> None:
        """mine: the sequences that this process has, if others have the rest."""
        self.shape, self.dtype = shape, dtype
        self._paths = tuple(directory / f"{name}-{parity}.bin" for parity in (0, 1))
        with disk_errors(directory, self.num_bytes):
            directory.mkdir(parents=True, exist_ok=True)
            self._files = [open_own(p, os.O_RDWR | os.O_CREAT) for p in self._paths]
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="hidden-states")
        # What is being written, and its generation.
        self._pending: tuple[int, Future[None]] | None = None
        self._unsent = 0
        # Memory that a GPU copies to and from several times as fast, for reading and for writing.
        self._pinned: dict[str, Tensor] = {}
        # By generation's parity and place.
        self._kept: dict[tuple[int, int], Tensor] = {}
        self.saved: int | None = None
        self.keeps = False
        if kept_on is not None and kept_on.startswith("cuda"):
            held = 2 * self._stride * (shape[0] if mine is None else mine)
            self.keeps = _SPARE * held < torch.cuda.mem_get_info(kept_on)[0]

    @property
    def num_bytes(self) -> int:
        """Disk space of both generations."""
        return 2 * self._stride * self.shape[0]

    @property
    def _stride(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, generation: int, start: int, stop: int, device: str = "cpu") -> Tensor:
        """Sequences start..stop [stop - start, T, H] in fresh memory of the device."""
        kept = self._kept.get((generation % 2, start))
        if kept is not None:
            assert len(kept) == stop - start, "what a GPU holds is read as it was written"
            # A copy: blocks may work in place.
            return kept.to(device, copy=True)
        if self._pending is not None and self._pending[0] == generation:
            self._wait()
        shape = (stop - start, *self.shape[1:])
        out = self._buffer("read", shape, device)
        count = read_into(self._files[generation % 2], out, start * self._stride)
        assert count == out.nbytes, "a generation is read only after it was written"
        # An interrupted run goes on from it.
        self.saved = generation
        return out.to(device)

    def write(self, generation: int, start: int, hidden_NTH: Tensor) -> None:
        """Stores sequences from `start` on, which must not change until the next call.

        Raises OutputError if the disk is full, at once or in the next call.
        """
        self._wait()
        content = hidden_NTH.to(self.dtype)
        if self.keeps and content.is_cuda:
            self._kept[generation % 2, start] = content.clone()
        else:
            self._begin_writing(generation, start, content)

    def _begin_writing(self, generation: int, start: int, content: Tensor) -> None:
        if content.is_cuda:
            # The last content was written, so its memory is free.
            pinned = self._buffer("write", content.shape, str(content.device))
            content = pinned.copy_(content)
        future = self._writer.submit(self._write, generation, start, content.contiguous())
        self._pending = generation, future

    def _write(self, generation: int, start: int, content: Tensor) -> None:
        with disk_errors(self._paths[generation % 2], self.num_bytes):
            write_from(self._files[generation % 2], content, start * self._stride)
            self._unsent += content.nbytes
            if self._unsent >= _SENT:
                os.fsync(self._files[generation % 2])
                self._unsent = 0

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending[1].result()

    def _buffer(self, use: str, shape: tuple[int, ...], device: str) -> Tensor:
        """Memory on the host for a copy to or from the device; the same again if it is a GPU."""
        if not device.startswith("cuda"):
            return torch.empty(shape, dtype=self.dtype)
        kept = self._pinned.get(use)
        if kept is None or kept.numel() < math.prod(shape):
            kept = torch.empty(math.prod(shape), dtype=self.dtype, pin_memory=True)
            self._pinned[use] = kept
        return kept[: math.prod(shape)].view(shape)

    def has_file_for(self, generation: int) -> bool:
        """Whether the generation can be saved beside the one that is."""
        return self.saved is None or self.saved % 2 != generation % 2

    def sync(self, generation: int) -> None:
        """Returns once the generation is on the disk."""
        for (parity, start), content in sorted(self._kept.items(), key=lambda item: item[0]):
            if parity == generation % 2:
                self._wait()
                self._begin_writing(generation, start, content)
        self._wait()
        with disk_errors(self._paths[generation % 2]):
            os.fsync(self._files[generation % 2])
        self.saved = generation

    def close(self) -> None:
        """Closes the files; they are removed with the scratch directory."""
        self._writer.shutdown()
        for descriptor in self._files:
            os.close(descriptor)
        self._files = []

    def __enter__(self) -> HiddenStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
