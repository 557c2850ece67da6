"""The safetensors file: its header, read with suspicion and written exactly, and byte-range I/O.

A file is 8 bytes (little-endian header length), the header (JSON: name -> dtype, shape, offsets),
then the tensors' bytes, one after the other without holes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.door import open_plain
from quantkit.checkpoint.dtypes import LABELS, bytes_of, dtype_of, label_of
from quantkit.errors import CheckpointError

if TYPE_CHECKING:
    from quantkit.checkpoint.dtypes import Dtype

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Our own limit, the one the safetensors library has too: a larger header is damage or an attack.
MAX_HEADER_BYTES = 100_000_000
# Bytes moved by one system call: bounds what a copy holds.
PIECE_BYTES = 8 * 2**20

_GIT_LFS = b"version https://git-lfs.github.com/spec"


@dataclass(frozen=True, kw_only=True, init=False)
class TensorInfo:
    """Name, dtype and shape of one stored tensor; `label` is the dtype as safetensors names it.

    whole   of a tensor that a file holds as one slice of another, along its first axis: that one's
            name and the number of the slice; `name` is then its writer's only
    """

    name: str
    label: str
    shape: tuple[int, ...]
    whole: tuple[str, int] | None = None

    def __init__(
        self,
        *,
        name: str,
        dtype: Dtype,
        shape: tuple[int, ...],
        whole: tuple[str, int] | None = None,
    ) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "label", label_of(dtype))
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "whole", whole)

    @property
    def stored(self) -> str:
        """The name that a file has it under."""
        return self.name if self.whole is None else self.whole[0]

    @property
    def dtype(self) -> torch.dtype:
        """torch's dtype."""
        return dtype_of(self.label)

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * bytes_of(self.label)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor and where it lies: `offset` counts bytes from the start of the file."""

    info: TensorInfo
    offset: int


def read_header(path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of a safetensors file in the order of their bytes; every field is checked.

    Raises CheckpointError for a Git-LFS pointer, a truncated file or any damage to the header.
    """
    try:
        with os.fdopen(open_plain(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            number = file.fileno()
            return header_of(lambda start, stop: os.pread(number, stop - start, start), size, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def header_of(read: Callable[[int, int], bytes], size: int, path: Path) -> tuple[StoredTensor, ...]:
    """The same of a file of `size` bytes wherever it lies: `read(start, stop)` gives some of them,
    fewer only at its end; `path` is for messages."""
    prefix = read(0, len(_GIT_LFS))
    refuse_git_lfs(path, prefix)
    length = int.from_bytes(prefix[:8], "little")
    if len(prefix) < 8 or (length <= MAX_HEADER_BYTES and 8 + length > size):
        raise CheckpointError(
            f"{path}: the file is truncated ({size} bytes, too short for its header); "
            "download or copy it again"
        )
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, f"its header claims {length} of {MAX_HEADER_BYTES} bytes")
    header = read(8, 8 + length)
    tensors = parse_header(header, path)
    end = tensors[-1].offset + tensors[-1].info.nbytes if tensors else 8 + length
    if size < end:
        raise CheckpointError(
            f"{path}: the file is truncated: {size} bytes, its header asks for {end}; "
            "download or copy it again"
        )
    if size > end:
        raise _damaged(path, f"it holds {size} bytes, its header accounts for {end}")
    return tensors


def parse_header(header: bytes, path: Path) -> tuple[StoredTensor, ...]:
    """The tensors a header describes, in the order of their bytes.

    `header`: the JSON alone; `path` is for messages.  Raises CheckpointError unless the tensors
    cover the data exactly once and every span is shape times dtype.
    """
    try:
        fields = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise _damaged(path, "its header is no JSON object")
    metadata = fields.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise _damaged(path, "the header's __metadata__ is no map of strings")
    spans = sorted(
        (_span(name, entry, path) for name, entry in fields.items()),
        key=lambda span: (span[1], span[2]),
    )
    position = 0
    for info, begin, end in spans:
        if begin != position:
            kind = "overlap" if begin < position else "leave a hole"
            raise _damaged(path, f"{info.name}: its bytes and its neighbour's {kind}")
        position = end
    start = 8 + len(header)
    return tuple(StoredTensor(info=info, offset=start + begin) for info, begin, _ in spans)


def build_header(infos: Sequence[TensorInfo]) -> bytes:
    """The 8-byte length and the header of a file holding `infos` in this order.

    Padded by spaces to a multiple of 8, with metadata {"format": "pt"}.
    """
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for info in infos:
        end = position + info.nbytes
        fields[info.name] = {
            "dtype": info.label,
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_into(descriptor: int, buffer: torch.Tensor | memoryview, offset: int) -> int:
    """Bytes read from `offset` of the file into `buffer` (contiguous CPU), fewer only at its end.

    Goes through pread in bounded pieces: memory-mapped pages would count as resident memory.
    """
    view = buffer if isinstance(buffer, memoryview) else tensor_bytes(buffer)
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + PIECE_BYTES]], offset + done)
        if count == 0:
            break
        done += count
    return done


def write_from(descriptor: int, buffer: torch.Tensor, offset: int) -> None:
    """Writes all bytes of `buffer` (contiguous CPU) at `offset` of the file."""
    view = tensor_bytes(buffer)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + PIECE_BYTES], offset + done)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared, not copied."""
    array = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type]


def refuse_git_lfs(path: Path, beginning: bytes) -> None:
    """Raises CheckpointError if a file that starts like this is a Git-LFS pointer."""
    if beginning.startswith(_GIT_LFS):
        raise CheckpointError(
            f"{path}: this is a Git-LFS pointer, not the file itself; "
            "run `git lfs pull` in that directory, or download it from the Hub"
        )


def _span(name: str, entry: Any, path: Path) -> tuple[TensorInfo, int, int]:
    """A tensor of the header and its first and last byte, each field checked."""
    shown = ascii(name[:200])[1:-1]
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise _damaged(path, f"the tensor name {shown} is no valid text") from error
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{shown}: needs exactly dtype, shape and data_offsets")
    label, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(label, str) or label not in LABELS:
        raise CheckpointError(
            f"{path}: {shown}: the dtype {ascii(label)[:40]} is not known; "
            f"allowed: {', '.join(LABELS)}"
        )
    if not _naturals(shape):
        raise _damaged(path, f"{shown}: the shape is no list of sizes")
    # PyTorch overflows on such sizes even where another size is zero.
    if math.prod(max(size, 1) for size in shape) >= 2**60:
        raise _damaged(path, f"{shown}: the shape is absurdly large")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{shown}: data_offsets are no pair of positions")
    info = TensorInfo(name=name, dtype=label, shape=tuple(shape))
    begin, end = offsets
    if end - begin != info.nbytes:
        raise _damaged(
            path, f"{shown}: {label} of shape {shape} takes {info.nbytes} bytes, not {end - begin}"
        )
    return info, begin, end


def _naturals(values: Any) -> bool:
    """True for a list of integers >= 0 (JSON's true and false are no integers)."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of the pairs; ValueError if a key comes twice."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name comes twice")
    return fields


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: the file is damaged: {what}; download or copy it again")
