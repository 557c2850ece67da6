"""Hidden states between two blocks, in two generations of files that outlive a kill.

Read and written in ranges (never memory-mapped: mapped pages would count as resident memory).
Letters: N sequences, T tokens, H hidden size; where a model has several streams, T stands for
tokens and streams.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from quantkit.checkpoint.disk import disk_errors, open_own
from quantkit.checkpoint.safetensors import read_into, write_from


class HiddenStore:
    """Hidden states [N, T, H]; generation i enters block i, even and odd share two files."""

    def __init__(
        self, directory: Path, shape: tuple[int, ...], dtype: torch.dtype, name: str = "hidden"
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._paths = tuple(directory / f"{name}-{parity}.bin" for parity in (0, 1))
        with disk_errors(directory, self.num_bytes):
            directory.mkdir(parents=True, exist_ok=True)
            self._files = [open_own(p, os.O_RDWR | os.O_CREAT) for p in self._paths]

    @property
    def num_bytes(self) -> int:
        """Disk space of both generations."""
        return 2 * self._stride * self.shape[0]

    @property
    def _stride(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, generation: int, start: int, stop: int) -> Tensor:
        """Sequences start..stop [stop - start, T, H], fresh memory."""
        out = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        count = read_into(self._files[generation % 2], out, start * self._stride)
        assert count == out.nbytes, "a generation is read only after it was written and synced"
        return out

    def write(self, generation: int, start: int, hidden_NTH: Tensor) -> None:
        """Stores sequences from `start` on.  Raises OutputError if the disk is full."""
        with disk_errors(self._paths[generation % 2], self.num_bytes):
            content = hidden_NTH.to("cpu", self.dtype).contiguous()
            write_from(self._files[generation % 2], content, start * self._stride)

    def sync(self, generation: int) -> None:
        """Returns once the generation is on the disk."""
        with disk_errors(self._paths[generation % 2]):
            os.fsync(self._files[generation % 2])

    def close(self) -> None:
        """Closes the files; they are removed with the scratch directory."""
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
