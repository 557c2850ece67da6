"""What blocks are called with beside hidden states, kept on the disk: one file per sequence.

Where images take part these arguments come from a tower, which shall not run for every block.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.disk import disk_errors, open_own
from quantkit.checkpoint.safetensors import (
    StoredTensor,
    TensorInfo,
    build_header,
    read_header,
    read_into,
    write_from,
)
from quantkit.errors import ModelError
from quantkit.model.refs import BlockCall

_PLAIN = (type(None), bool, int, float, str)


class KeptCalls:
    """Calls of all blocks by sequence, in files that outlive a kill.  Each is read as it is asked
    for; tensors that blocks share are kept once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)

    def write(self, sequence: int, calls: tuple[BlockCall, ...]) -> None:
        """Keeps the calls of a sequence; they are on the disk on return.

        Raises ModelError for an argument that is neither a tensor nor a plain value, OutputError
        if the disk is full.
        """
        tensors: dict[int, tuple[str, Tensor]] = {}
        told = [
            {
                field.name: _encoded(getattr(call, field.name), tensors, f"block {index}")
                for field in dataclasses.fields(call)
            }
            for index, call in enumerate(calls)
        ]
        kept = {name: value.detach().cpu().contiguous() for name, value in tensors.values()}
        infos = [TensorInfo(name=n, dtype=v.dtype, shape=tuple(v.shape)) for n, v in kept.items()]
        header = build_header(infos)
        weights, words = self._paths(sequence)
        with disk_errors(self._directory, sum(info.nbytes for info in infos)):
            descriptor = open_own(weights, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                os.pwrite(descriptor, header, 0)
                place = len(header)
                for info in infos:
                    write_from(descriptor, kept[info.name], place)
                    place += info.nbytes
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            descriptor = open_own(words, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                os.write(descriptor, json.dumps(told).encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def read(self, sequence: int, index: int, device: str | torch.device) -> BlockCall:
        """The call of block `index`; its tensors are fresh memory on the device."""
        weights, words = self._paths(sequence)
        told = json.loads(words.read_bytes())[index]
        places = {stored.info.name: stored for stored in read_header(weights)}
        read: dict[str, Tensor] = {}
        descriptor = open_own(weights, os.O_RDONLY)
        try:
            values = {
                name: _decoded(value, places, descriptor, read, device)
                for name, value in told.items()
            }
        finally:
            os.close(descriptor)
        return BlockCall(**values)

    def _paths(self, sequence: int) -> tuple[Path, Path]:
        stem = self._directory / f"{sequence}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")


def _encoded(value: Any, tensors: dict[int, tuple[str, Tensor]], where: str) -> Any:
    """JSON of an argument; tensors go to `tensors` by their identity."""
    if isinstance(value, Tensor):
        name, _ = tensors.setdefault(id(value), (str(len(tensors)), value))
        return {"tensor": name}
    if isinstance(value, _PLAIN):
        return value
    if type(value) in (tuple, list):
        parts = [_encoded(part, tensors, where) for part in value]
        return {"tuple" if isinstance(value, tuple) else "list": parts}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encoded(part, tensors, where) for key, part in value.items()}}
    raise ModelError(
        f"{where} of the text model is called with a {type(value).__name__}, which calibration on "
        "images cannot keep; calibrate it on text alone"
    )


def _decoded(
    told: Any,
    places: dict[str, StoredTensor],
    descriptor: int,
    read: dict[str, Tensor],
    device: str | torch.device,
) -> Any:
    if not isinstance(told, dict):
        return told
    ((kind, value),) = told.items()
    if kind == "tensor":
        if value not in read:
            stored = places[value]
            buffer = torch.empty(stored.info.shape, dtype=stored.info.dtype)
            read_into(descriptor, buffer, stored.offset)
            read[value] = buffer.to(device)
        return read[value]
    if kind == "dict":
        return {key: _decoded(v, places, descriptor, read, device) for key, v in value.items()}
    parts = [_decoded(part, places, descriptor, read, device) for part in value]
    return tuple(parts) if kind == "tuple" else parts
