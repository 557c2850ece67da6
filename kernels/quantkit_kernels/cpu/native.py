"""C++ sources of this package, compiled on first use by the compiler that torch.compile needs.

A library is kept under $QUANTKIT_CACHE, else ~/.cache/quantkit, by its source, the compiler, torch
and the processor; building takes seconds, loading nothing.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

_LOG = logging.getLogger(__name__)
# torch's stable ABI has had parallel_for since then.
_FIRST_TORCH = (2, 10)
_COMPILERS = ("c++", "g++", "clang++")


@functools.cache
def load(name: str, flags: tuple[str, ...] = ()) -> str | None:
    """Compiles NAME.cpp if that was not done before, and registers its ops; why it cannot, or None.

    A process loads a source once, whatever the flags.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    if sys.platform != "linux":
        return f"{source.name} is built on Linux only"
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < _FIRST_TORCH:
        return f"torch {torch.__version__}: building {source.name} needs 2.10 or newer"
    compiler = _compiler()
    if isinstance(compiler, str):
        return f"no C++ compiler to build {source.name}: {compiler}"
    try:
        return _load(source, compiler, flags)
    except OSError as error:
        return (
            f"building {source.name}: {error}; name another folder in $QUANTKIT_CACHE, or a "
            "compiler in $CXX"
        )


def _load(source: Path, compiler: list[str], flags: tuple[str, ...]) -> str | None:
    library = _library_path(source, compiler, flags)
    for attempt in range(2):
        if not library.exists():
            reason = _build(source, library, compiler, flags)
            if reason is not None:
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
    """Where what was made on this machine is kept: $QUANTKIT_CACHE, else ~/.cache/quantkit."""
    folder = os.environ.get("QUANTKIT_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "quantkit"


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
    version = subprocess.run(command, capture_output=True, text=True, check=False)
    parts = (
        source.read_text(encoding="utf-8"),
        *compiler,
        version.stdout,
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
    torch_folder = Path(torch.__file__).parent
    library.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may build at once: each writes a file of its own, and the last one stays.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        partial = Path(folder) / library.name
        command = [
            *compiler, "-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", *flags,
            f"-I{torch_folder / 'include'}", str(source), "-o", str(partial),
            f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            return f"{compiler[0]} cannot build {source.name}: {(errors or [done.stderr])[0][:300]}"
        # On the disk before it has its name: after a power cut it is whole or not there.
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, library)
    return None
