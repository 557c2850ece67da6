"""Kernels compiled ahead of time for six GPU generations: resources and instructions."""

from __future__ import annotations

import importlib.util
import json
import os
import re
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


def start(*arguments: str) -> subprocess.Popen[str]:
    """The program; kernels imported here are interpreted, so they are compiled by another."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    return subprocess.Popen(
        [sys.executable, "-m", "quantkit_kernels.aot", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module", params=[pytest.param("all", marks=pytest.mark.long)])
def compiled() -> list[dict[str, Any]]:
    """Every build on sm_90 and a sixth of them, each time another, on the others.

    The program exits with 1, which fails every test here, where a loop over the columns stalls.
    """
    parts = [f"{number + 1}/{PROCESSES}" for number in range(PROCESSES)]
    running = [start("--sample", "--part", part) for part in parts]
    rows = []
    for process in running:
        out, error = process.communicate()
        assert process.returncode == 0, error
        rows += [json.loads(line) for line in out.splitlines()]
    return rows


def count(row: dict[str, Any], prefix: str) -> int:
    return sum(number for name, number in row["opcodes"].items() if name.startswith(prefix))


def test_the_first_kernel_compiles_and_does_not_stall() -> None:
    process = start("--arch", "90", "--part", "1/1000")
    out, error = process.communicate()
    assert process.returncode == 0, error
    (row,) = (json.loads(line) for line in out.splitlines())
    assert row["arch"] == 90 and not row["local_bytes"] and count(row, "HGMMA")


def test_every_architecture_compiles(compiled: list[dict[str, Any]]) -> None:
    assert {row["arch"] for row in compiled} == {80, 86, 89, 90, 100, 120}
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
    limits = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
    assert not [row["name"] for row in compiled if row["shared_bytes"] > limits[row["arch"]] << 10]


def test_the_rule_knows_what_programs_take(compiled: list[dict[str, Any]]) -> None:
    from quantkit_kernels.gpu.occupancy import usage

    ops = {"int8": "w8a16", "fp8": "fp8a16", "w8a8,": "w8a8", "fp8a8,": "fp8a8"}
    checked = 0
    for row in compiled:
        shape = re.search(r"128x(\d+), (\d+) warps", row["name"])
        if shape is None:
            continue
        tokens, warps = int(shape[1]), int(shape[2])
        most = usage(ops.get(row["name"].split()[0], "w4a16"), tokens, warps, row["arch"])
        assert row["registers"] <= most.registers, (row["name"], row["arch"])
        assert row["shared_bytes"] <= most.shared, (row["name"], row["arch"])
        checked += 1
    assert checked > 25


def of_hopper(compiled: list[dict[str, Any]], *starts: str) -> list[dict[str, Any]]:
    found = [row for row in compiled if row["arch"] == 90 and row["name"].startswith(starts)]
    assert found
    return found


def test_hopper_uses_its_warpgroup_instructions(compiled: list[dict[str, Any]]) -> None:
    for row in of_hopper(compiled, "int4", "int8", "fp8 ", "nf4", "e2m1", "experts"):
        assert count(row, "HGMMA") >= 8 and not count(row, "HMMA"), row["name"]
    for row in of_hopper(compiled, "w8a8"):
        assert count(row, "IGMMA") >= 4 and not count(row, "IMMA"), row["name"]
    for row in of_hopper(compiled, "fp8a8"):
        # Sums that leave the tensor core after each block; without that it would be HMMA.
        assert count(row, "QGMMA") >= 4 and not count(row, "HMMA"), row["name"]
        assert count(row, "FADD") >= 8, row["name"]


def test_weights_are_decoded_without_conversions_or_shuffles(
    compiled: list[dict[str, Any]],
) -> None:
    for row in of_hopper(compiled, "int4", "int8", "fp8 ", "nf4", "e2m1", "decode"):
        assert not count(row, "I2F"), row["name"]
    for row in of_hopper(
        compiled, "int4 g128", "int4 g64", "int4 row", "int8", "fp8 ", "nf4", "experts int4 g128"
    ):
        assert not count(row, "LDSM"), row["name"]


def test_loops_over_the_columns_do_not_stall(compiled: list[dict[str, Any]]) -> None:
    def inside(row: dict[str, Any], prefix: str) -> int:
        return sum(n for name, n in row["loop_opcodes"].items() if name.startswith(prefix))

    for row in of_hopper(compiled, "int4", "int8", "fp8", "nf4", "e2m1", "w8a8", "experts"):
        # Loads to registers are waited for; two waits are one for products and one for copies.
        assert not inside(row, "LDG."), row["name"]
        assert inside(row, "LDGSTS") and inside(row, "WARPGROUP.DEPBAR") <= 2, row["name"]


@pytest.mark.parametrize(
    ("name", "arch", "opcodes", "words"),
    [
        ("int4 g128 bf16, 128x16, 4 warps", 90, {"LDGSTS.E": 8, "WARPGROUP.DEPBAR.LE": 2}, []),
        ("int4 g128 bf16, 128x16, 4 warps", 80, {"LDG.E.U16": 1}, ["1 loads that no pipeline"]),
        ("fp8 row bf16, 128x16, 4 warps", 90, {"WARPGROUP.DEPBAR.LE": 16}, ["16 waits for"]),
        (
            "nf4 g64 bf16, 128x16, 4 warps",
            90,
            {"LDG.E.U8": 2, "WARPGROUP.DEPBAR": 8},
            ["2 loads", "8 waits"],
        ),
        ("decode int4, 64 rows, 4 warps", 90, {"LDG.E.128": 4}, []),
        ("fp8a8, 128x16, 8 warps", 100, {"LDG.E.U8": 10}, []),
    ],
)
def test_what_stalls_is_said(
    name: str, arch: int, opcodes: dict[str, int], words: list[str]
) -> None:
    from quantkit_kernels import aot

    row = aot.Compiled(
        name=name,
        arch=arch,
        registers=128,
        stack_bytes=0,
        local_bytes=0,
        shared_bytes=0,
        loop=300,
        opcodes=opcodes,
        loop_opcodes=opcodes,
    )
    found = row.stalls()
    assert len(found) == len(words)
    assert all(word in reason for word, reason in zip(words, found, strict=True))


def test_the_longest_loop_is_found_in_a_disassembly() -> None:
    from quantkit_kernels import aot

    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, [R4] ;
        /*0020*/              @P0  BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   LDGSTS.E [R6], [R4] ;
        /*0040*/                   FFMA R2, R2, R3, R4 ;
        /*0050*/             @!UP0 BRA `(.L_x_2) ;
.L_x_3:
        /*0060*/                   BRA `(.L_x_3) ;
"""
    opcodes, loop = aot._instructions(listing)
    assert len(opcodes) == 7 and loop == ["LDGSTS.E", "FFMA", "BRA"]


def test_weights_are_loaded_sixteen_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    for row in of_hopper(compiled, "int4", "int8", "fp8", "nf4", "e2m1", "w8a8", "experts"):
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
        ("e2m1 g32 bf16, 128x16", 520),
        ("e2m1 g16 bf16, 128x16", 520),
    ],
)
def test_loops_stay_short(compiled: list[dict[str, Any]], start: str, most: int) -> None:
    # Memory leaves about 1800 instructions a warp for a tile; a naive int4 loop has 1104 a thread.
    (row,) = of_hopper(compiled, start)
    assert 100 < row["loop"] <= most
