"""Mutated GGUF files: each is read, or refused with CheckpointError, in bounded time and memory.

    fuzz_gguf.py [--count 100000] [--seed 0]
tests/formats/gguf/test_file.py runs some of it.
"""

from __future__ import annotations

import argparse
import random
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from quantkit.checkpoint.dtypes import dtype_of
from quantkit.errors import CheckpointError, NumericsError
from quantkit.formats.gguf.metadata import Entry
from quantkit.formats.gguf.source import GgufSource
from quantkit.formats.gguf.writer import DENSE, GgufLayout, PlannedTensor
from quantkit.numbers.superblock import BLOCK_TYPES

_SIZES = {
    "context_length": 64,
    "embedding_length": 256,
    "block_count": 1,
    "feed_forward_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "vocab_size": 8,
    "rope.dimension_count": 64,
}
_NUMBERS = (0, 1, 7, 31, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)


def write_sample(path: Path) -> bytes:
    """A small llama file with every block type; its bytes."""
    shapes = {
        "token_embd.weight": (8, 256),
        "output_norm.weight": (256,),
        "blk.0.attn_norm.weight": (256,),
        "blk.0.ffn_norm.weight": (256,),
        "blk.0.attn_q.weight": (8, 256),
        "blk.0.attn_k.weight": (4, 256),
        "blk.0.attn_v.weight": (4, 256),
        "blk.0.attn_output.weight": (8, 256),
        "blk.0.ffn_gate.weight": (8, 256),
        "blk.0.ffn_up.weight": (8, 256),
        "blk.0.ffn_down.weight": (8, 256),
    }
    kinds = iter(BLOCK_TYPES)
    tensors = tuple(
        PlannedTensor(
            name=name,
            type="F32" if len(shape) == 1 else next(kinds, "F16"),
            shape=shape,
            members=(name,),
        )
        for name, shape in shapes.items()
    )
    entries = [Entry(key=f"llama.{key}", kind="u32", value=n) for key, n in _SIZES.items()]
    entries.append(
        Entry(key="llama.attention.layer_norm_rms_epsilon", kind="f32", value=1e-5),
    )
    words = tuple(f"t{i}" for i in range(8))
    entries.append(Entry(key="tokenizer.ggml.tokens", kind="strings", value=words))
    entries.append(Entry(key="tokenizer.ggml.token_type", kind="i32s", value=(1,) * 8))
    layout = GgufLayout(
        file=path.name,
        architecture="llama",
        entries=tuple(entries),
        tensors=tensors,
        constants={},
        side_files={},
    )
    generator = torch.Generator().manual_seed(0)
    with layout.writer(path.parent) as writer:
        for tensor in tensors:
            data = torch.randint(0, 60, (tensor.num_bytes,), dtype=torch.uint8, generator=generator)
            if tensor.type in DENSE:
                writer.put(tensor.name, data.view(dtype_of(tensor.type)).view(tensor.shape))
            else:
                writer.put(tensor.name, data)
        writer.close()
    return path.read_bytes()


def header_end(data: bytes) -> int:
    """Where the first tensor's bytes start, about: all that matters to a parser lies before."""
    return data.index(b"blk.0.ffn_down.weight") + 64


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged copies of a file: flipped bits, changed numbers, cuts, swaps, insertions."""
    rng = random.Random(seed)
    end = header_end(data)
    for _ in range(count):
        mutated = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            place = rng.randrange(end)
            kind = rng.randrange(6)
            if kind == 0:
                mutated[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                mutated[place] = rng.randrange(256)
            elif kind == 2:
                mutated[place : place + 8] = struct.pack("<Q", rng.choice(_NUMBERS))
            elif kind == 3:
                mutated[place : place + 4] = struct.pack("<I", rng.choice(_NUMBERS) % 2**32)
            elif kind == 4:
                del mutated[place : place + rng.randrange(1, 40)]
            else:
                del mutated[rng.randrange(len(mutated)) :]
                break
            if len(mutated) < 2:
                break
        yield bytes(mutated)


def attempt(path: Path) -> bool:
    """True if the file is read whole, false if it is refused as it should be."""
    try:
        source = GgufSource(path)
        for name in source.names():
            source.read(name)
    except (CheckpointError, NumericsError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    count = options.count
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzzed.gguf"
        data = write_sample(path)
        slowest, read = 0.0, 0
        for mutated in mutations(data, count, options.seed):
            path.write_bytes(mutated)
            began = time.perf_counter()
            read += attempt(path)
            slowest = max(slowest, time.perf_counter() - began)
    print(f"{count} mutations: {read} read, {count - read} refused, slowest {slowest:.3f} s")


if __name__ == "__main__":
    main()
