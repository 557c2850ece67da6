"""C++ sources of this package: as the wheel brought them compiled, else compiled on first use.

The compiler is that which torch.compile needs.  A library is kept under $QUANTKIT_CACHE, else
~/.cache/quantkit, by its source, the compiler, torch and the processor; building takes seconds,
loading nothing.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from quantkit_kernels.cpu import objects

_LOG = logging.getLogger(__name__)
_COMPILERS = ("c++", "g++", "clang++")
# A build takes some ten seconds of one core.
_SECONDS = 600.0


@functools.cache
def load(name: str) -> str | None:
    """Registers the ops of NAME.cpp, compiled now if that was never done; why it cannot, or None.

    A process loads a source once.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    if sys.platform != "linux":
        return f"{source.name} is built on Linux only"
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < objects.FIRST_TORCH:
        return f"torch {torch.__version__}: {source.name} needs 2.10 or newer"
    refused = _load_object(source)
    if refused is None:
        return None
    if refused:
        _LOG.warning("%s; building %s instead", refused, source.name)
    reason = _build_and_load(source)
    return f"{reason} ({refused})" if reason and refused else reason


def _load_object(source: Path) -> str | None:
    """None if an object of the package was loaded, else why not; empty where it has none."""
    path, reason = objects.find(source, _processor_flags())
    if path is None:
        return reason or ""
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{path.name} does not load: {error.__cause__ or error}"
    return None


def _build_and_load(source: Path) -> str | None:
    compiler = _compiler()
    if isinstance(compiler, str):
        return f"no C++ compiler to build {source.name}: {compiler}"
    try:
        return _load(source, compiler, ())
    except OSError as error:
        return (
            f"building {source.name}: {error}; name another folder in $QUANTKIT_CACHE, or a "
            "compiler in $CXX"
        )


def _load(source: Path, compiler: list[str], flags: tuple[str, ...]) -> str | None:
    library = _library_path(source, compiler, flags)
    # What lies in the folder is run: nobody else may put anything there.
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if reason := _written_by_others(library.parent):
        return reason
    for attempt in range(2):
        if not library.exists():
            reason = _build(source, library, compiler, flags)
            if reason is not None:
                return reason
        if reason := _written_by_others(library):
            return reason
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        except OSError as error:
            if attempt:
                return f"{library} does not load: {error.__cause__ or error}"
            # Cut short, or copied from elsewhere: it is built again.
            library.unlink()
        else:
            break
    return None


def cache_folder() -> Path:
    """Where what was made on this machine is kept: $QUANTKIT_CACHE, else ~/.cache/quantkit.

    Raises OSError where there is neither.
    """
    if folder := os.environ.get("QUANTKIT_CACHE"):
        return Path(folder)
    try:
        return Path.home() / ".cache" / "quantkit"
    except RuntimeError as error:
        raise OSError("there is no home folder to keep it in") from error


def _written_by_others(path: Path) -> str | None:
    """Why a file or folder of compiled code is not to be trusted, or None."""
    found = path.stat()
    # In a folder with the sticky bit nobody can replace what belongs to another user.
    open_to_all = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (
        stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    )
    if found.st_uid not in (0, os.geteuid()):
        reason = f"belongs to user {found.st_uid}"
    elif open_to_all:
        reason = f"may be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    else:
        return None
    return f"{path} {reason}: what others compiled is not run; name another $QUANTKIT_CACHE"


def _compiler() -> list[str] | str:
    """The compiler's command, or why there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        found = shutil.which(named[0])
        return [found, *named[1:]] if found else f"$CXX names {named[0]!r}, which is no program"
    programs = [found for name in _COMPILERS if (found := shutil.which(name))]
    return programs[:1] or "install g++ or clang++, or name one in $CXX"


def _library_path(source: Path, compiler: list[str], flags: tuple[str, ...]) -> Path:
    command = [*compiler, "--version"]
    _, version, _ = _run(command)
    parts = (
        objects.digest_of(source),
        *compiler,
        version,
        torch.__version__,
        platform.machine(),
        _processor_flags(),
        *flags,
    )
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return cache_folder() / f"{source.stem}-{digest[:16]}.so"


def _processor_flags() -> str:
    """The instruction sets that -march=native sees; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")


def _build(source: Path, library: Path, compiler: list[str], flags: tuple[str, ...]) -> str | None:
    _LOG.info("building %s with %s, once for this machine", source.name, compiler[0])
    # Two processes may build at once: each writes a file of its own, and the last one stays.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        partial = Path(folder) / library.name
        if reason := compile_library(source, partial, compiler, ("-march=native", *flags)):
            return reason
        partial.chmod(0o700)
        # On the disk before it has its name: after a power cut it is whole or not there.
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, library)
    return None


def compile_library(
    source: Path, library: Path, compiler: list[str], flags: tuple[str, ...]
) -> str | None:
    """Makes a shared library of a source; why that fails, or None."""
    torch_folder = Path(torch.__file__).parent
    command = [
        *compiler, "-std=c++20", "-O3", "-shared", "-fPIC", *flags,
        f"-I{torch_folder / 'include'}", str(source), "-o", str(library),
        # The standard library in front: torch's exports parts of it, without their versions.
        f"-L{torch_folder / 'lib'}", "-Wl,--as-needed", "-lstdc++", "-lm", "-lc", "-ltorch_cpu",
    ]  # fmt: skip
    code, _, said = _run(command)
    if not code:
        return None
    errors = [line for line in said.splitlines() if "error" in line]
    return f"{compiler[0]} cannot build {source.name}: {(errors or [said])[0][:300]}"


def _run(command: list[str]) -> tuple[int, str, str]:
    """Exit status, output and errors of a program; OSError if it takes too long."""
    # A group of its own: a compiler is several processes, and all of them must end.
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise OSError(f"{command[0]} did not end in {_SECONDS:.0f} s") from error
            raise
    return process.returncode, output, errors
