"""Compiled objects that a wheel brings for machines without a compiler, one for each level.

They are linked to the C interface of torch alone (that of 2.10), so one file serves every torch
since then.  `tools/wheel.py` makes them; a checkout, and a plain install from source, has none.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("built")
# What the C interface is that of: TORCH_TARGET_VERSION of torch's headers.
FIRST_TORCH = (2, 10)


@dataclass(frozen=True, kw_only=True)
class Level:
    """A set of instructions: the compiler's flags, and the features of /proc/cpuinfo it needs."""

    flags: tuple[str, ...]
    features: str


_V3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe"
# The best first.
LEVELS = {
    "avx512_vnni": Level(
        flags=("-march=x86-64-v4", "-mavx512vnni", "-mtune=icelake-server"),
        features=f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni",
    ),
    "avx_vnni": Level(
        flags=("-march=x86-64-v3", "-mavxvnni", "-mtune=haswell"), features=f"{_V3} avx_vnni"
    ),
    "avx2": Level(flags=("-march=x86-64-v3", "-mtune=haswell"), features=_V3),
}


def best_level(processor_flags: str) -> str | None:
    """The best of LEVELS for a processor with these features, or None."""
    found = set(processor_flags.split())
    fitting = (name for name, level in LEVELS.items() if found.issuperset(level.features.split()))
    return next(fitting, None)


def digest_of(source: Path) -> str:
    """What a source is recognised by: SHA-256 in hex of NAME.cpp and of what it includes."""
    # What it includes has its name in front.
    parts = (path.read_bytes() for path in sorted(source.parent.glob(f"{source.stem}*")))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def manifest(source: Path, objects: dict[str, Path]) -> str:
    """The text of NAME.json: digests of the source and of the object of each level."""
    found = {level: _digest(path) for level, path in objects.items()}
    return json.dumps({"source": digest_of(source), "objects": found}, indent=1) + "\n"


def find(source: Path, processor_flags: str) -> tuple[Path | None, str | None]:
    """The object of a source for this processor and None, or None and why none is used.

    Both are None where no objects were installed.  An object counts only if its bytes, and its
    source's, are those that the manifest tells: what was cut short, or left by another version, is
    not run.
    """
    listed = FOLDER / f"{source.stem}.json"
    if not listed.exists():
        return None, None
    level = best_level(processor_flags)
    if level is None:
        return None, "none of the objects that came with the package is for this processor"
    path = FOLDER / f"{source.stem}-{level}.so"
    try:
        told = json.loads(listed.read_text(encoding="utf-8"))
        if told["source"] != digest_of(source):
            return None, f"{path.name} was made from another {source.name}"
        if told["objects"][level] != _digest(path):
            return None, f"{path.name} is not the file that {listed.name} tells of"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{path.name}: {type(error).__name__}: {error}"
    return path, None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
