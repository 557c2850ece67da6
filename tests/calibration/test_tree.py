"""However leaves are shared out, their sums are added up along one tree."""

from __future__ import annotations

import pytest

from quantkit.calibration.processes.tree import (
    LEAVES,
    Sums,
    held_by,
    leaves_of,
    num_leaves,
    share_of,
    sums_at_once,
)


def reference(start: int, stop: int) -> str:
    """The sum of leaves as a formula: four children at a time, from the left."""
    width = 1
    while width * 4 < stop - start:
        width *= 4
    if stop - start == 1:
        return str(start)
    children = [reference(at, min(at + width, stop)) for at in range(start, stop, width)]
    formula = children[0]
    for child in children[1:]:
        formula = f"({formula}+{child})"
    return formula


def joined(leaves: int, size: int) -> tuple[str, int]:
    """The formula that `size` ranks come to, and the most sums that one of them held."""
    whole: Sums[str] = Sums(leaves, lambda a, b: f"({a}+{b})")
    most = 0
    for rank in range(size):
        mine: Sums[str] = Sums(leaves, lambda a, b: f"({a}+{b})")
        for leaf in share_of(leaves, rank, size):
            most = max(most, len(mine.parts) + 1)
            mine.add(range(leaf, leaf + 1), str(leaf))
        assert [part for part, _ in mine.parts] == held_by(leaves, rank, size)
        for part, formula in mine.parts:
            whole.add(part, formula)
    ((_, formula),) = whole.parts
    return formula, most


@pytest.mark.parametrize("leaves", range(1, LEAVES + 1))
def test_any_number_of_processes_adds_up_the_same(leaves: int) -> None:
    expected = reference(0, leaves)
    for size in (1, 2, 3, 4, 5, 7, 8, 16, 20):
        formula, most = joined(leaves, size)
        assert formula == expected
        assert most <= sums_at_once(leaves, size)


def test_one_process_holds_three_sums_at_a_time() -> None:
    assert sums_at_once(1) == 1
    assert {sums_at_once(leaves) for leaves in range(6, LEAVES + 1)} == {3}
    assert reference(0, 6) == "((((0+1)+2)+3)+(4+5))"


@pytest.mark.parametrize("count", [1, 3, 16, 17, 100])
def test_leaves_are_all_batches_in_their_order(count: int) -> None:
    leaves = leaves_of(range(count))
    assert [batch for leaf in leaves for batch in leaf] == list(range(count))
    assert len(leaves) == num_leaves(count) == min(count, LEAVES)
    assert max(map(len, leaves)) - min(map(len, leaves)) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 40])
def test_every_leaf_has_one_process_and_the_first_has_the_first(size: int) -> None:
    for leaves in (1, 7, 16):
        shares = [share_of(leaves, rank, size) for rank in range(size)]
        assert [leaf for share in shares for leaf in share] == list(range(leaves))
        assert 0 in shares[0]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
