"""How long GPU work takes without launch costs, and tiles chosen by it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_kernels.gpu import tuning
from quantkit_kernels.gpu.tuning import Entry, Problem, Tile

# More than any L2 cache holds: weights must come from memory, as they do in a model.
ROTATED_BYTES = 256 << 20
_REPLAYS = 20
# Cycles, some fifth of a millisecond.
_QUEUEING = 400_000

# One call of a kernel with a tile; None decodes the weight and multiplies with cuBLAS.
Call = Callable[[Tile | None], object]
Measure = Callable[[Sequence[Callable[[], object]]], float]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A problem with calls on weights of its own, enough of them to flush the cache."""

    problem: Problem
    calls: Sequence[Call]


def graph_microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """The median time of one call in microseconds; see `graph_times`."""
    return statistics.median(graph_times(calls))


def graph_times(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Microseconds of one call in each replay of a CUDA graph that has captured all calls."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()  # compiles, and warms the allocator
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(_REPLAYS + 3):
        start, stop = _event(), _event()
        # The GPU is busy until all three are queued: launching takes no part in the time.
        torch.cuda._sleep(_QUEUEING)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)) * 1000 / len(calls))
    return times[3:]


def best(candidate: Candidate, multiprocessors: int, capability: int, measure: Measure) -> Entry:
    """The fastest tile of a problem; tiles that do not fit the GPU are passed over."""
    problem = candidate.problem
    tiles: list[Tile | None] = list(tuning.candidates(problem, multiprocessors, capability))
    if problem.op not in ("w8a8", "fp8a8") and problem.tokens >= 64:
        tiles.append(None)
    timed = []
    for tile in tiles:
        try:
            timed.append((measure([_bind(call, tile) for call in candidate.calls]), tile))
        except _too_large():
            continue
    microseconds, tile = min(timed, key=lambda pair: pair[0])
    return Entry(problem=problem, tile=tile, microseconds=microseconds)


def copies(tensor_bytes: int) -> int:
    """How many copies of a weight of so many bytes flush the cache."""
    return max(2, -(-ROTATED_BYTES // tensor_bytes))


def problems(op: str, group: int, rows: int, columns: int, dtype: torch.dtype) -> Iterator[Problem]:
    """The problems of one weight shape, one for each bucket of row counts."""
    for tokens in tuning.BUCKETS:
        yield Problem(
            op=op,
            dtype=str(dtype).removeprefix("torch."),
            group=group,
            rows=rows,
            columns=columns,
            tokens=tokens,
        )


def candidate(problem: Problem, device: torch.device) -> Candidate:
    """Random weights for a problem and the calls that multiply by them."""
    from quantkit_kernels.gpu import fp8 as fp8_triton
    from quantkit_kernels.gpu import fused as fused_triton
    from quantkit_kernels.gpu import w8a8 as w8a8_triton
    from quantkit_kernels.gpu.weight import Weight

    dtype = getattr(torch, problem.dtype)
    rows, columns = -(-problem.rows // 128) * 128, -(-problem.columns // 128) * 128
    x = torch.randn(problem.tokens, problem.columns, dtype=dtype, device=device)
    shape = (problem.rows, problem.columns)
    if problem.op in ("w8a8", "fp8a8"):
        multiply = w8a8_triton.matmul if problem.op == "w8a8" else fp8_triton.matmul

        def product(weight: Tensor, scale: Tensor) -> Call:
            def call(tile: Tile | None) -> object:
                assert tile is not None
                return multiply(x, weight, scale, None, problem.rows, tile)

            return call

        return Candidate(
            problem=problem,
            calls=[
                product(_random(rows, columns, device), torch.rand(rows, device=device))
                for _ in range(copies(rows * columns))
            ],
        )
    words = {"w8a16": 32, "fp8a16": 32, "w4a16": 16, "nf4": 16}[problem.op]
    kind = {"w8a16": "int8", "fp8a16": "fp8", "w4a16": "int4", "nf4": "nf4"}[problem.op]
    groups = 1 if problem.group == 0 else columns // problem.group
    scale_dtype = torch.float32 if problem.group >= 64 else torch.bfloat16

    def fused(weight: Weight) -> Call:
        def call(tile: Tile | None) -> object:
            if tile is not None:
                return fused_triton.matmul(x, weight, None, problem.rows, tile)
            return torch.nn.functional.linear(x, fused_triton.dequantize(weight, shape, dtype))

        return call

    calls = []
    for _ in range(copies(rows * columns * words // 32)):
        packed = _random(columns // 128 * rows, words * 4, device).view(torch.int32)
        weight = Weight(
            kind=kind,
            packed=packed.view(columns // 128, rows, words),
            scale=torch.rand(groups, rows, device=device).to(scale_dtype),
            zero=None,
            group=problem.group,
        )
        calls.append(fused(weight))
    return Candidate(problem=problem, calls=calls)


def _random(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device=device)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _bind(call: Call, tile: Tile | None) -> Callable[[], object]:
    return lambda: call(tile)


def _too_large() -> type[Exception]:
    from triton.runtime.errors import OutOfResources

    found: type[Exception] = OutOfResources
    return found
