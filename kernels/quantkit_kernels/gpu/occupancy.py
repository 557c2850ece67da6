"""How many programs a GPU runs at once, and into how many parts that cuts the columns of a product.

Pure functions of numbers that the compiler tells (`python -m quantkit_kernels.aot`) and NVIDIA
publishes (CUDA C++ programming guide, "technical specifications per compute capability").
"""

from __future__ import annotations

from typing import NamedTuple


class Usage(NamedTuple):
    """What a program takes: registers of a thread, bytes of shared memory, warps."""

    registers: int
    shared: int
    warps: int


class Limits(NamedTuple):
    """What a multiprocessor has: bytes of shared memory, warps, programs; 65536 registers."""

    shared: int
    warps: int
    programs: int


LIMITS = {
    80: Limits(164 << 10, 64, 32),
    86: Limits(100 << 10, 48, 16),
    89: Limits(100 << 10, 48, 24),
    90: Limits(228 << 10, 64, 32),
    100: Limits(228 << 10, 64, 32),
    120: Limits(100 << 10, 48, 24),
}
_REGISTERS = 65536
# Registers are given to warps in units of 256; a program takes 1 KiB of shared memory for itself.
_UNIT, _OWN = 256, 1 << 10
# (registers, KiB) that no kernel of a kind exceeds at so many tokens, by the matrix instructions:
# those of a warp (sm_80 to 89, sm_120), of a warpgroup (sm_90), of tensor memory (sm_100).  4-bit
# weights, 8-bit weights, products of 8-bit numbers.  tests/kernel_ops/test_aot.py compares.
_MOST: dict[int, dict[str, dict[int, tuple[int, int]]]] = {
    80: {
        "four": {16: (168, 60), 32: (128, 65), 64: (184, 84)},
        "wide": {16: (128, 73), 64: (168, 96)},
        "eight": {16: (80, 36), 64: (112, 48)},
    },
    90: {
        "four": {16: (168, 32), 32: (128, 41), 64: (160, 68)},
        "wide": {16: (128, 45), 64: (152, 80)},
        "eight": {16: (64, 54), 64: (120, 72), 128: (240, 96)},
    },
    100: {
        "four": {16: (128, 33), 32: (120, 34), 64: (176, 69)},
        "wide": {16: (128, 42), 64: (112, 65)},
        "eight": {16: (48, 55), 64: (144, 73)},
    },
}
_KINDS = {"w8a16": "wide", "fp8a16": "wide", "w8a8": "eight", "fp8a8": "eight"}
# Blocks of columns that a program has at least, or its pipeline never fills, and most parts.
_LEAST_BLOCKS, _MOST_PARTS = 4, 16


def usage(op: str, tokens: int, warps: int, capability: int) -> Usage:
    """What a program of 128 rows by `tokens` takes at most, under three stages."""
    generation = {90: 90, 100: 100}.get(_known(capability), 80)
    kinds = _MOST[generation][_KINDS.get(op, "four")]
    registers, kib = kinds[min(size for size in kinds if size >= tokens)]
    return Usage(registers, kib << 10, warps)


def programs_at_once(taken: Usage, capability: int) -> int:
    """How many such programs a multiprocessor holds, at least 1."""
    limits = LIMITS[_known(capability)]
    warp = -(-taken.registers * 32 // _UNIT) * _UNIT
    return max(
        1,
        min(
            _REGISTERS // warp // taken.warps,
            limits.shared // (taken.shared + _OWN),
            limits.warps // taken.warps,
            limits.programs,
        ),
    )


def parts_of(programs: int, blocks: int, tokens: int, slots: int) -> int:
    """Into how many parts to cut `blocks` of 128 columns, for `programs` tiles of the result.

    The fewest that make the longest way short: waves over the `slots` that the GPU has at once, of
    the blocks of a part each.  Parts are written and added up afterwards; for 16 tokens that takes
    about as long as a block.
    """
    most = min(_MOST_PARTS, max(1, blocks // _LEAST_BLOCKS))

    def way(parts: int) -> float:
        waves = -(-programs * parts // slots)
        return waves * (-(-blocks // parts) + (tokens / 16 if parts > 1 else 0))

    return min(range(1, most + 1), key=way)


def _known(capability: int) -> int:
    """The newest capability of LIMITS that is no newer than this one."""
    return max((one for one in LIMITS if one <= capability), default=min(LIMITS))
