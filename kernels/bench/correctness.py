"""Every op on a GPU against float64: errors, the same bits twice, and no number left out."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import shapes
import torch
from torch import Tensor

# The largest error as a share of the largest output: two roundings to bfloat16 (weights or
# codebook, result).
TOLERANCE = 2**-7
# The norm of all errors as a share of the output's: a bfloat16 is up to 2^-9 off, and results are
# few where there is one row; the two roundings of most schemes together are 2^-8.
NORM_TOLERANCE = 3 * 2**-9
# How x lies in memory: dense; two bytes behind a multiple of sixteen; rows that are wider apart.
LAYOUTS = ("dense", "offset", "strided")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A product to check."""

    scheme: str
    shape: tuple[int, int]
    dtype: torch.dtype
    tokens: int
    layout: str


def cases(
    schemes: Sequence[str], sizes: Sequence[tuple[int, int]], counts: Sequence[int]
) -> list[Case]:
    """All products, dense x before the others, whose count of rows is the second."""
    found = []
    for layout in LAYOUTS:
        for scheme in schemes:
            for shape in sizes:
                if "g128" in scheme and shape[1] % 128:
                    continue
                for dtype in (torch.bfloat16, torch.float16):
                    for tokens in counts if layout == "dense" else counts[1:2]:
                        found.append(
                            Case(
                                scheme=scheme,
                                shape=shape,
                                dtype=dtype,
                                tokens=tokens,
                                layout=layout,
                            )
                        )
    return found


def checked(work: Sequence[Case], device: torch.device) -> Iterator[dict[str, Any]]:
    """One row per product, with what is wrong with it; weights live while their products follow."""
    last: tuple[str, tuple[int, int]] | None = None
    for case in work:
        if (case.scheme, case.shape) != last:
            last = (case.scheme, case.shape)
            sample = make(case, device)
        yield check(case, sample, device)


def make(case: Case, device: torch.device) -> shapes.Sample:
    """The weight of a product; the same numbers each time."""
    if case.scheme == "w4a16_experts":
        return shapes.experts(case.shape, device, seed=case.shape[0])
    return shapes.make(case.scheme, case.shape, device, seed=case.shape[0])


def check(case: Case, sample: shapes.Sample, device: torch.device) -> dict[str, Any]:
    """The row of one product."""
    x = activations(case, device)
    wanted = sample.exact(x)
    with poisoned():
        found, again = sample.multiply(x), sample.multiply(x)
    difference = found.double() - wanted
    row = {
        "scheme": case.scheme,
        "shape": list(case.shape),
        "dtype": str(case.dtype),
        "tokens": case.tokens,
        "layout": case.layout,
        "error": float(difference.abs().max() / wanted.abs().max()),
        "norm": float(difference.norm() / wanted.norm()),
        "same_bits_twice": bool(torch.equal(_bits(found), _bits(again))),
    }
    return {**row, "wrong": judged(row)}


def judged(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row; NaN is never within a limit."""
    wrong = []
    if not row["error"] <= TOLERANCE:
        wrong.append(f"largest error {row['error']:.2e} of the largest output")
    if not row["norm"] <= NORM_TOLERANCE:
        wrong.append(f"norm of the error {row['norm']:.2e} of the output's")
    if not row["same_bits_twice"]:
        wrong.append("other bits the second time")
    return wrong


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many products of each scheme and dtype were checked, and the worst of their errors."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        named = {"scheme": row["scheme"], "dtype": row["dtype"]}
        one = found.setdefault((row["scheme"], row["dtype"]), {**named, "products": 0})
        one["products"] += 1
        for kind in ("error", "norm"):
            one[kind] = max(one.get(kind, 0.0), row[kind])
    return list(found.values())


def activations(case: Case, device: torch.device) -> Tensor:
    """x [tokens, K] as the case wants it in memory."""
    columns = case.shape[1]
    draw = torch.Generator(device=device).manual_seed(case.tokens)
    size = case.tokens * (columns + 8) + 1
    numbers = torch.randn(size, generator=draw, device=device).to(case.dtype)
    if case.layout == "strided":
        return numbers[:-1].view(case.tokens, columns + 8)[:, :columns]
    first = 1 if case.layout == "offset" else 0
    return numbers[first : first + case.tokens * columns].view(case.tokens, columns)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills the memory that launchers allocate with NaN: what a kernel leaves out shows."""
    plain = torch.empty

    def filled(*size: Any, **options: Any) -> Tensor:
        made: Tensor = plain(*size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    with mock.patch("torch.empty", filled):
        yield


def build_all(work: Sequence[Case], device: torch.device, jobs: int) -> None:
    """Compiles the kernels of all products in so many processes, into Triton's cache on the disk.

    What fails there fails again, and is reported, where it is checked.
    """
    method = multiprocessing.get_context("spawn")
    with method.Pool(jobs) as pool:
        # Alternating, so that the shapes of a scheme are spread over the processes.
        parts = [(work[first::jobs], str(device)) for first in range(jobs)]
        for failed in pool.starmap(_build, parts):
            for line in failed:
                print(line, flush=True)


def _build(work: Sequence[Case], device: str) -> list[str]:
    failed = []
    for case in work:
        place = torch.device(device)
        try:
            make(case, place).multiply(activations(case, place))
        except Exception as error:  # said, and met again by the check
            failed.append(f"{case}: {error}")
    return failed


def jobs_here() -> int:
    """Processes that build at once."""
    return max(1, min(16, os.cpu_count() or 1))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)
