"""The safetensors header: what is accepted is read right, all else is a CheckpointError."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit.checkpoint.safetensors import (
    TensorInfo,
    build_header,
    parse_header,
    read_header,
    read_into,
)
from quantkit.errors import CheckpointError


def header(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


def entry(dtype: object, shape: object, *offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


F32 = entry("F32", [2], 0, 8)
BAD: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{]", "no valid JSON"),
    "no UTF-8": (b'{"\xff": 1}', "no valid JSON"),
    "deep": (b"[" * 100_000, "no valid JSON"),
    "long number": (b'{"a": ' + b"1" * 5000 + b"}", "no valid JSON"),
    "list": (b"[]", "no JSON object"),
    "same name twice": (b'{"a": 1, "a": 2}', "a name comes twice"),
    "metadata": (header(__metadata__={"a": 1}), "no map of strings"),
    "entry": (header(a=[1]), "needs exactly"),
    "no dtype": (header(a={"shape": [2], "data_offsets": [0, 8]}), "needs exactly"),
    "extra field": (header(a=F32 | {"more": 1}), "needs exactly"),
    "unknown dtype": (header(a=entry("F31", [2], 0, 8)), "a: the dtype 'F31' is not known"),
    "dtype no string": (header(a=entry(3, [2], 0, 8)), "is not known"),
    "negative size": (header(a=entry("F32", [-2], 0, 8)), "no list of sizes"),
    "true as size": (header(a=entry("F32", [True, 2], 0, 8)), "no list of sizes"),
    "fraction": (header(a=entry("F32", [2.0], 0, 8)), "no list of sizes"),
    "shape no list": (header(a=entry("F32", 2, 0, 8)), "no list of sizes"),
    "overflow": (header(a=entry("U8", [0, 2**62, 2**62], 0, 0)), "absurdly large"),
    "three offsets": (header(a=entry("F32", [2], 0, 4, 8)), "no pair"),
    "negative offset": (header(a=entry("F32", [2], -8, 0)), "no pair"),
    "wrong span": (header(a=entry("F32", [2], 0, 12)), "takes 8 bytes, not 12"),
    "backwards": (header(a=entry("F32", [2], 8, 0)), "takes 8 bytes, not -8"),
    "overlap": (header(a=F32, b=entry("F32", [2], 4, 12)), "b: .* overlap"),
    "same bytes": (header(a=F32, b=F32), "b: .* overlap"),
    "hole": (header(a=F32, b=entry("F32", [2], 12, 20)), "b: .* hole"),
    "hole at the start": (header(a=entry("F32", [2], 4, 12)), "a: .* hole"),
    "lone surrogate": (b'{"\\ud800": 1}', "no valid text"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_headers_are_refused(kind: str) -> None:
    content, message = BAD[kind]
    with pytest.raises(CheckpointError, match=message):
        parse_header(content, Path("model.safetensors"))


def test_header_is_read_back_and_read_by_the_library(tmp_path: Path) -> None:
    infos = [
        TensorInfo(name="ümlaut", dtype=torch.float32, shape=(2, 3)),
        TensorInfo(name="scalar", dtype=torch.float32, shape=()),
        TensorInfo(name="empty", dtype=torch.bfloat16, shape=(0, 5)),
        TensorInfo(name="bytes", dtype=torch.uint8, shape=(3,)),
    ]
    built = build_header(infos)
    assert len(built) % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(built + bytes(sum(info.nbytes for info in infos)))
    stored = read_header(path)
    assert [tensor.info for tensor in stored] == infos
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for info in infos:
            assert tuple(file.get_tensor(info.name).shape) == info.shape


def test_mutated_files_are_refused_or_read_right(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(
        {"a": torch.arange(6).reshape(2, 3), "b": torch.ones(4), "c": torch.zeros(5).byte()}, path
    )
    original = path.read_bytes()
    head = 8 + int.from_bytes(original[:8], "little")
    generator = random.Random(0)
    refused = 0
    for _ in range(4000):
        content = bytearray(original)
        for _ in range(generator.randint(1, 3)):
            place = generator.randrange(head)
            kind = generator.randrange(4)
            if kind == 0:
                content[place] = generator.randrange(256)
            elif kind == 1:
                content[place] = generator.choice(b'0123456789"[]{},:-.eE ')
            elif kind == 2:
                del content[place]
            else:
                content.insert(place, generator.choice(b'0123456789"[]{},:-.eE '))
        path.write_bytes(content)
        try:
            tensors = read_header(path)
        except CheckpointError:
            refused += 1
            continue
        covered = sum(tensor.info.nbytes for tensor in tensors)
        start = 8 + int.from_bytes(content[:8], "little")
        assert start + covered == len(content)
        with path.open("rb") as file:
            for tensor in tensors:
                buffer = torch.empty(tensor.info.shape, dtype=tensor.info.dtype)
                assert read_into(file.fileno(), buffer, tensor.offset) == tensor.info.nbytes
                end = tensor.offset + tensor.info.nbytes
                assert (
                    buffer.reshape(-1).view(torch.uint8).numpy().tobytes()
                    == content[tensor.offset : end]
                )
    # Renamed tensors and other harmless changes pass; most changes must not.
    assert 2000 < refused < 4000
