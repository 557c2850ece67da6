"""Prints the house: rooms, floors and what breaks its rules; exits with 1 if something does.

    python -m tools.house

A room is an entry of `quantkit/`, folder or file.  Its floor is one above the highest room that it
imports from; a room that imports nothing of ours is on floor 1.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Packages and the folder of each.
PACKAGES = {
    "quantkit": ROOT / "quantkit",
    "quantkit_kernels": ROOT / "kernels" / "quantkit_kernels",
    "quantkit_eval": ROOT / "eval" / "quantkit_eval",
}
# From the ground up: a room imports only rooms that stand before it, and itself.
ROOMS = (
    *("errors", "demo", "numbers", "checkpoint", "methods", "formats"),
    *("model", "calibration", "inference", "checks", "pipeline", "cli"),
)
# Parts of one kind never import parts of another.
PARTS = (
    *("methods.targets", "methods.ranges", "methods.rounding", "methods.refine"),
    *("methods.heal", "methods.transforms"),
)
# The faces of the whole: they hand on what lies in the rooms.
FACES = ("quantkit", "quantkit.__main__", "quantkit.extend")
MAX_LINES, MAX_FILES, MAX_ENTRIES, MAX_FLOORS = 500, 20, 16, 9


def modules() -> dict[str, Path]:
    """Name of every module of ours, and its file."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Names that a file imports anywhere, type checking blocks included, module or member."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name


@cache
def graph() -> Mapping[str, frozenset[str]]:
    """Module -> modules of ours that it imports."""
    known = modules()
    edges: dict[str, frozenset[str]] = {}
    for name, path in known.items():
        found = set()
        for target in imports(path):
            if target not in known:
                target = target.rpartition(".")[0]
            if target in known and target != name:
                found.add(target)
        edges[name] = frozenset(found)
    return edges


def room_of(module: str) -> str:
    """The room of a module of `quantkit`; the package itself is a room of its own."""
    return module.split(".")[1] if "." in module else module


def cycle() -> list[str]:
    """Modules that import one another in a ring, the first again at the end; empty if none do."""
    edges, done = graph(), set[str]()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for target in sorted(edges[name]):
            if found := visit(target, [*way, name]):
                return found
        done.add(name)
        return []

    for name in sorted(edges):
        if found := visit(name, []):
            return found
    return []


def floors() -> dict[str, int]:
    """Floor of every room: one above the highest that it imports from."""
    below: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name, targets in graph().items():
        if _counts(name):
            others = {room_of(target) for target in targets if _counts(target)}
            below[room_of(name)] |= others - {room_of(name)}
    found: dict[str, int] = {}
    # In the order of the rooms: what a room imports has its floor already.
    for room in ROOMS:
        found[room] = 1 + max((found.get(other, 0) for other in below[room]), default=0)
    return found


def faults() -> list[str]:
    """What breaks the rules of the house, a sentence each."""
    found = []
    if ring := cycle():
        return ["a cycle: " + " -> ".join(ring)]
    rank = {room: number for number, room in enumerate(ROOMS)}
    for name, targets in graph().items():
        inside = name.startswith("quantkit.") and name not in FACES
        if inside and room_of(name) not in rank:
            found.append(f"{name}: {room_of(name)} is no room; ROOMS in tools/house.py names them")
            continue
        for target in sorted(targets):
            if target in FACES and inside:
                found.append(f"{name} imports {target}, which is a face for users")
            elif inside and _counts(target) and rank[room_of(target)] > rank[room_of(name)]:
                found.append(f"{name} imports {target}: {room_of(target)} is a higher room")
            elif name.startswith("quantkit_kernels") and not target.startswith("quantkit_kernels"):
                found.append(f"{name} imports {target}: kernels are a leaf")
        for part in PARTS:
            own = name.startswith(f"quantkit.{part}.")
            others = [t for t in targets if any(t.startswith(f"quantkit.{p}.") for p in PARTS)]
            if own:
                found += [
                    f"{name} imports {t}: parts of one kind never import another"
                    for t in others
                    if not t.startswith(f"quantkit.{part}.")
                ]
    if not found and (top := max(floors().values())) > MAX_FLOORS:
        found.append(f"quantkit has {top} floors, {MAX_FLOORS} are allowed")
    return [*found, *_crowded()]


def _counts(name: str) -> bool:
    return name.startswith("quantkit.") and name not in FACES


def _crowded() -> Iterator[str]:
    for name, path in modules().items():
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES:
            yield f"{name}: {lines} lines, {MAX_LINES} are allowed"
    for folder in sorted({path.parent for path in modules().values()}):
        if (files := len(list(folder.glob("*.py")))) > MAX_FILES:
            yield f"{folder.relative_to(ROOT)}: {files} files, {MAX_FILES} are allowed"
    if (entries := len(_entries(PACKAGES["quantkit"]))) > MAX_ENTRIES:
        yield f"quantkit/: {entries} entries, {MAX_ENTRIES} are allowed"


def _entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


def main() -> int:
    """Prints rooms with their files, lines and floors, then the faults."""
    if ring := cycle():
        print("a cycle:", " -> ".join(ring))
        return 1
    known, floor = modules(), floors()
    print(f"{'room':<14}{'floor':>6}{'files':>7}{'lines':>8}")
    for room in ROOMS:
        names = [name for name in known if _counts(name) and room_of(name) == room]
        lines = sum(len(known[name].read_text(encoding="utf-8").splitlines()) for name in names)
        print(f"{room:<14}{floor[room]:>6}{len(names):>7}{lines:>8}")
    entries = len(_entries(PACKAGES["quantkit"]))
    print(f"{max(floor.values())} floors, {entries} entries in quantkit/, no cycle")
    found = faults()
    for fault in found:
        print("fault:", fault)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
