"""Which tile a kernel uses: measured if this GPU was tuned, otherwise by a rule.

A table belongs to one GPU model and one version of torch and triton.  It maps (op, dtype, group, N,
K, rows) to a tile, or to None where decoding the weight and a plain matmul was faster.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from quantkit_kernels.cpu.native import cache_folder
from quantkit_kernels.gpu.occupancy import parts_of, programs_at_once, usage

_LOG = logging.getLogger(__name__)
# Above so many rows the tensor cores are busy whatever the weight's width: decode once instead;
# sooner what is dear to decode, or has 8 bits, so that less is to be won.  As measured on an H200
# (kernels/bench/results/gpu_h200.json).
_DECODE_ROWS, _DECODE_SOONER = 256, {"nf4": 128, "w8a16": 128, "fp8a16": 128}
# Row counts that are tuned; others use the next one.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a kernel cuts its work: `rows` of the weight by `tokens` of x, columns in `split` parts.

    `stages` is the depth of the load pipeline.
    """

    rows: int
    tokens: int
    split: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"a tile's {name} is {value!r}; allowed: whole numbers from 1 on")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One product: x [tokens, columns] by a weight [rows, columns]; `group` 0 is a whole row."""

    op: str
    dtype: str
    group: int
    rows: int
    columns: int
    tokens: int


@functools.lru_cache(maxsize=4096)
def problem_of(
    op: str, dtype: torch.dtype, group: int, rows: int, columns: int, tokens: int
) -> Problem:
    """The same Problem for the same numbers: calls look it up more cheaply than they make one."""
    name = str(dtype).removeprefix("torch.")
    return Problem(op=op, dtype=name, group=group, rows=rows, columns=columns, tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A measured choice; `microseconds` is its median time."""

    problem: Problem
    tile: Tile | None
    microseconds: float


@dataclass(frozen=True)
class Table:
    """Measured choices for one GPU model."""

    entries: tuple[Entry, ...]

    def find(self, problem: Problem) -> Entry | None:
        """The entry of this problem, else of a near one of the same kind, else None.

        Near is a weight whose sizes differ by at most a factor of two together, and the next count
        of rows that was measured, less than twice as many.
        """
        near = [
            entry
            for entry in self.entries
            if (entry.problem.op, entry.problem.dtype, entry.problem.group)
            == (problem.op, problem.dtype, problem.group)
            and problem.tokens <= entry.problem.tokens < 2 * problem.tokens
            and _distance(entry.problem, problem) <= 1
        ]
        return min(
            near,
            key=lambda entry: (_distance(entry.problem, problem), entry.problem.tokens),
            default=None,
        )

    def to_json(self) -> str:
        """The table as `read_table` reads it."""
        return json.dumps([asdict(entry) for entry in self.entries], indent=1)

    def merged(self, newer: Iterable[Entry]) -> Table:
        """This table with entries added or replaced."""
        known = {entry.problem: entry for entry in self.entries}
        known.update({entry.problem: entry for entry in newer})
        return Table(tuple(known.values()))


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, device: int) -> Tile | None:
    """The tile for a problem on a CUDA device; None means: decode the weight, then a plain matmul.

    Reads the tuned table once per process and never measures anything itself.
    """
    entry = tuned(device).find(problem)
    if entry is not None:
        return entry.tile
    if problem.tokens > decode_rows(problem.op):
        return None
    return heuristic(problem, *_device(device))


def decode_rows(op: str) -> int:
    """The most rows of x that an op's fused kernel takes where nothing was tuned."""
    return _DECODE_SOONER.get(op, _DECODE_ROWS)


@functools.lru_cache(maxsize=4096)
def choose_eight(problem: Problem, device: int) -> Tile:
    """The tile of a product of 8-bit numbers, which never decodes."""
    entry = tuned(device).find(problem)
    if entry is not None and entry.tile is not None:
        return entry.tile
    return heuristic(problem, *_device(device))


@functools.lru_cache(maxsize=4096)
def choose_experts(problem: Problem, experts: int, device: int) -> Tile:
    """The tile of a product with the weights of so many experts; `tokens` counts all their rows."""
    return heuristic(problem, *_device(device), experts=experts)


