"""unpack(pack(q)) == q for 10,000 random weights, and layouts that need no numbers."""

from __future__ import annotations

import random

import pytest
import torch
from format_samples import planned, quantized, same, stored

from quantkit.errors import SchemeError
from quantkit.formats.format import BuiltFormat, Format
from quantkit.formats.registry import available_formats, make_format
from quantkit.numbers.scheme import Scheme

CASES_PER_FORMAT = 2000
# What one scheme alone goes into (fp8's blocks, gguf's mixes), or is built of a checkpoint (onnx),
# has tests of its own.
COMMON = [Scheme.parse(name) for name in ("w4a16_g32", "w4a16_g32_asym", "w8a8_row", "nf4_b64")]
FORMATS = [
    name
    for name in available_formats()
    if not isinstance(made := make_format(name), BuiltFormat)
    and any(made.supports(scheme) is None for scheme in COMMON)
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random_scheme(rng: random.Random) -> Scheme | None:
    """Any scheme there is, groups of odd sizes included; None for parts that do not go together."""
    kind = rng.choice(("int", "int", "int", "nf4", "fp4", "fp8"))
    try:
        if kind == "int":
            return Scheme(
                kind="int",
                bits=rng.randint(2, 8),
                group_size=rng.choice((None, 2, 3, 8, 16, 24, 32, 64, 128)),
                symmetric=rng.random() < 0.5,
                activation_bits=rng.choice((8, 16)),
            )
        if kind == "fp8":
            return Scheme.parse(rng.choice(("fp8a8_row", "fp8a16_row")))
        block = rng.choice((32, 64, 128, 256))
        return Scheme.parse(f"{kind}_b{block}" + rng.choice(("", "_dq")))
    except SchemeError:
        return None


def random_case(chosen: Format, rng: random.Random) -> tuple[Scheme, tuple[int, int]]:
    """A scheme and a shape that the format holds."""
    for _ in range(10_000):
        scheme = random_scheme(rng)
        if scheme is None or chosen.supports(scheme) is not None:
            continue
        rows, columns = rng.choice((1, 5, 7, 8, 16, 32, 33)), rng.choice((8, 24, 32, 33, 64, 96))
        if not scheme.flat and columns % (scheme.group_size or 1):
            continue
        if chosen.supports_shape(planned("m.0.a.weight", (rows, columns), scheme)) is None:
            return scheme, (rows, columns)
    raise AssertionError(f"{chosen.name}: no random scheme is held")


@pytest.mark.parametrize("format_name", FORMATS)
def test_what_is_packed_comes_back(format_name: str) -> None:
    chosen, rng = make_format(format_name), random.Random(format_name)
    for number in range(CASES_PER_FORMAT):
        scheme, shape = random_case(chosen, rng)
        dtype = rng.choice(DTYPES)
        weight = planned("m.0.a.weight", shape, scheme)
        tensor = quantized(scheme, shape, dtype, seed=number)
        source = stored(chosen, [weight], chosen.pack(weight, tensor), dtype)
        found = chosen.weights(source)[weight.name]
        assert (found.scheme, found.shape, found.dtype) == (scheme, shape, dtype)
        assert same(chosen.unpack(found, source), tensor), (scheme.name, shape)


def test_there_are_ten_thousand_cases() -> None:
    assert CASES_PER_FORMAT * len(available_formats()) >= 10_000


@pytest.mark.parametrize("format_name", FORMATS)
def test_layouts_of_the_largest_weights_need_no_memory(format_name: str) -> None:
    chosen, rng = make_format(format_name), random.Random(0)
    for _ in range(50):
        scheme, _ = random_case(chosen, rng)
        shape = (1 << 20, 3 << 16)
        weight = planned("m.0.a.weight", shape, scheme)
        if scheme.group_size is None or shape[1] % scheme.group_size == 0:
            infos = chosen.layout(weight, torch.bfloat16)
            bits = 8 * sum(info.nbytes for info in infos) / (shape[0] * shape[1])
            assert scheme.bits <= bits < scheme.bits + 33
