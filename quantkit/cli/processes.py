"""This process among those that a launcher started, once all are asked for the same."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.calibration.processes.watch import several_processes
from quantkit.pipeline.options import QuantizeOptions

if TYPE_CHECKING:
    from quantkit.calibration.processes.ranks import World


def joined_world(
    stack: contextlib.ExitStack,
    model: str,
    options: QuantizeOptions,
    out: Path,
    more: Mapping[str, object] | None = None,
) -> World | None:
    """Those that share the work until `stack` unwinds; None for a process by itself.

    more: further options of the command.  Raises RanksError, naming what differs.
    """
    if not several_processes():
        return None
    from quantkit.calibration.processes.ranks import joined, same_everywhere

    world = stack.enter_context(joined())
    fields = dataclasses.fields(QuantizeOptions)
    asked = {f.metadata["flag"] or f.name: str(getattr(options, f.name)) for f in fields}
    versions = {f"{name} version": version(name) for name in ("quantkit", "torch", "transformers")}
    others = {name: str(value) for name, value in (more or {}).items()}
    told = {"MODEL": model, **asked, **others, "--out": os.path.abspath(out), **versions}
    same_everywhere(world, told)
    return world
