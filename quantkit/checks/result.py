"""What a check of a finished checkpoint says, and checks of single tensors that all formats share.

Letters: O out features, I in features, G groups per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.source import Source
from quantkit.errors import NumericsError
from quantkit.numbers.grid import IntegerGrid, grid_of
from quantkit.numbers.tensor import QuantizedTensor

_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question asked: `detail` says what was looked at, `problems` what is wrong."""

    name: str
    detail: str
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """Every check of a checkpoint, in the order they were made."""

    path: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True if all checks passed."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "checks": [
                {
                    "name": check.name,
                    "ok": check.ok,
                    "detail": check.detail,
                    "problems": list(check.problems),
                }
                for check in self.checks
            ],
        }

    def text(self) -> str:
        """For people: one line per check, then its problems."""
        lines = []
        for check in self.checks:
            lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<10}  {check.detail}")
            lines += [f"        {problem}" for problem in check.problems[:_SHOWN]]
            if len(check.problems) > _SHOWN:
                lines.append(f"        and {len(check.problems) - _SHOWN} more")
        lines.append(f"{self.path}: {'all checks passed' if self.ok else 'verification FAILED'}")
        return "\n".join(lines)


def value_problems(name: str, tensor: QuantizedTensor) -> Iterator[str]:
    """Scales that are not finite, codes or zeros outside the scheme's range."""
    try:
        tensor.check(name)
    except NumericsError as error:
        yield str(error)
    grid = grid_of(tensor.scheme)
    if not isinstance(grid, IntegerGrid) or not tensor.codes.numel():
        return
    if int(tensor.codes.min()) < grid.low:
        yield f"{name}: a code below {grid.low}, the lowest that {tensor.scheme.name} has"
    if tensor.zero is not None and int(tensor.zero.max()) > grid.high:
        yield f"{name}: a zero above {grid.high}"
    if not bool(tensor.scale.values().all()):
        yield f"{name}: a scale is zero"


def finite_problems(name: str, source: Source) -> Iterator[str]:
    info = source.info(name)
    if not info.dtype.is_floating_point or info.dtype.itemsize == 1:
        return
    step = 4 * 2**20
    for start in range(0, info.numel, step):
        piece = source.read_flat(name, start, min(start + step, info.numel))
        if info.numel == 1 and bool(piece.isinf()):
            # A limit that is none, such as the ranges of gemma4's audio tower.
            return
        if not all(bool(edge.isfinite()) for edge in torch.aminmax(piece)):
            yield f"{name}: holds NaN or infinity"
            return


def scale_problems(name: str, source: Source) -> Iterator[str]:
    """What is wrong with the scales of a cache, which divide."""
    if not bool((source.read(name) > 0).all()):
        yield f"{name}: a scale is not above zero"
