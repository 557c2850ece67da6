"""Work of a block is shared out evenly, and together goes only what does not depend on another."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibration.processes.ranks import owners_of
from quantkit.calibration.processes.work import apart, work_owners
from quantkit.model.refs import ScaleGroup, WeightRef


def ref(name: str, key: str, rows: int = 96, columns: int = 64) -> WeightRef:
    return WeightRef(name=name, block=0, shape=(rows, columns), parameter=name, input=key)


def group(producer: str, key: str, *readers: str) -> ScaleGroup:
    return ScaleGroup(
        kind="norm",
        block=0,
        producer=producer,
        bias=None,
        expert=None,
        transposed=False,
        offset=0.0,
        rows=torch.arange(64),
        channel_map=torch.arange(64),
        inputs=(key,),
        readers=tuple(ref(name, key) for name in readers),
        producer_names=(producer,),
    )


QKV, HEADS, UP, DOWN = (
    group("input_norm", "attention", "q", "k", "v"),
    group("v", "heads", "o"),
    group("norm", "mlp", "gate", "up"),
    group("up", "inner", "down"),
)


def test_vectors_that_do_not_depend_on_another_are_searched_together() -> None:
    # v and up are changed as readers before they are as producers: that leaves o and down alone.
    assert apart([QKV, HEADS, UP, DOWN]) == [[QKV, HEADS, UP, DOWN]]


def test_a_reader_that_was_changed_waits() -> None:
    # Folding v's rows changes what the search over q, k and v reads.
    assert apart([HEADS, QKV]) == [[HEADS], [QKV]]
    again = group("other_norm", "attention", "x")
    assert apart([QKV, HEADS, again]) == [[QKV, HEADS], [again]]


def test_the_dearest_goes_first_to_whoever_has_least() -> None:
    costs = {"a": 3.0, "b": 8.0, "c": 4.0, "d": 2.0}
    assert owners_of(costs, 2) == {"b": 0, "c": 1, "a": 1, "d": 1}
    assert owners_of({"a": 1.0, "b": 1.0}, 1) == {"a": 0, "b": 0}


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_all_that_reads_an_input_has_one_owner(size: int) -> None:
    experts = [(f"expert {k}", [ref(f"w{k}", f"expert {k}")]) for k in range(12)]
    wide = [("inner", [ref("down", "inner", columns=512)]), ("inner", [ref("down_2", "inner")])]
    owners = work_owners([*wide, *experts], [QKV], size)
    assert set(owners) == {"inner", "attention", *(key for key, _ in experts)}
    assert set(owners.values()) == set(range(size))
    # The wide one takes longest, so what holds it holds least besides.
    loads = [sum(owner == rank for owner in owners.values()) for rank in range(size)]
    assert loads[owners["inner"]] == min(loads)
