"""How many programs fit, against NVIDIA's occupancy calculator; and the parts that follow."""

from __future__ import annotations

import pytest
from quantkit_kernels.gpu import occupancy
from quantkit_kernels.gpu.occupancy import Usage, parts_of, programs_at_once


@pytest.mark.parametrize(
    ("registers", "kib", "warps", "capability", "wanted"),
    [
        (128, 29, 4, 90, 4),  # registers: 65536 / (128 · 128)
        (143, 65, 8, 90, 1),  # 36864 registers
        (71, 20, 4, 90, 7),  # 72 registers are given
        (32, 54, 4, 90, 4),  # shared memory: 228 / 55
        (32, 0, 4, 90, 16),  # 64 warps
        (32, 0, 4, 89, 12),  # 48 warps
        (16, 0, 1, 86, 16),  # programs
        (16, 0, 1, 80, 32),
        (96, 58, 4, 89, 1),  # 100 / 59
        (255, 96, 8, 120, 1),
        (255, 227, 16, 90, 1),  # never none
    ],
)
def test_programs_that_fit(
    registers: int, kib: int, warps: int, capability: int, wanted: int
) -> None:
    assert programs_at_once(Usage(registers, kib << 10, warps), capability) == wanted


def test_unknown_generations_count_as_the_one_before() -> None:
    taken = Usage(128, 29 << 10, 4)
    assert programs_at_once(taken, 103) == programs_at_once(taken, 100)
    assert programs_at_once(taken, 75) == programs_at_once(taken, 80)
    assert occupancy.usage("w4a16", 16, 4, 121) == occupancy.usage("w4a16", 16, 4, 120)


@pytest.mark.parametrize("op", ["w4a16", "nf4", "e2m1", "w8a16", "fp8a16", "w8a8", "fp8a8"])
@pytest.mark.parametrize("capability", sorted(occupancy.LIMITS))
def test_every_tile_of_the_rule_has_its_usage(op: str, capability: int) -> None:
    for tokens in (16, 32, 64):
        taken = occupancy.usage(op, tokens, 8, capability)
        assert taken.registers <= 255 and programs_at_once(taken, capability) >= 1


@pytest.mark.parametrize(
    ("programs", "blocks", "tokens", "slots", "wanted"),
    [
        (32, 32, 16, 396, 8),  # 4096 x 4096, one token: no part has fewer than four blocks
        (112, 32, 16, 396, 3),  # 14336 x 4096: 336 programs in one wave; a fourth part wants two
        (112, 32, 64, 132, 1),  # the same at 64 tokens, one program a multiprocessor
        (32, 32, 64, 132, 4),  # 4096 x 4096 at 64: 128 programs of 132
        (1002, 32, 16, 396, 1),  # a head of 128256 rows
        (1, 3, 16, 396, 1),
        (1, 1000, 16, 396, 16),
    ],
)
def test_parts_fill_the_gpu_once(
    programs: int, blocks: int, tokens: int, slots: int, wanted: int
) -> None:
    assert parts_of(programs, blocks, tokens, slots) == wanted


def test_no_other_number_of_parts_has_a_shorter_way() -> None:
    def way(programs: int, blocks: int, tokens: int, slots: int, parts: int) -> float:
        # Slot by slot: the next program goes to the one that is free first.
        each = -(-blocks // parts) + (tokens / 16 if parts > 1 else 0)
        free = [0.0] * slots
        for _ in range(programs * parts):
            first = min(range(slots), key=free.__getitem__)
            free[first] += each
        return max(free)

    for programs in (1, 5, 12, 31):
        for blocks in (3, 16, 43):
            for tokens in (16, 64):
                found = parts_of(programs, blocks, tokens, 20)
                ways = [
                    way(programs, blocks, tokens, 20, parts)
                    for parts in range(1, min(16, max(1, blocks // 4)) + 1)
                ]
                assert ways[found - 1] == min(ways) and found - 1 == ways.index(min(ways))
