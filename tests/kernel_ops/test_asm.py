"""The PTX sequences, executed by a small emulator over all codes, against their definitions."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pytest
import torch
from quantkit_kernels.gpu import asm
from quantkit_kernels.ops.codebook import E2M1, NF4

from quantkit.numbers.grid import grid_of
from quantkit.numbers.scheme import Scheme

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
Words = npt.NDArray[np.uint32]


def run(source: str, *operands: Words) -> dict[int, Words]:
    """The 16-bit outputs of a sequence for every word of its operands (after the outputs)."""
    outputs: dict[int, Words] = {}
    count = source.count("mov.b32 {") * 2
    registers = {f"${count + place}": value for place, value in enumerate(operands)}

    def value(name: str) -> Words:
        if name in registers:
            return registers[name]
        return np.full_like(operands[0], int(name, 0))

    for line in re.findall(r"[^\n;{}]*(?:\{\$[^}]*\}[^\n;]*)?;", source):
        text = line.strip().rstrip(";")
        if text.startswith(".reg"):
            continue
        if pair := re.fullmatch(r"mov\.b32 \{\$(\d+),\$(\d+)\}, (\w+)", text):
            outputs[int(pair[1])] = value(pair[3]) & 0xFFFF
            outputs[int(pair[2])] = value(pair[3]) >> 16
            continue
        op, rest = text.split(" ", 1)
        target, *sources = [part.strip() for part in rest.split(",")]
        registers[target] = OPS[op.split(".")[0]](op, *[value(name) for name in sources])
    return outputs


def prmt(_: str, a: Words, b: Words, selector: Words) -> Words:
    eight = np.stack([(part >> np.uint32(8 * i)) & 0xFF for part in (a, b) for i in range(4)])
    out = np.zeros_like(a)
    for place in range(4):
        nibble = (selector >> np.uint32(4 * place)) & 0xF
        assert (nibble < 8).all(), "a selector of 8 or more replicates signs"
        out |= np.take_along_axis(eight, nibble[None].astype(np.int64), 0)[0] << np.uint32(
            8 * place
        )
    return out


def lop3(_: str, a: Words, b: Words, c: Words, table: Words) -> Words:
    out = np.zeros_like(a)
    for bits in range(8):
        if int(table[0]) >> bits & 1:
            terms = [part if bits >> (2 - i) & 1 else ~part for i, part in enumerate((a, b, c))]
            out |= terms[0] & terms[1] & terms[2]
    return out


def fma(op: str, a: Words, b: Words, c: Words) -> Words:
    dtype = torch.bfloat16 if "bf16" in op else torch.float16

    def halves(part: Words) -> torch.Tensor:
        bits = torch.from_numpy(part.copy().view(np.int16).reshape(-1, 2))
        return bits.view(dtype).double()

    # float64 holds the product and the sum of such short floats exactly: one rounding, as fma.
    rounded = (halves(a) * halves(b) + halves(c)).to(dtype)
    return rounded.view(torch.int16).numpy().reshape(-1).view(np.uint32)


OPS = {
    "mov": lambda _, a: a,
    "shl": lambda _, a, b: a << b,
    "shr": lambda _, a, b: a >> b,
    "and": lambda _, a, b: a & b,
    "xor": lambda _, a, b: a ^ b,
    "lop3": lop3,
    "prmt": prmt,
    "fma": fma,
}


def as_float(bits: Words, dtype: torch.dtype) -> npt.NDArray[np.float64]:
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(dtype).double().numpy()


@pytest.fixture(scope="module")
def words() -> Words:
    """Every code in every place beside random neighbours."""
    random = np.random.default_rng(0).integers(0, 2**32, 16 * 256, dtype=np.uint32)
    every = (np.arange(256, dtype=np.uint32) * 0x01010101).repeat(16)
    return np.concatenate([random, every, random & 0xFFFF0000 | every & 0xFFFF])


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("zero", [None, *range(16)], ids=str)
def test_int4_gives_code_minus_zero(words: Words, name: str, zero: int | None) -> None:
    source = asm.int4(name, zero_operand=zero is not None)
    operands = [words]
    if zero is not None:
        half = asm.SIGN | asm.MAGIC[name] | zero
        operands.append(np.full_like(words, half << 16 | half))
    outputs = run(source, *operands)
    assert sorted(outputs) == list(range(8))
    for place, bits in outputs.items():
        nibble = place // 2 + 4 * (place % 2)
        code = (words >> np.uint32(4 * nibble) & 15).astype(np.float64)
        assert (as_float(bits, DTYPES[name]) == code - (8 if zero is None else zero)).all()


@pytest.mark.parametrize("name", DTYPES)
def test_int8_gives_signed_bytes(words: Words, name: str) -> None:
    outputs = run(asm.int8(name), words)
    assert sorted(outputs) == list(range(4))
    for place, bits in outputs.items():
        byte = (words >> np.uint32(8 * place) & 0xFF).astype(np.uint8).view(np.int8)
        assert (as_float(bits, DTYPES[name]) == byte).all()


@pytest.mark.parametrize("name", DTYPES)
def test_fp8_gives_e4m3_numbers(words: Words, name: str) -> None:
    outputs = run(asm.fp8(name), words)
    assert sorted(outputs) == list(range(4))
    for place, bits in outputs.items():
        codes = torch.from_numpy((words >> np.uint32(8 * place) & 0xFF).astype(np.uint8))
        numbers = codes.view(torch.float8_e4m3fn).double().numpy()
        found = as_float(bits, DTYPES[name])
        there = ~np.isnan(numbers)
        assert (found[there] == numbers[there]).all()
        assert (np.signbit(found) == (codes.numpy() > 127)).all()


@pytest.mark.parametrize("name", DTYPES)
def test_e2m1_gives_its_numbers(words: Words, name: str) -> None:
    outputs = run(asm.e2m1(name), words)
    assert sorted(outputs) == list(range(8))
    for place, bits in outputs.items():
        code = words >> np.uint32(4 * (place // 2 + 4 * (place % 2))) & 15
        found = as_float(bits, DTYPES[name])
        assert (found == np.array(E2M1)[code]).all()
        assert (np.signbit(found) == (code > 7)).all()


@pytest.mark.parametrize("name", DTYPES)
def test_the_table_gives_the_codebook_in_order(words: Words, name: str) -> None:
    pattern = asm.bf16_bits if name == "bf16" else asm.f16_bits
    outputs = run(asm.table4([pattern(value) for value in NF4]), words)
    book = torch.tensor(NF4, dtype=torch.float64).to(DTYPES[name]).double().numpy()
    assert sorted(outputs) == list(range(8))
    for place, bits in outputs.items():
        code = words >> np.uint32(4 * place) & 15
        assert (as_float(bits, DTYPES[name]) == book[code]).all()


def test_the_codebook_is_the_one_weights_are_quantized_to() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[None]
    decoded = grid_of(Scheme.parse("nf4_b64")).decode(codes, torch.ones(1, 1), None)
    assert torch.equal(decoded.view(-1), torch.tensor(NF4))
