"""The loops of int8_dot.cpp at every level that the processor has, bit by bit as their scalar twin.

A level is built into a library of its own, under names of its own, so that all run in one process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernel_cases as cases
import pytest
import torch
from quantkit_kernels.cpu import native, objects
from quantkit_kernels.ops import int8_dot
from quantkit_kernels.ops.codebook import NF4
from torch import Tensor

from quantkit.numbers.grid import E2M1_VALUES, FP4_VALUES

# Flags after -march=native, and the features of /proc/cpuinfo that the loops need.
LEVELS = {
    **{name: (level.flags, level.features) for name, level in objects.LEVELS.items()},
    "vnni_in_scalar": (("-march=haswell", "-DQUANTKIT_PLAIN_DOT"), "avx2 fma f16c"),
}
KINDS = ["int4", "int8", "digit", "codebook", "floats"]
# Of these a block may have two scales.
HALVES = ["int4", "int8", "digit"]
SHAPE = (37, 333)


def missing(features: str) -> str:
    found = native._processor_flags().split()
    return " ".join(one for one in features.split() if one not in found)


@functools.cache
def op_of(level: str) -> Any:
    """The op of one level, built with its flags."""
    flags, _ = LEVELS[level]
    compiler = native._compiler()
    if isinstance(compiler, str):
        pytest.skip(compiler)
    name = f"quantkit_{level}"
    schema = str(torch.ops.quantkit.int8_dot.default._schema).partition("(")[2]
    for op in ("int8_dot", "int8_dot_fixed"):
        torch.library.define(f"{name}::{op}", f"({schema}")
    source = Path(native.__file__).with_name("int8_dot.cpp")
    assert native._load(source, compiler, (*flags, f"-DQUANTKIT_LIBRARY={name}")) is None
    return getattr(torch.ops, name).int8_dot.default


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    compiler = native._compiler()
    if isinstance(compiler, str):
        pytest.skip(compiler)
    library = tmp_path_factory.mktemp("twin") / "twin.so"
    source = Path(__file__).with_name("int8_dot_twin.c")
    command = [compiler[0], "-x", "c", "-std=c11", "-O2", "-mfma", "-ffp-contract=off", "-shared"]
    command += ["-fPIC", str(source), "-o", str(library), "-lm"]
    subprocess.run(command, check=True)
    run = ctypes.CDLL(str(library)).twin
    run.restype = None
    return run


def weight_of(kind: str, group: int | None, asym: bool) -> int8_dot.Packed:
    shape = SHAPE if group is None else (SHAPE[0], 384)
    if kind == "floats":
        codes, scale, _ = cases.float8_weight(shape, group)
        return int8_dot.pack_floats(codes, scale / 3, group)
    if kind in ("digit", "codebook"):
        codes, scale, _ = cases.int_weight(shape, group)
        values = E2M1_VALUES if kind == "digit" else NF4
        return int8_dot.pack_codebook(codes, scale, values, group or 0)
    bits = 4 if kind == "int4" else 8
    codes, scale, zero = cases.int_weight(shape, group, bits=bits, asym=asym)
    return int8_dot.pack(codes, scale, zero, group, bits)


def twins_answer(run: Callable[..., None], x: Tensor, kind: str, weight: int8_dot.Packed) -> Tensor:
    wide, scale = x.float().contiguous(), weight.scale.float()
    out = torch.empty(len(x), SHAPE[0])
    middle = {"int4": 8, "int8": 128, "digit": 12, "codebook": 8192, "floats": 0}[kind]

    def at(tensor: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    run(
        at(wide),
        *(ctypes.c_int64(size) for size in x.shape),
        ctypes.c_int(KINDS.index(kind)),
        at(weight.packed),
        at(scale),
        at(weight.zero),
        at(weight.table),
        ctypes.c_float(middle),
        ctypes.c_int64(SHAPE[0]),
        ctypes.c_int64(weight.group_size),
        at(out),
    )
    return out.to(x.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_level_gives_the_bits_of_the_scalar_twin(
    level: str, kind: str, twin: Callable[..., None]
) -> None:
    if lacking := missing(LEVELS[level][1]):
        pytest.skip(f"this processor lacks {lacking}")
    op = op_of(level)
    for group in (*((16,) if kind in HALVES else ()), 32, 64, 128, None):
        for asym in (False, True) if kind.startswith("int") else (False,):
            weight = weight_of(kind, group, asym)
            parts = (weight.packed, weight.scale, weight.zero, weight.table, None)
            numbers = (weight.bits, weight.floats, weight.group_size, SHAPE[0])
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for rows in (1, 2, 3, 4, 5, 17):
                    columns = SHAPE[1] if group is None else 384
                    x = cases.activations((rows, columns), dtype, seed=rows)
                    # A block of zeros, an outlier, and blocks of the largest codes.
                    x[0, :32], x[-1, 40] = 0, 300
                    x[:, 64:128] = x[:, 64:128].sign() * 3
                    found = op(x, *parts, *numbers)
                    assert torch.equal(found, twins_answer(twin, x, kind, weight)), (group, rows)


@pytest.mark.parametrize("sign", [-1, 1], ids=["minus", "plus"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_largest_products_do_not_overflow(
    level: str, kind: str, sign: int, twin: Callable[..., None]
) -> None:
    if lacking := missing(LEVELS[level][1]):
        pytest.skip(f"this processor lacks {lacking}")
    weight = weight_of(kind, 32, False)
    assert weight.scale.shape[1] == 12
    largest = {"int4": 0xFF, "int8": 0xFF, "digit": 0x77, "codebook": 0xFF, "floats": 0x7E}
    x = torch.full((5, 384), 3.0 * sign)
    for code in (0, largest[kind]):
        full = dataclasses.replace(weight, packed=torch.full_like(weight.packed, code))
        # Every other column: pairs of products of one sign, and of both.
        for step in (1, 2):
            part = x.clone()
            part[:, ::step] *= -1
            parts = (full.packed, full.scale, None, full.table, None, full.bits, full.floats)
            found = op_of(level)(part, *parts, 32, SHAPE[0])
            assert torch.equal(found, twins_answer(twin, part, kind, full))


@pytest.mark.parametrize("level", LEVELS)
def test_numbers_that_are_none_are_none_at_every_level(
    level: str, twin: Callable[..., None]
) -> None:
    if lacking := missing(LEVELS[level][1]):
        pytest.skip(f"this processor lacks {lacking}")
    weight = weight_of("int8", 32, False)
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = cases.activations((2, 384), torch.float32)
        x[1, 7] = bad
        parts = (weight.packed, weight.scale, None, None, None, 8, False, 32, SHAPE[0])
        found = op_of(level)(x, *parts)
        wanted = twins_answer(twin, x, "int8", weight)
        assert torch.equal(found[0], wanted[0])
        assert not found[1].isfinite().any() and not wanted[1].isfinite().any()


def test_fp4_and_mxfp4_are_exact() -> None:
    for values, digits in ((E2M1_VALUES, 1), (FP4_VALUES, 2)):
        codes, scale, _ = cases.int_weight((37, 384), 32)
        weight = int8_dot.pack_codebook(codes, scale, values, 32)
        assert weight.table is not None and weight.table.shape == (digits, 16)
        table = torch.tensor(values, dtype=torch.float64)
        exact = table[codes.long()] * scale.double().repeat_interleave(32, dim=1)
        parts = (weight.packed, weight.scale, None, weight.table, 4, False, 32, (37, 384))
        # Scales and products are float32.
        error = (int8_dot.dequantize(*parts).double() - exact).abs()
        assert (error <= 2**-22 * exact.abs()).all()
