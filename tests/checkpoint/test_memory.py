"""Sizes as people write them, memory as the operating system counts it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from quantkit.calibration.gather import gram_bytes, split_passes
from quantkit.checkpoint.memory import (
    current_rss,
    format_size,
    parse_size,
    peak_rss,
    release_free_memory,
    return_large_blocks,
)
from quantkit.errors import BudgetError
from quantkit.methods.stats import Needs
from quantkit.pipeline.predict import Prediction


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1234", 1234),
        ("6GiB", 6 * 2**30),
        ("5GB", 5 * 10**9),
        ("800M", 800 * 10**6),
        ("1.5 gib", 3 * 2**29),
        ("2Ki", 2048),
        (" 3TB ", 3 * 10**12),
        ("0", 0),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "6 gigs", "-1GB", "1e9", "6GiBB", "0x10", "1,5GB"])
def test_a_size_that_is_none_shows_how_to_write_one(text: str) -> None:
    with pytest.raises(BudgetError, match="6GiB, 5GB or 800MB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (2**31, "2.00 GiB"), (2**41, "2048.00 GiB")],
)
def test_a_size_is_shown(size: int, text: str) -> None:
    assert format_size(size) == text


def test_memory_in_use_is_seen_and_its_return_too() -> None:
    return_large_blocks()
    # Pages that were freed and are still resident would be taken for the block.
    release_free_memory()
    before = current_rss()
    block = torch.ones(16 * 2**20)
    assert current_rss() - before > 60 * 2**20
    # The kernel counts pages per thread and adds them up now and then.
    assert peak_rss() >= current_rss() - 2**20
    del block
    release_free_memory()
    assert current_rss() - before < 32 * 2**20


PREDICTION = Prediction(
    base=100, block=20, forward=5, gram=10, grams=40, solve=8, disk=0, seconds=0.0
)


def test_the_smallest_budget_holds_one_gram_matrix_at_a_time() -> None:
    assert PREDICTION.smallest == 100 + 20 + 10 + 8
    assert PREDICTION.largest == 100 + 20 + 8 + 40
    assert PREDICTION.gram_budget(None) is None
    assert PREDICTION.gram_budget(PREDICTION.largest) is None
    assert PREDICTION.gram_budget(PREDICTION.largest - 1) == 39
    assert PREDICTION.gram_budget(PREDICTION.smallest) == PREDICTION.gram
    assert PREDICTION.peak(None) == PREDICTION.peak(10**6) == PREDICTION.largest
    assert PREDICTION.peak(PREDICTION.smallest + 3) == PREDICTION.smallest + 3


def test_a_budget_below_the_smallest_names_it() -> None:
    big = dataclasses.replace(PREDICTION, base=3 * 2**20)
    big.check(big.smallest)
    big.check(None)
    with pytest.raises(BudgetError, match=r"the smallest that works is --max-ram 12MiB"):
        big.check(big.smallest - 1)
    big.check_vram(big.smallest - big.base)
    with pytest.raises(BudgetError, match=r"the smallest that works is --max-vram 1MiB"):
        big.check_vram(big.smallest - big.base - 1)


def test_a_budget_on_the_gpu_limits_what_lives_there() -> None:
    assert PREDICTION.gram_budget(None, 68) is None
    assert PREDICTION.gram_budget(None, 67) == 39


def test_inputs_are_gathered_in_passes_that_fit() -> None:
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1}
    assert split_passes(sizes, None) == [["a", "b", "c", "d"]]
    assert split_passes(sizes, 18) == [["a", "b", "c", "d"]]
    assert split_passes(sizes, 10) == [["a", "b"], ["c", "d"]]
    assert split_passes(sizes, 9) == [["a", "b"], ["c"], ["d"]]
    assert split_passes(sizes, 1) == [["a"], ["b"], ["c"], ["d"]]


def test_a_gram_matrix_takes_float32() -> None:
    assert gram_bytes(64, Needs(gram=-1)) == 4 * 64 * 64
    assert gram_bytes(64, Needs(gram=32)) == 4 * 64 * 32
    assert gram_bytes(64, Needs(moments=True)) == 0
