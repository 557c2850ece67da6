"""Block types of ggml against the bytes and values of the `gguf` package, the owner's own."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from quantkit.errors import NumericsError
from quantkit.formats.gguf.blocks import decode, pack, unpack
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.superblock import BLOCK_TYPES, Blocks, BlockScale, BlockType
from quantkit.numbers.tensor import QuantizedTensor

gguf = pytest.importorskip("gguf")
KINDS = list(BLOCK_TYPES.values())
HALVES = ("d", "m")


def random_blocks(kind: BlockType, count: int, seed: int) -> Blocks:
    """Every code, scale and minimum is drawn from all that its bits hold."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    scales = mins = None
    if kind.super_block:
        low = -(2 ** (kind.scale_bits - 1)) if kind.signed_scale else 0
        scales = (draw(2**kind.scale_bits, count, kind.groups) + low).to(torch.int8)
        if kind.minimum:
            mins = draw(2**kind.scale_bits, count, kind.groups).to(torch.int8)
    return Blocks(
        kind=kind,
        codes=draw(2**kind.bits, count, kind.size).to(torch.uint8),
        d=torch.randn(count, generator=generator).half(),
        m=torch.randn(count, generator=generator).half() if kind.minimum else None,
        scales=scales,
        mins=mins,
    )


def same(one: Blocks, other: Blocks) -> bool:
    for field in dataclasses.fields(Blocks):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            if a.dtype != b.dtype or not torch.equal(a, b):
                return False
        elif a != b:
            return False
    return True


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_unpacking_undoes_packing(kind: BlockType) -> None:
    for seed in range(20):
        # 20 x 60 blocks of 10 types: 12,000 random blocks.
        blocks = random_blocks(kind, 60, seed)
        assert same(unpack(kind, pack(blocks)), blocks)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_packing_undoes_unpacking_of_any_bytes(kind: BlockType) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (200, kind.num_bytes)
    data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    assert torch.equal(pack(unpack(kind, data)), data)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_values_are_the_owners(kind: BlockType) -> None:
    blocks = random_blocks(kind, 300, 7)
    theirs = gguf.dequantize(pack(blocks).numpy(), gguf.GGMLQuantizationType[kind.name])
    assert np.array_equal(blocks.values().numpy(), theirs)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_bytes_that_the_owner_wrote_decode_to_the_owners_values(name: str) -> None:
    rng = np.random.default_rng(1)
    kind = BLOCK_TYPES[name]
    weight = rng.standard_normal((40, 96), dtype=np.float32)
    data = gguf.quantize(weight, gguf.GGMLQuantizationType[name])
    ours = decode(kind, torch.from_numpy(data.copy())).view(40, 96).numpy()
    assert np.array_equal(ours, gguf.dequantize(data, gguf.GGMLQuantizationType[name]))
    step = np.abs(weight).max() / (2 ** (kind.bits - 1) - 1)
    assert np.abs(ours - weight).max() < 1.1 * step


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_sizes_and_numbers_are_the_owners(kind: BlockType) -> None:
    theirs = gguf.GGMLQuantizationType[kind.name]
    assert theirs.value == kind.number
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.size, kind.num_bytes)


def test_every_bit_of_a_block_matters() -> None:
    """A layout that read a byte twice and another never would pass a round trip of codes."""
    for kind in KINDS:
        data = torch.zeros(1, kind.num_bytes, dtype=torch.uint8)
        base = unpack(kind, data)
        for position in range(kind.num_bytes):
            changed = data.clone()
            changed[0, position] = 0x81
            assert not same(unpack(kind, changed), base), (kind.name, position)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_check_of_scales_finds_all_weights_that_are_not_finite(kind: BlockType) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        data = torch.randint(0, 256, (4, kind.num_bytes), generator=generator).to(torch.uint8)
        blocks = unpack(kind, data)
        tensor = QuantizedTensor(
            codes=blocks.codes,
            scale=BlockScale.of(blocks, 4),
            zero=None,
            scheme=Scheme.parse(kind.name.lower()),
            dtype=torch.float16,
        )
        finite = bool(torch.isfinite(decode(kind, data)).all())
        with contextlib.nullcontext() if finite else pytest.raises(NumericsError, match="NaN or"):
            tensor.check("w")
        seen.add(finite)
    assert seen == {True, False}
