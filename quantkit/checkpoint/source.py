"""What the rest of quantkit reads weights from: tensors by name, in ranges, whatever holds them."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.door import file_sha256
from quantkit.checkpoint.safetensors import TensorInfo, tensor_bytes

# Checkpoints up to this size are fingerprinted whole, larger ones by samples of each tensor.
_WHOLE_BYTES = 256 * 2**20
_SAMPLE_BYTES = 4096
# Side files that say which model it is, at the top of its folder.
_OWN_FILES = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.model", "*.tiktoken", "chat_template*",
    "additional_chat_templates/*.jinja", "*preprocessor_config.json", "processor_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*",
)  # fmt: skip


class Source(Protocol):
    """A checkpoint to read from, whatever it is stored in."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json as read; of a live model `config.to_dict()`."""
        ...

    @property
    def home(self) -> Path | None:
        """The directory in which quantkit may have left files of its own; None in memory."""
        ...

    @property
    def address(self) -> str | None:
        """What opens this checkpoint again: a path, or a name on the Hub; None in memory."""
        ...

    def names(self) -> tuple[str, ...]:
        """Names of all tensors in the checkpoint, sorted."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor; CheckpointError if there is none of this name."""
        ...

    def num_bytes(self, name: str) -> int:
        """What a tensor takes where it is stored, whatever it is read as."""
        ...

    @property
    def recast(self) -> bool:
        """Whether tensors that are not quantized may lie here in other dtypes than the model's, or
        shifted by a constant, and so are equal up to rounding only."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor: fresh memory on the CPU, in the stored dtype."""
        ...

    def read_bytes(self, name: str) -> bytes:
        """The tensor's bytes as they are stored: for small ones that tell how others are."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the first dimension, fresh memory, in the stored dtype."""
        ...

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of the flattened tensor [stop - start], fresh memory."""
        ...

    def gather(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The named rows of the first dimension: rows int64 [R] -> [R, ...]; holds R rows only."""
        ...

    def fingerprint(self) -> str:
        """Hex sha256 that identifies config, tensors and side files (see `Reader`)."""
        ...

    def fingerprint_beside(self) -> str:
        """Hex sha256 over everything that travels beside the tensors."""
        ...

    def side_files(self) -> dict[str, Path | bytes]:
        """Relative name -> file (or its bytes) to copy: tokenizer, generation config, licence..."""
        ...

    @property
    def packed_as(self) -> str | None:
        """The format of quantized weights whose values this source decodes by itself; None where
        config.json's `quantization_config` tells it."""
        ...

    def tokens(self) -> tuple[str, ...] | None:
        """The vocabulary in order, where the weights' own file holds it; else None."""
        ...

    def left_files(self) -> dict[str, str]:
        """Relative name -> why a file beside the weights is not among the side files."""
        ...


