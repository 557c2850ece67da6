"""Tries quantkit on every model type of transformers, each made tiny, and writes what works.

    python -m tools.sweep_models --work DIR [--kinds causal image ...] [--types llama ...]
One process for each type, two at a time, with limits of time and memory.  A finding lies in DIR
as soon as there is one, and a type that has one is not tried again unless --fresh.  When all types
have one, eval/results/models.json and docs/models.md are written anew (`make sweep`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Before torch is imported: processes are forked from this one, and each has one thread.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from tools.sweep.one import examine, types
from tools.sweep.page import page

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("causal", "image", "encoder", "embedding", "reranker")

_ERRORS = 2000


def main() -> None:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = [
        (kind, name)
        for kind in options.kinds
        for name in types(kind)
        if not options.types or name in options.types
    ]
    if options.fresh:
        for kind, name in wanted:
            _file(options.work, kind, name).unlink(missing_ok=True)
    for kind, name in _tried(wanted, options):
        found = json.loads(_file(options.work, kind, name).read_bytes())
        worst = next((r for r in found.get("runs", ()) if r["status"] == found["status"]), found)
        print(f"{kind}:{name}: {found['status']} {worst.get('message', '')[:200]}", flush=True)
    found_all = findings(options.work)
    print(dict(Counter(found["status"] for found in found_all)))
    everything = {(kind, name) for kind in KINDS for name in types(kind)}
    if everything <= {(found["kind"], found["model_type"]) for found in found_all}:
        _publish(found_all)


def findings(work: Path) -> list[dict[str, Any]]:
    """What lies in the scratch directory, sorted by kind and type."""
    found = [json.loads(file.read_bytes()) for file in work.glob("*.json")]
    return sorted(found, key=lambda one: (KINDS.index(one["kind"]), one["model_type"]))


def _publish(found_all: list[dict[str, Any]]) -> None:
    names = ("quantkit", "torch", "transformers")
    result = {
        "command": "python -m tools.sweep_models --work DIR",
        "versions": {name: version(name) for name in names},
        "findings": found_all,
    }
    _write(ROOT / "eval/results/models.json", result)
    (ROOT / "docs/models.md").write_text(page(result), encoding="utf-8")


def _tried(wanted: list[tuple[str, str]], options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Each type when its finding lies there, in the order in which they end."""
    waiting = [pair for pair in wanted if not _file(options.work, *pair).exists()]
    running: dict[BaseProcess, tuple[str, str, float]] = {}
    context = multiprocessing.get_context("fork")
    while waiting or running:
        while waiting and len(running) < options.jobs:
            kind, name = waiting.pop(0)
            process = context.Process(target=_examine, args=(kind, name, options))
            process.start()
            running[process] = (kind, name, time.monotonic() + options.seconds)
        earliest = min(deadline for *_, deadline in running.values())
        wait([p.sentinel for p in running], timeout=max(earliest - time.monotonic(), 0))
        for process, (kind, name, deadline) in list(running.items()):
            late = time.monotonic() >= deadline
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            del running[process]
            file = _file(options.work, kind, name)
            if not file.exists():
                told = file.with_suffix(".stderr")
                reason = f"more than {options.seconds} seconds" if late else "the process died"
                last = told.read_text(errors="replace")[-_ERRORS:] if told.exists() else ""
                message = f"{reason}: {' '.join(last.split())[-300:]}"
                content = {"kind": kind, "model_type": name, "status": "crashed"}
                _write(file, {**content, "message": message, "parameters": 0, "runs": []})
            yield kind, name


def _examine(kind: Any, name: str, options: argparse.Namespace) -> None:
    """In the process of one type."""
    file = _file(options.work, kind, name)
    with file.with_suffix(".stderr").open("w") as told:
        os.dup2(told.fileno(), 2)
    limit = int(options.max_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _write(file, examine(kind, name, options.work / "scratch" / f"{kind}-{name}").to_dict())


def _file(work: Path, kind: str, name: str) -> Path:
    return work / f"{kind}-{name}.json"


def _write(file: Path, content: object) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.rename(file)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="scratch and findings")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--types", nargs="+", default=[])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=240, help="for one type")
    parser.add_argument("--max-gib", type=float, default=12, help="address space of one type")
    parser.add_argument("--fresh", action="store_true", help="try again what has a finding")
    return parser.parse_args()


if __name__ == "__main__":
    main()
