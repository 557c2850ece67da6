"""Scheme names, what they mean, and what is refused."""

from __future__ import annotations

import pytest

from quantkit.errors import SchemeError, ShapeError
from quantkit.numbers.scheme import Scheme

NAMES = [
    *(
        f"w{bits}a16_g{size}{asym}"
        for bits in range(2, 9)
        for size in (32, 128)
        for asym in ("", "_asym")
    ),
    *(f"w{bits}a16_row" for bits in range(2, 9)),
    "w8a8_row",
    "nf4_b64",
    "nf4_b64_dq",
    "fp4_b128_dq",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_back(name: str) -> None:
    assert Scheme.parse(name).name == name


def test_the_parts_of_a_name() -> None:
    scheme = Scheme.parse("w3a16_g64_asym")
    assert (scheme.kind, scheme.bits, scheme.group_size) == ("int", 3, 64)
    assert not scheme.symmetric and scheme.activation_bits == 16 and not scheme.flat
    assert Scheme.parse("w8a8_row").activation_bits == 8
    nf4 = Scheme.parse("nf4_b64_dq")
    assert (nf4.kind, nf4.bits, nf4.group_size, nf4.double_quant) == ("nf4", 4, 64, True)
    assert nf4.flat and nf4.symmetric


@pytest.mark.parametrize(
    "name",
    [
        "",
        "w4",
        "w9a16_g32",
        "w1a16_row",
        "w4a4_g32",
        "w4a16",
        "w4a16_g",
        "W4a16_g32",
        "nf4",
        "int8",
    ],
)
def test_an_unknown_name_lists_the_allowed(name: str) -> None:
    with pytest.raises(SchemeError, match=r"is unknown; allowed: w\{2-8\}a\{16\|8\}"):
        Scheme.parse(name)


@pytest.mark.parametrize(
    "name",
    [
        *("w5a8_row", "w8a8_g128", "w8a8_row_asym", "w4a8_g32_asym"),
        *("w3afp8_g128", "w8afp8_row", "w4afp8_g128_asym"),
    ],
)
def test_activations_of_8_bits_go_with_8_bits_per_row_and_4(name: str) -> None:
    with pytest.raises(SchemeError, match="use w8a8_row, w4a8_g128"):
        Scheme.parse(name)


def test_int8_weights_are_centered_where_activations_are_int8() -> None:
    assert Scheme.parse("w8a8_row").centered
    assert not any(Scheme.parse(name).centered for name in ("w8a16_row", "w4a8_row", "fp8a8_row"))


def test_integers_that_meet_float8_are_another_scheme_than_those_that_meet_int8() -> None:
    scheme = Scheme.parse("w4afp8_g128")
    assert (scheme.kind, scheme.bits, scheme.activation_bits) == ("int", 4, 8)
    assert scheme.float_input and not scheme.static_input and scheme.name == "w4afp8_g128"
    assert scheme != Scheme.parse("w4a8_g128")
    with pytest.raises(SchemeError, match="integer weights only"):
        Scheme(kind="fp8", bits=8, group_size=None, activation_bits=8, float_input=True)


@pytest.mark.parametrize(("name", "activation_bits"), [("fp8a8_row", 8), ("fp8a16_row", 16)])
def test_fp8_has_one_scale_per_row(name: str, activation_bits: int) -> None:
    scheme = Scheme.parse(name)
    assert (scheme.kind, scheme.bits, scheme.group_size) == ("fp8", 8, None)
    assert scheme.activation_bits == activation_bits and scheme.name == name
    assert scheme.symmetric and not scheme.flat
    with pytest.raises(SchemeError, match="fp8a8_row or fp8a16_row"):
        Scheme(kind="fp8", bits=4, group_size=None)
    with pytest.raises(SchemeError, match="per row: fp8a8_row"):
        Scheme.parse("fp8a8_g128")
    assert Scheme.parse("fp8a16_g128").group_size == 128


def test_groups_of_less_than_two_are_refused() -> None:
    with pytest.raises(SchemeError, match="at least 2"):
        Scheme.parse("w4a16_g1")


def test_a_group_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(ShapeError) as caught:
        Scheme.parse("w4a16_g96").check_shape("layers.3.mlp.down_proj", (4096, 11008))
    message = str(caught.value)
    assert "layers.3.mlp.down_proj: 11008 columns are not divisible by group_size 96" in message
    for size in ("32", "43", "64", "86", "128", "172", "256"):
        assert size in message
    assert '"row"' in message


@pytest.mark.parametrize("name", ["w4a16_row", "nf4_b64", "w4a16_g43"])
def test_a_shape_that_fits_is_accepted(name: str) -> None:
    Scheme.parse(name).check_shape("w", (16, 11008))


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("w4a16_g32", (6, 96), 18),
        ("w4a16_row", (6, 96), 6),
        ("nf4_b64", (6, 96), 9),
        ("nf4_b64", (5, 33), 3),
    ],
)
def test_groups_are_counted(name: str, shape: tuple[int, int], count: int) -> None:
    assert Scheme.parse(name).num_groups(shape) == count
