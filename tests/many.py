"""Several processes that share a run, forked from this one, which has imported everything."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from quantkit.calibration.processes.ranks import World, joined
from quantkit.errors import QuantkitError

# Longer than any of them takes.
_PATIENCE = 120


def run_ranks(size: int, work: Callable[[World], object], folder: Path) -> list[tuple[int, str]]:
    """Each rank's exit code, negative for a signal, and the last line that it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    children = [_fork(rank, size, port, work, folder / f"rank-{rank}") for rank in range(size)]
    codes = [_wait(child) for child in children]
    told = [folder / f"rank-{rank}" for rank in range(size)]
    return [
        (code, (path.read_text().strip().splitlines() or [""])[-1])
        for code, path in zip(codes, told, strict=True)
    ]


def _fork(rank: int, size: int, port: int, work: Callable[[World], object], told: Path) -> int:
    told.write_text("")
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stderr = told.open("a")
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        with joined() as world:
            work(world)
        code = 0
    except QuantkitError as error:
        print(f"quantkit: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int) -> int:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("a rank did not end")