def heuristic(problem: Problem, multiprocessors: int, capability: int, *, experts: int = 1) -> Tile:
    """A tile, its columns split so that every multiprocessor is busy and as many programs as fit.

    `capability` is that of the GPU, as in 90; `experts` share the rows evenly, it is hoped.  The
    limits are those up to which no kernel spills registers when compiled
    (tests/kernel_ops/test_aot.py).
    """
    widest = 128 if problem.op in ("w8a8", "fp8a8") and capability == 90 else 64
    each = -(-problem.tokens // experts)
    tokens = min(widest, max(16, 1 << max(each - 1, 0).bit_length()))
    row_tiles = -(-problem.rows // 128)
    programs = row_tiles * min(experts * -(-each // tokens), problem.tokens)
    blocks = -(-problem.columns // 128)
    few_warps = tokens == 16 and (capability < 100 or problem.op in ("w8a16", "fp8a16"))
    # Sums of 8-bit floats leave the tensor core after every block: four warps wait for each step.
    few_warps = few_warps and problem.op != "fp8a8"
    warps = 4 if few_warps else 8
    at_once = programs_at_once(usage(problem.op, tokens, warps, capability), capability)
    split = parts_of(programs, blocks, tokens, multiprocessors * at_once)
    return Tile(rows=128, tokens=tokens, split=split, warps=warps, stages=3)


@functools.cache
def tuned(device: int) -> Table:
    """What `quantkit tune` measured for a CUDA device, else the table we ship, or an empty one.

    A table that cannot be read is passed over, and logged: forward passes ask for it.
    """
    name = device_name(device)
    for find in (cache_path, shipped_path):
        try:
            path = find(name)
            if path.is_file():
                return read_table(path)
        except (OSError, ValueError) as error:
            _LOG.warning("the tuned table of %s is passed over: %s", name, error)
    return Table(())


def read_table(path: Path) -> Table:
    """The table of a JSON file; ValueError if it is none."""
    try:
        return Table(
            tuple(
                Entry(
                    problem=Problem(**item["problem"]),
                    tile=None if item["tile"] is None else Tile(**item["tile"]),
                    microseconds=float(item["microseconds"]),
                )
                for item in json.loads(path.read_text(encoding="utf-8"))
            )
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no table of this version: {error}") from error


def write_table(path: Path, table: Table) -> None:
    """Writes a table; readers see the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(table.to_json() + "\n", encoding="utf-8")
    os.replace(partial, path)
    tuned.cache_clear()
    choose.cache_clear()
    choose_eight.cache_clear()
    choose_experts.cache_clear()


def cache_path(device: str) -> Path:
    """Where the table made here is kept."""
    import triton

    version = torch.__version__.split("+")[0]
    return cache_folder() / f"{device}-torch{version}-triton{triton.__version__}.json"


def shipped_path(device: str) -> Path:
    """Where the table of a GPU that we measured would be."""
    return Path(__file__).parent / "tuned" / f"{device}.json"


def device_name(device: int) -> str:
    """The GPU's name as a file name."""
    name = torch.cuda.get_device_properties(device).name.lower()
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def candidates(problem: Problem, multiprocessors: int, capability: int) -> Sequence[Tile]:
    """The tiles worth timing for a problem, the rule's first."""
    first = heuristic(problem, multiprocessors, capability)
    tokens = first.tokens
    blocks = -(-problem.columns // 128)
    splits = [split for split in (1, 2, 4, 8, 16) if split <= max(1, blocks // 2)]
    found = [first]
    shapes = [(64, 4), (128, 4), (128, 8)] if tokens == 16 else [(64, 4), (128, 8)]
    for rows, warps in shapes:
        for stages in (2, 3, 4):
            for split in splits:
                tile = Tile(rows=rows, tokens=tokens, split=split, warps=warps, stages=stages)
                if tile not in found:
                    found.append(tile)
    return found


def _distance(entry: Problem, problem: Problem) -> float:
    """How many times twice as large the sizes of one weight are."""
    pairs = ((entry.rows, problem.rows), (entry.columns, problem.columns))
    return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)


@functools.cache
def _device(device: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor
