"""How fast each op is: beside a bfloat16 product timed next to it, and beside other libraries."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import peers
import shapes
import torch
from quantkit_kernels.gpu import measure
from torch import Tensor

# Microseconds of one call in each of some repetitions, of calls on weights of their own.
Clock = Callable[[Sequence[Callable[[], object]]], list[float]]


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """What this machine does at most per second."""

    nbytes: float
    operations: float


def roofline(device: torch.device, clock: Clock) -> Roofline:
    """A copy, and a bfloat16 product."""
    size = 1 << (20 if device.type == "cpu" else 30)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    copied = statistics.median(clock([lambda: target.copy_(source)]))
    side = 128 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = statistics.median(clock([lambda: a @ b]))
    return Roofline(nbytes=2 * size / copied * 1e6, operations=2 * side**3 / product * 1e6)


def rows(
    schemes: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    counts: Sequence[Sequence[int]],
    device: torch.device,
    clock: Clock,
    roof: Roofline,
) -> Iterator[dict[str, Any]]:
    """One row per shape, implementation and row count, the more important counts of all first.

    A weight is made once for its row counts; the bfloat16 product is timed anew beside each of
    them.  At the end the first row is timed again: how far the machine has drifted.
    """
    bench = _Bench(device=device, clock=clock, roof=roof)
    for tokens in counts:
        for shape in sizes:
            plain = _linears(shape, device)
            for scheme in schemes:
                yield from _one_scheme(bench, scheme, shape, tokens, plain)
            yield from _peers(bench, shape, tokens, plain)
            del plain
    shape, tokens = sizes[0], counts[0][:1]
    for scheme in schemes:
        for row in _one_scheme(bench, scheme, shape, tokens, _linears(shape, device)):
            yield {**row, "again": True}
            return


def _one_scheme(
    bench: _Bench,
    scheme: str,
    shape: tuple[int, int],
    tokens: Sequence[int],
    plain: Sequence[Callable[[Tensor], Tensor]],
) -> Iterator[dict[str, Any]]:
    if shape[1] % 128 and not scheme.startswith(("nf4", "w8a8", "fp8a8", "w4a16_row")):
        return
    first = shapes.make(scheme, shape, bench.device, seed=0)
    others = range(1, _copies(first.nbytes, bench.device))
    samples = [first, *(shapes.make(scheme, shape, bench.device, seed=seed) for seed in others)]
    calls = [sample.multiply for sample in samples]
    for count in tokens:
        yield bench.row(scheme, shape, count, calls, first.nbytes, plain)


def _peers(
    bench: _Bench,
    shape: tuple[int, int],
    tokens: Sequence[int],
    plain: Sequence[Callable[[Tensor], Tensor]],
) -> Iterator[dict[str, Any]]:
    for name, peer in peers.available().items():
        nbytes = int(peer.bytes_per_weight * shape[0] * shape[1])
        try:
            copies = _copies(nbytes, bench.device)
            calls = [peer.make(*shape, bench.device) for _ in range(copies)]
            for count in tokens:
                if count >= peer.least_rows:
                    yield bench.row(name, shape, count, calls, nbytes, plain)
        except Exception as error:  # a peer's own failure is a result, not ours to hide
            row = {"name": name, "rows": shape[0], "columns": shape[1], "failed": str(error)[:500]}
            print(row, flush=True)
            yield row


@dataclass(frozen=True, kw_only=True)
class _Bench:
    device: torch.device
    clock: Clock
    roof: Roofline

    def row(
        self,
        name: str,
        shape: tuple[int, int],
        tokens: int,
        calls: Sequence[Callable[[Tensor], Tensor]],
        nbytes: int,
        plain: Sequence[Callable[[Tensor], Tensor]],
    ) -> dict[str, Any]:
        """Times both; `spread` is that of the middle eight tenths of the repetitions."""
        rows, columns = shape
        x = torch.randn(tokens, columns, device=self.device).bfloat16()
        bf16 = statistics.median(self.clock([_bound(call, x) for call in plain]))
        times = self.clock([_bound(call, x) for call in calls])
        microseconds = statistics.median(times)
        moved = nbytes + 2 * tokens * (rows + columns)
        operations = 2 * tokens * rows * columns
        floor = max(moved / self.roof.nbytes, operations / self.roof.operations)
        row = {
            "name": name,
            "rows": rows,
            "columns": columns,
            "tokens": tokens,
            "microseconds": round(microseconds, 2),
            "spread": round(spread(times), 3),
            "bf16_microseconds": round(bf16, 2),
            "gigabytes_per_second": round(moved / microseconds / 1e3, 1),
            "teraflops": round(operations / microseconds / 1e6, 2),
            "roofline_share": round(floor * 1e6 / microseconds, 3),
            "times_bf16": round(bf16 / microseconds, 3),
        }
        print(row, flush=True)
        return row


def spread(times: Sequence[float]) -> float:
    """From the tenth to the ninetieth hundredth, as a share of the median."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return (ordered[round(0.9 * last)] - ordered[round(0.1 * last)]) / statistics.median(ordered)


def wall_microseconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """The clock of a machine without a GPU: every call once."""
    start = time.perf_counter()
    for call in calls:
        call()
    return [(time.perf_counter() - start) * 1e6 / len(calls)]


def _linears(shape: tuple[int, int], device: torch.device) -> list[Callable[[Tensor], Tensor]]:
    copies = _copies(2 * shape[0] * shape[1], device)
    weights = [torch.randn(shape, device=device).bfloat16() for _ in range(copies)]
    return [functools.partial(torch.nn.functional.linear, weight=weight) for weight in weights]


def _copies(nbytes: int, device: torch.device) -> int:
    return 1 if device.type == "cpu" else measure.copies(nbytes)


def _bound(call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    return lambda: call(x)
