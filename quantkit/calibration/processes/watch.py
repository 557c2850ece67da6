"""Notices within a minute that another process of a run is gone, and ends this one too.

Every rank counts up a number in the store by which they found each other.  A number that stands
still belongs to a process that is dead or stopped, and what the others wait for will never come.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantkit.errors import LostError, QuantkitError, RanksError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# What launchers set: this process's number, how many there are, its number on this machine.
SEVERAL = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# And some of them: how many there are on this machine.
HERE = "LOCAL_WORLD_SIZE"
# Seconds between two beats, without any after which a process is lost, and until rank 0 has told of
# an error elsewhere.
_BEAT, _LOST, _TOLD = 1.0, 40.0, 10.0
_GO_ON = "what is done is kept, and the same command goes on there, with any number of processes"
# sysexits.h: EX_SOFTWARE.
_CRASH = 70
# As of a shell, after Ctrl-C.
_INTERRUPTED = 130


def several_processes() -> bool:
    """Whether a launcher started this process as one of several."""
    return os.environ.get(SEVERAL[1], "1") not in ("", "1")


def is_first_process() -> bool:
    """Whether this process is rank 0, the one that prints."""
    return not several_processes() or os.environ.get(SEVERAL[0]) == "0"


def refuse_several(what: str) -> None:
    """Raises RanksError if this process is one of several."""
    if several_processes():
        raise RanksError(
            f"{what} runs in one process, and {os.environ[SEVERAL[1]]} were started; "
            "quantize and compare share their work out"
        )


class Watch:
    """A thread that tells the store of this rank, and looks for the others there."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._seen: dict[int, tuple[int, float]] = {}
        # What a rank told; the store may go with it.
        self._known: tuple[int, str, int] | None = None
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    @contextlib.contextmanager
    def over(self) -> Iterator[None]:
        """A context that is watched; an error in it is told to the others."""
        thread = threading.Thread(target=self._run, name="watch", daemon=True)
        with self._signals():
            thread.start()
            try:
                yield
            except LostError:
                self._note_told()
                raise
            except BaseException as error:
                self._tell(error)
                raise
            finally:
                self._ended.set()
                os.write(self._write, b"\0")
                thread.join()
                for descriptor in (self._read, self._write):
                    os.close(descriptor)

    def lost(self) -> LostError:
        """Why a message to or from another rank failed; takes the seconds to find out."""
        until = time.monotonic() + 4 * _BEAT
        before = self._beats()
        while time.monotonic() < until:
            told = self._failure()
            if told is not None:
                return _error(*told)
            time.sleep(_BEAT / 4)
        after = self._beats()
        gone = [rank for rank, beat in after.items() if beat == before.get(rank)]
        return _error(gone[0] if gone else None, None, LostError.exit_code)

    def _tell(self, error: BaseException) -> None:
        """Tells the others of this rank's error.

        Returns when they have had time to see it, and rank 0 to print it.
        """
        code, sentence = _CRASH, repr(error)
        if isinstance(error, QuantkitError):
            code, sentence = error.exit_code, str(error)
        elif isinstance(error, KeyboardInterrupt):
            code, sentence = _INTERRUPTED, "interrupted"
        with contextlib.suppress(Exception), self._lock:
            self._store.compare_set("failed", "", json.dumps([self._rank, sentence, code]))
        if self._rank == 0:
            time.sleep(2 * _BEAT)
            self._note_told()
            return
        until = time.monotonic() + _TOLD
        with contextlib.suppress(Exception):
            while time.monotonic() < until:
                with self._lock:
                    if self._store.check(["told"]):
                        return
                time.sleep(_BEAT / 10)

    def _note_told(self) -> None:
        """Lets the others end, if this is the rank that prints."""
        if self._rank == 0:
            with contextlib.suppress(Exception), self._lock:
                self._store.set("told", "")

    def _failure(self) -> tuple[int, str, int] | None:
        """The first rank that told of an error, its sentence and exit code."""
        with contextlib.suppress(Exception), self._lock:
            if self._known is None and self._store.check(["failed"]):
                rank, sentence, code = json.loads(self._store.get("failed"))
                self._known = rank, sentence, code
        return self._known

    def _beats(self) -> dict[int, int]:
        """Each other rank's number; none where the store is gone."""
        found = {}
        with contextlib.suppress(Exception), self._lock:
            for rank in range(self._size):
                if rank != self._rank and self._store.check([f"beat-{rank}"]):
                    found[rank] = self._store.add(f"beat-{rank}", 0)
        return found

    def _run(self) -> None:
        # One that stops before it counts for the first time is missed all the same.
        began = time.monotonic()
        self._seen = {rank: (-1, began) for rank in range(self._size) if rank != self._rank}
        while not self._ended.is_set():
            ready, _, _ = select.select([self._read], [], [], _BEAT)
            if self._ended.is_set():
                return
            if ready:
                # A launcher ends all processes as soon as one is gone.
                signals = os.read(self._read, 64)
                code = _INTERRUPTED if signal.SIGINT in signals else LostError.exit_code
                self._end(_error(None, None, code), wait=4 * _BEAT)
            try:
                with self._lock:
                    self._store.add(f"beat-{self._rank}", 1)
            except Exception:
                self._end(_error(0, None, LostError.exit_code), wait=4 * _BEAT)
            told = self._failure()
            if told is not None:
                self._end(_error(*told), wait=2 * _BEAT)
            now, beats = time.monotonic(), self._beats()
            for rank, (before, since) in tuple(self._seen.items()):
                if (beat := beats.get(rank, before)) != before:
                    self._seen[rank] = beat, now
                elif now - since > _LOST:
                    self._end(_error(rank, None, LostError.exit_code), wait=0.0)

    def _end(self, error: LostError, *, wait: float) -> None:
        """Ends the process, if its main thread does not within the seconds: it may wait for ever.

        Nothing is lost: what the journal says is on the disk.
        """
        if self._ended.wait(wait):
            return
        told = self._failure()
        if told is not None:
            error = _error(*told)
        with contextlib.suppress(Exception):
            print(f"\nquantkit: {error}", file=sys.stderr, flush=True)
        self._note_told()
        os._exit(error.exit_code)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """A context in which SIGTERM wakes the watch: the main thread may wait in the backend."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
        wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        try:
            yield
        except BaseException:
            # The launcher's signal must not come before the sentence.
            handler = signal.SIG_IGN
            raise
        finally:
            signal.set_wakeup_fd(wakeup)
            signal.signal(signal.SIGTERM, handler)


def _error(rank: int | None, sentence: str | None, code: int) -> LostError:
    if sentence is None:
        who = "another process of this run" if rank is None else f"rank {rank} of this run"
        return LostError(f"{who} was lost or ended; {_GO_ON}", exit_code=code)
    return LostError(f"rank {rank}: {sentence}", exit_code=code)
