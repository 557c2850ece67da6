"""How the calibration's sequences are cut into batches, which budgets never change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from quantkit.calibration.data.tokens import Calibration

# Tokens in one forward batch: a function of the device kind only, never of the memory budget, so
# that the order of accumulation, and with it every bit of the result, stays the same.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences start..stop of the calibration; mask None if all their tokens count.

    `length` are the tokens of a sequence that comes alone with its images, None for others: it
    runs unpadded.
    """

    start: int
    stop: int
    mask: Tensor | None
    length: int | None = None


def batches_of(calibration: Calibration, device: str) -> Iterator[Batch]:
    """All sequences in their order, as many at a time as the kind of device takes.

    Those with images come one by one, each at its own length: they share no shape.
    """
    if calibration.pictured is not None:
        for start, length in enumerate(calibration.pictured.lengths):
            yield Batch(start=start, stop=start + 1, mask=None, length=length)
        return
    size = _sequences_at_once(calibration, device)
    for start in range(0, len(calibration.ids), size):
        mask = calibration.mask[start : start + size]
        yield Batch(start=start, stop=start + len(mask), mask=None if bool(mask.all()) else mask)


def lengths_of(calibration: Calibration) -> tuple[int, ...]:
    """Tokens of every sequence as it runs."""
    if calibration.pictured is not None:
        return calibration.pictured.lengths
    samples, length = calibration.ids.shape
    return (length,) * samples


def num_batches(calibration: Calibration, device: str) -> int:
    """How many those are."""
    if calibration.pictured is not None:
        return len(calibration.pictured.lengths)
    return -(-len(calibration.ids) // _sequences_at_once(calibration, device))


def _sequences_at_once(calibration: Calibration, device: str) -> int:
    return max(1, BATCH_TOKENS[device.split(":")[0]] // calibration.ids.shape[1])
