"""GGUF headers: what the owner writes is read alike; damage is refused fast, naming the field."""

from __future__ import annotations

import importlib.util
import resource
import struct
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from quantkit.errors import CheckpointError
from quantkit.formats.gguf.file import TENSOR_TYPES, read_gguf

gguf = pytest.importorskip("gguf")
TOOL = Path(__file__).parent.parent.parent.parent / "tools" / "fuzz_gguf.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_gguf", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def file_of(
    path: Path, keys: bytes, num_keys: int, tensors: bytes = b"", num_tensors: int = 0
) -> Path:
    header = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys)
    path.write_bytes((header + keys + tensors).ljust(4096, b"\0"))
    return path


def tensor_of(name: str, sizes: tuple[int, ...], kind: int, offset: int) -> bytes:
    fixed = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return text(name) + fixed


def test_what_the_owner_wrote_is_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.eps", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_array("a.words", ["one", "zwei", "三"])
    writer.add_array("a.numbers", [1, 2, 3])
    weight = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("w", weight)
    writer.add_tensor(
        "q",
        gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert ours.count("a.count") == 7 and ours.number("a.eps") == 0.5
    assert ours.metadata["a.flag"] is True
    assert ours.metadata["a.words"] == ("one", "zwei", "三")
    assert list(ours.metadata["a.numbers"]) == [1, 2, 3]
    assert ours.text("general.architecture") == "llama"
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.type == tensor.tensor_type.name
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert (found.offset, found.num_bytes) == (tensor.data_offset, tensor.n_bytes)


def test_types_have_the_owners_sizes() -> None:
    for number, (name, block, num_bytes) in TENSOR_TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert (theirs.name, *gguf.GGML_QUANT_SIZES[theirs]) == (name, block, num_bytes)


BOMBS = {
    "magic": (lambda p: p.write_bytes(b"GGML" + bytes(100)), "starts with"),
    "short": (lambda p: p.write_bytes(b"GGUF"), "truncated"),
    "lfs": (
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" + bytes(50)),
        "Git-LFS",
    ),
    "version": (lambda p: p.write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(99)), "version 1"),
    "big-endian": (
        lambda p: p.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(99)),
        "big-endian",
    ),
    "ten million tensors": (
        lambda p: file_of(p, b"", 0, num_tensors=10_000_000),
        "claims 10000000 tensors",
    ),
    "2**60 keys": (lambda p: file_of(p, b"", 2**60), "metadata keys"),
    "key of 2**60 bytes": (lambda p: file_of(p, struct.pack("<Q", 2**60), 1), "key 0"),
    "text of 2**60 bytes": (
        lambda p: file_of(p, text("k") + struct.pack("<IQ", 8, 2**60), 1),
        "metadata k: a text",
    ),
    "array of 2**60 numbers": (
        lambda p: file_of(p, text("k") + struct.pack("<IIQ", 9, 4, 2**60), 1),
        "metadata k",
    ),
    "array of 2**60 texts": (
        lambda p: file_of(p, text("k") + struct.pack("<IIQ", 9, 8, 2**60), 1),
        "metadata k: an array",
    ),
    "nested arrays": (
        lambda p: file_of(p, text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 99, 1),
        "metadata k: an array of value type 9",
    ),
    "unknown value type": (lambda p: file_of(p, text("k") + struct.pack("<I", 99), 1), "type 99"),
    "same key twice": (
        lambda p: file_of(p, (text("k") + struct.pack("<II", 4, 1)) * 2, 2),
        "metadata k comes twice",
    ),
    "key is no text": (lambda p: file_of(p, struct.pack("<Q", 2) + b"\xff\xfe", 1), "is no text"),
    "alignment": (
        lambda p: file_of(p, text("general.alignment") + struct.pack("<II", 4, 3), 1),
        "general.alignment",
    ),
    "five dimensions": (
        lambda p: file_of(p, b"", 0, tensor_of("w", (1,) * 5, 0, 0), 1),
        "tensor w: 5 dimensions",
    ),
    "absurd sizes": (
        lambda p: file_of(p, b"", 0, tensor_of("w", (2**40, 2**40), 0, 0), 1),
        "tensor w: sizes",
    ),
    "unknown quant type": (
        lambda p: file_of(p, b"", 0, tensor_of("w", (32,), 77, 0), 1),
        "tensor w: type 77",
    ),
    "row is no whole block": (
        lambda p: file_of(p, b"", 0, tensor_of("w", (33,), 8, 0), 1),
        "tensor w: 33 columns",
    ),
    "offset": (
        lambda p: file_of(p, b"", 0, tensor_of("w", (32,), 0, 64), 1),
        "tensor w: offset 64",
    ),
    "tensor beyond the end": (
        lambda p: file_of(p, b"", 0, tensor_of("w", (2**20,), 0, 0), 1),
        "truncated.*tensor w",
    ),
    "same tensor twice": (
        lambda p: file_of(p, b"", 0, tensor_of("w", (8,), 0, 0) + tensor_of("w", (8,), 0, 32), 2),
        "tensor w comes twice",
    ),
    "long name": (lambda p: file_of(p, b"", 0, tensor_of("w" * 64, (8,), 0, 0), 1), "tensor 0"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bad_headers_are_refused_fast_by_name(tmp_path: Path, name: str) -> None:
    make, message = BOMBS[name]
    path = tmp_path / "bad.gguf"
    make(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_every_truncation_of_a_file_is_refused(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    data = tool.write_sample(path)
    assert tool.attempt(path)
    for stop in [*range(0, 1200, 13), len(data) // 2, len(data) - 1000]:
        path.write_bytes(data[:stop])
        with pytest.raises(CheckpointError):
            read_gguf(path)


def test_two_thousand_mutations_are_read_or_refused(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "fuzzed.gguf"
    data = tool.write_sample(path)
    read = 0
    slowest = 0.0
    for mutated in tool.mutations(data, 2000, seed=0):
        path.write_bytes(mutated)
        began = time.process_time()
        read += tool.attempt(path)
        slowest = max(slowest, time.process_time() - began)
    # Changed words of the vocabulary do no harm; a changed size or type must.
    assert 20 < read < 1500
    assert slowest < 1


def test_a_whole_file_decodes_as_the_owner_decodes_it(tool: ModuleType, tmp_path: Path) -> None:
    from quantkit.formats.gguf.source import GgufSource

    path = tmp_path / "whole.gguf"
    tool.write_sample(path)
    source = GgufSource(path)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for ours, name in (
        ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
    ):
        tensor = theirs[name]
        whole = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(source.info(ours).shape)
        assert np.array_equal(source.read(ours).numpy(), whole, equal_nan=True)
        part = source.read_flat(ours, 100, 777)
        assert torch.equal(part, source.read(ours).reshape(-1)[100:777])