class Reader(ABC):
    """What both sources share: everything that follows from reading a range of elements."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]: ...

    @property
    def home(self) -> Path | None:
        """None: a checkpoint in memory."""
        return None

    @property
    def address(self) -> str | None:
        """None: a checkpoint in memory."""
        return None

    @property
    def packed_as(self) -> str | None:
        """None: what is quantized stands in config.json."""
        return None

    def tokens(self) -> tuple[str, ...] | None:
        """None: the vocabulary is among the side files."""
        return None

    @abstractmethod
    def names(self) -> tuple[str, ...]: ...

    @abstractmethod
    def info(self, name: str) -> TensorInfo: ...

    @abstractmethod
    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor: ...

    @abstractmethod
    def side_files(self) -> dict[str, Path | bytes]: ...

    def left_files(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def num_bytes(self, name: str) -> int:
        """Of the tensor as it is read."""
        return self.info(name).nbytes

    @property
    def recast(self) -> bool:
        """False: every bit is kept."""
        return False

    @abstractmethod
    def _config_bytes(self) -> bytes: ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor: fresh memory on the CPU, in the stored dtype."""
        info = self.info(name)
        return self.read_flat(name, 0, info.numel).reshape(info.shape)

    def read_bytes(self, name: str) -> bytes:
        """The tensor's bytes."""
        return bytes(tensor_bytes(self.read(name)))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the first dimension, fresh memory, in the stored dtype."""
        row, shape = self._row(name)
        if not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"{name}: rows {start}..{stop} of {shape[0]}")
        return self.read_flat(name, start * row, stop * row).reshape(stop - start, *shape[1:])

    def gather(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The named rows of the first dimension: rows int64 [R] -> [R, ...].

        Reads every row once, neighbours together.  IndexError if a row is out of range.
        """
        row, shape = self._row(name)
        unique, positions = torch.unique(rows.reshape(-1).cpu(), return_inverse=True)
        if len(unique) and not 0 <= int(unique[0]) <= int(unique[-1]) < shape[0]:
            raise IndexError(f"{name}: rows {int(unique[0])}..{int(unique[-1])} of {shape[0]}")
        found = torch.empty(len(unique), row, dtype=self.info(name).dtype)
        breaks = torch.nonzero(unique.diff() != 1).flatten() + 1
        edges = [0, *breaks.tolist(), len(unique)] if len(unique) else []
        for first, last in itertools.pairwise(edges):
            start = int(unique[first]) * row
            run = self.read_flat(name, start, start + (last - first) * row)
            found[first:last] = run.reshape(last - first, row)
        if not torch.equal(positions, torch.arange(len(unique))):
            found = found[positions]
        return found.reshape(len(positions), *shape[1:])

    def fingerprint(self) -> str:
        """Hex sha256 that says which model this is: config, tokenizer and the like, and each
        tensor's name, dtype, shape and content.  A text laid beside it changes nothing.

        How the tensors are split into files does not matter, nor do times.  Up to 256 MiB of
        weights are hashed whole; of a larger checkpoint 16 KiB of each tensor in four places, as
        hashing 140 GB takes minutes: another training run or a cast shows, a changed bit may not.
        """
        infos = [self.info(name) for name in self.names()]
        whole = sum(info.nbytes for info in infos) <= _WHOLE_BYTES
        total = hashlib.sha256(self._config_bytes())
        for name, digest in self._digests():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in _OWN_FILES):
                total.update(json.dumps([name, digest]).encode())
        for info in infos:
            total.update(json.dumps([info.name, str(info.dtype), info.shape]).encode())
            step = _SAMPLE_BYTES // info.dtype.itemsize
            if whole or info.numel <= 4 * step:
                step = max(4 * 2**20 // info.dtype.itemsize, 1)
                starts = list(range(0, info.numel, step))
            else:
                starts = [place * (info.numel - step) // 3 for place in range(4)]
            for start in starts:
                piece = self.read_flat(info.name, start, min(start + step, info.numel))
                total.update(tensor_bytes(piece))
        return total.hexdigest()

    def fingerprint_beside(self) -> str:
        """Hex sha256 over all side files, and what was left with its reason."""
        total = hashlib.sha256(json.dumps(sorted(self.left_files().items())).encode())
        for name, digest in self._digests():
            total.update(json.dumps([name, digest]).encode())
        return total.hexdigest()

    def _digests(self) -> Iterator[tuple[str, str]]:
        """(name, sha256) of each side file, sorted."""
        for name, content in sorted(self.side_files().items()):
            if isinstance(content, bytes):
                yield name, hashlib.sha256(content).hexdigest()
            else:
                yield name, file_sha256(content)

    def _row(self, name: str) -> tuple[int, tuple[int, ...]]:
        """Elements of one row, and the shape."""
        info = self.info(name)
        if not info.shape:
            raise IndexError(f"{name}: a scalar has no rows")
        return math.prod(info.shape[1:]), info.shape


class View(Reader):
    """A source under other names, or divided into tensors otherwise: the same model."""

    def __init__(self, source: Source) -> None:
        self.source = source
        if (path := getattr(source, "path", None)) is not None:
            self.path = path

    @property
    def config(self) -> dict[str, Any]:
        """The source's."""
        return self.source.config

    @property
    def home(self) -> Path | None:
        """The source's."""
        return self.source.home

    @property
    def address(self) -> str | None:
        """The source's."""
        return self.source.address

    @property
    def packed_as(self) -> str | None:
        """The source's."""
        return self.source.packed_as

    @property
    def recast(self) -> bool:
        """The source's."""
        return self.source.recast

    def fingerprint(self) -> str:
        """The source's."""
        return self.source.fingerprint()

    def tokens(self) -> tuple[str, ...] | None:
        """The source's."""
        return self.source.tokens()

    def side_files(self) -> dict[str, Path | bytes]:
        """The source's."""
        return self.source.side_files()

    def left_files(self) -> dict[str, str]:
        """The source's."""
        return self.source.left_files()

    def _config_bytes(self) -> bytes:
        return json.dumps(self.source.config, sort_keys=True).encode()
