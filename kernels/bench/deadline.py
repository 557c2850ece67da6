"""Work that ends in time: rows of results, written as they come, until too little time is left."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Report:
    """A JSON file that is whole at any time, and the time there is to fill it."""

    def __init__(self, path: Path, seconds: float | None, **fields: Any) -> None:
        """`seconds` from now on; None: as long as it takes."""
        self.path = path
        self.started = time.monotonic()
        self.seconds = seconds
        self.fields: dict[str, Any] = {**fields, "stopped": []}
        self.write()

    def left(self) -> float:
        """Seconds until the deadline."""
        if self.seconds is None:
            return float("inf")
        return self.seconds - (time.monotonic() - self.started)

    def fill(self, name: str, rows: Iterable[dict[str, Any]]) -> bool:
        """Takes rows as long as another one, of the longest's duration, fits; whether all came."""
        kept: list[dict[str, Any]] = []
        self.fields[name] = kept
        longest = 0.0
        source = iter(rows)
        while self.left() > longest:
            start = time.monotonic()
            row = next(source, None)
            if row is None:
                self.write()
                return True
            kept.append(row)
            longest = max(longest, time.monotonic() - start)
            self.write()
        self.fields["stopped"].append(
            f"{name}: after {len(kept)} rows, {self.left():.0f} of {self.seconds:.0f} s left"
        )
        self.write()
        print(self.fields["stopped"][-1], flush=True)
        return False

    def write(self) -> None:
        """Readers see the old file or the new one, never half of it."""
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps(self.fields, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)
