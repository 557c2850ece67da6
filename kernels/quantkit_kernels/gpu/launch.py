"""Launches of kernels that cost the CPU little: what was compiled is found by a short key.

Triton looks at every argument in every launch, which takes longer than the kernels of one token
run.  A `Launcher` knows a launch by what Triton specialises on: dtypes, whether pointers are
multiples of 16, sizes, constants.  It does what `kernel[grid](...)` does.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor

_DTYPE = operator.attrgetter("dtype")
Constant = int | bool | str
# Launches remembered by a kernel; a served model's are some dozens for each number of rows.
_MOST = 4096


class Launcher:
    """Runs a kernel whose parameters are pointers, free numbers, sizes and constants, in order."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._known: dict[Any, Callable[..., None]] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        pointers: tuple[Tensor, ...],
        free: tuple[int, ...],
        sizes: tuple[int, ...],
        constants: tuple[Constant, ...],
        warps: int,
        stages: int = 3,
        distinct: tuple[Tensor, ...] | None = None,
    ) -> None:
        """One launch on the current device, where all pointers are.

        distinct  the pointers without those that the constants say are not read
        free    whole numbers that the kernel names in do_not_specialize: they may change each time
        sizes   whole numbers of which it matters whether they are 1 or multiples of 16
        """
        places = 0
        looked_at = distinct or pointers
        for pointer in looked_at:
            places |= pointer.data_ptr()
        dtypes = tuple(map(_DTYPE, looked_at))
        device = pointers[0].device.index
        key = (grid, sizes, constants, warps, stages, places & 15, device, dtypes)
        run = self._known.get(key)
        if run is None:
            run = self._prepared(grid, pointers, free, sizes, constants, warps, stages)
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[key] = run
        run(*pointers, *free, *sizes, *constants)

    def _prepared(
        self,
        grid: tuple[int, int, int],
        pointers: tuple[Tensor, ...],
        free: tuple[int, ...],
        sizes: tuple[int, ...],
        constants: tuple[Constant, ...],
        warps: int,
        stages: int,
    ) -> Callable[..., None]:
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        # In the interpreter nothing is compiled.
        if not isinstance(self.kernel, triton.runtime.JITFunction):
            return functools.partial(self.kernel[grid], **options)
        arguments = (*pointers, *free, *sizes, *constants)
        run: Callable[..., None] = self.kernel.warmup(*arguments, grid=grid, **options)[grid]
        return run
