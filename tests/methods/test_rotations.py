"""Rotations against their matrices, written out."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from reference import activations
from torch import Tensor

from quantkit.errors import RecipeError
from quantkit.methods.parts import available, make_part
from quantkit.methods.rotations.hadamard import Hadamard


def hadamard_matrix(size: int) -> Tensor:
    """Sylvester's: entries (-1)^(number of bits that i and j share)."""
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=torch.float64)


def hartley_matrix(size: int) -> Tensor:
    angles = [[2 * math.pi * i * j / size for j in range(size)] for i in range(size)]
    rows = [[math.cos(a) + math.sin(a) for a in row] for row in angles]
    return torch.tensor(rows, dtype=torch.float64)


# Powers of two, odd numbers, and what models have: 576 = 64 * 9, 896 = 128 * 7.
@pytest.mark.parametrize("size", [1, 2, 32, 7, 9, 96, 576, 896])
def test_a_rotation_is_its_matrix(size: int) -> None:
    part = Hadamard(seed=3)
    x = activations(5, size, 1).double()
    power = size & -size
    matrix = torch.kron(hadamard_matrix(power), hartley_matrix(size // power)) / math.sqrt(size)
    # The first row of every factor is constant, so that it tells the signs.
    signs = part(torch.eye(size, dtype=torch.float64), "key")[:, 0].sign()
    assert set(signs.tolist()) <= {-1.0, 1.0}
    # float64 sums of `size` terms in another order.
    torch.testing.assert_close(part(x, "key"), (x * signs) @ matrix, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [32, 63, 576])
def test_a_rotation_is_orthogonal(size: int) -> None:
    matrix = Hadamard()(torch.eye(size, dtype=torch.float64), "stream")
    unit = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.t(), unit, rtol=0, atol=1e-12)
    assert matrix.abs().max() <= math.sqrt(2 / size) * (1 + 1e-12)


def test_a_row_has_the_same_bits_in_any_company() -> None:
    part, x = Hadamard(), activations(300, 576, 2).double()
    whole = part(x, "stream")
    for rows in (slice(0, 1), slice(7, 8), slice(3, 300)):
        assert torch.equal(part(x[rows], "stream"), whole[rows])


def test_signs_depend_on_the_key_and_the_seed() -> None:
    x = torch.eye(64, dtype=torch.float64)
    found = [Hadamard(seed=s)(x, key) for s, key in ((0, "a"), (0, "b"), (1, "a"))]
    assert not any(torch.equal(one, other) for one, other in pairwise(found))
    assert torch.equal(found[0], Hadamard(seed=0)(x, "a"))


def test_a_rotation_of_nothing_is_refused() -> None:
    assert available("rotation") == ["hadamard"]
    with pytest.raises(RecipeError, match="nothing is rotated"):
        make_part("rotation", "hadamard", {"stream": False, "heads": False})
