"""Where a run's time goes: seconds of each phase of a step, without those of phases inside it.

A phase is entered wherever its work is done, by `with phase("forward")`; a `Timeline` that is
current adds up what it is told.  Clocks are the wall's and the process's own, whose ratio shows
whether the process waited.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

Phase = Literal[
    "reading", "forward", "statistics", "transform", "target", "range", "rounding",
    "refine", "heal", "error", "writing", "fsync",
]  # fmt: skip

_CURRENT: ContextVar[Timeline | None] = ContextVar("quantkit_timeline", default=None)


@dataclass(kw_only=True)
class Seconds:
    """Wall seconds and processor seconds, of all threads together."""

    wall: float = 0.0
    cpu: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Event:
    name: str
    began: float
    wall: float
    cpu: float


class Timeline:
    """What a run's steps spent on each phase; with `events`, every single entry too."""

    def __init__(self, *, events: bool = False) -> None:
        self.steps: dict[str, dict[str, Seconds]] = {}
        self._events: list[_Event] | None = [] if events else None
        self._began = time.perf_counter()
        self._step: dict[str, Seconds] = {}
        # What inner phases took, for each phase that is open.
        self._inner: list[Seconds] = []

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Counts the phases entered meanwhile for this step, and the rest of it as "other"."""
        self._step = self.steps.setdefault(name, {})
        token = _CURRENT.set(self)
        try:
            with self._span("other", shown=name):
                yield
        finally:
            _CURRENT.reset(token)

    def total(self, step: str) -> Seconds:
        """All of a step."""
        parts = self.steps[step].values()
        return Seconds(wall=sum(p.wall for p in parts), cpu=sum(p.cpu for p in parts))

    def mean(self, steps: str, phase: Phase) -> float:
        """Wall seconds of a phase in the steps whose names begin so; 0 where it never was."""
        parts = [phases for name, phases in self.steps.items() if name.startswith(steps)]
        found = [phases[phase] for phases in parts if phase in phases]
        return sum(part.wall for part in found) / max(len(found), 1)

    def to_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """Step -> phase -> wall and cpu seconds."""
        return {
            step: {
                name: {"wall": round(seconds.wall, 3), "cpu": round(seconds.cpu, 3)}
                for name, seconds in phases.items()
            }
            for step, phases in self.steps.items()
        }

    def trace(self) -> str:
        """The events as JSON that Perfetto (https://ui.perfetto.dev) and chrome://tracing open."""
        return json.dumps(
            {
                "displayTimeUnit": "ms",
                "traceEvents": [
                    {
                        "name": event.name,
                        "ph": "X",
                        "ts": round((event.began - self._began) * 1e6, 1),
                        "dur": round(event.wall * 1e6, 1),
                        "pid": 1,
                        "tid": 1,
                        "args": {"cpu_seconds": round(event.cpu, 6)},
                    }
                    for event in self._events or ()
                ],
            }
        )

    @contextlib.contextmanager
    def _span(self, name: str, *, shown: str | None = None) -> Iterator[None]:
        inner = Seconds()
        self._inner.append(inner)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            _wait_for_gpu()
            took = Seconds(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
            self._inner.pop()
            if self._inner:
                self._inner[-1].wall += took.wall
                self._inner[-1].cpu += took.cpu
            found = self._step.setdefault(name, Seconds())
            found.wall += took.wall - inner.wall
            found.cpu += took.cpu - inner.cpu
            if self._events is not None:
                event = _Event(name=shown or name, began=wall, wall=took.wall, cpu=took.cpu)
                self._events.append(event)


def _wait_for_gpu() -> None:
    """Returns when what was handed to a GPU is done, so that it counts where it was asked for."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def phase(name: Phase) -> contextlib.AbstractContextManager[None]:
    """The time inside counts as this phase of the current step; nothing happens without one."""
    timeline = _CURRENT.get()
    return contextlib.nullcontext() if timeline is None else timeline._span(name)
