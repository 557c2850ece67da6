"""Kernels compiled ahead of time for four GPU generations: resources and instructions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
PROCESSES = 2

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is for Linux"
)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Every build on sm_90 and a fourth of them, each time another, on the others."""
    # Kernels imported here are interpreted: they are compiled by processes of their own.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "quantkit_kernels.aot"),
                *("--sample", "--part", f"{number + 1}/{PROCESSES}"),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    rows = []
    for process in running:
        out, error = process.communicate()
        assert process.returncode == 0, error
        rows += [json.loads(line) for line in out.splitlines()]
    return rows


def count(row: dict[str, Any], prefix: str) -> int:
    return sum(number for name, number in row["opcodes"].items() if name.startswith(prefix))


def test_every_architecture_compiles(compiled: list[dict[str, Any]]) -> None:
    assert {row["arch"] for row in compiled} == {80, 89, 90, 100}
    assert sum(row["arch"] == 90 for row in compiled) > 20


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    # Spilled registers are stored to and loaded from local memory.
    spilled = [
        (row["name"], row["arch"])
        for row in compiled
        if row["local_bytes"] or count(row, "STL") or count(row, "LDL")
    ]
    assert not spilled


def test_shared_memory_stays_within_what_a_program_may_use(compiled: list[dict[str, Any]]) -> None:
    limits = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
    assert not [row["name"] for row in compiled if row["shared_bytes"] > limits[row["arch"]]]


def of_hopper(compiled: list[dict[str, Any]], *starts: str) -> list[dict[str, Any]]:
    found = [row for row in compiled if row["arch"] == 90 and row["name"].startswith(starts)]
    assert found
    return found


def test_hopper_uses_its_warpgroup_instructions(compiled: list[dict[str, Any]]) -> None:
    for row in of_hopper(compiled, "int4", "int8", "fp8 ", "nf4", "experts"):
        assert count(row, "HGMMA") >= 8 and not count(row, "HMMA"), row["name"]
    for row in of_hopper(compiled, "w8a8"):
        assert count(row, "IGMMA") >= 4 and not count(row, "IMMA"), row["name"]
    for row in of_hopper(compiled, "fp8a8"):
        # Sums that leave the tensor core after each block; without that it would be HMMA.
        assert count(row, "QGMMA") >= 4 and not count(row, "HMMA"), row["name"]
        assert count(row, "FADD") >= 16, row["name"]


def test_weights_are_decoded_without_conversions_or_shuffles(
    compiled: list[dict[str, Any]],
) -> None:
    for row in of_hopper(compiled, "int4", "int8", "fp8 ", "nf4", "decode"):
        assert not count(row, "I2F"), row["name"]
    for row in of_hopper(
        compiled, "int4 g128", "int4 g64", "int4 row", "int8", "fp8 ", "nf4", "experts int4 g128"
    ):
        assert not count(row, "LDSM"), row["name"]


def test_weights_are_loaded_sixteen_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    for row in of_hopper(compiled, "int4", "int8", "fp8", "nf4", "w8a8", "experts"):
        assert count(row, "LDGSTS.E.BYPASS.128") >= 12, row["name"]
    for row in of_hopper(compiled, "decode"):
        assert count(row, "LDG.E.EF.128"), row["name"]


@pytest.mark.parametrize(
    ("start", "most"),
    [
        ("int4 g128 bf16, 128x16", 350),
        ("experts int4 g128 bf16, 128x16", 350),
        ("int8 row bf16, 128x16", 450),
        ("fp8 row bf16, 128x16", 520),
        ("nf4 g64 bf16, 128x16", 750),
    ],
)
def test_loops_stay_short(compiled: list[dict[str, Any]], start: str, most: int) -> None:
    # Memory leaves about 1800 instructions a warp for a tile; a naive int4 loop has 1104 a thread.
    (row,) = of_hopper(compiled, start)
    assert 100 < row["loop"] <= most
