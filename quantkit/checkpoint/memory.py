"""Memory sizes as people write them, and what this process holds."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

from quantkit.errors import BudgetError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SPARE_MIB = 8
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMGT]?)(i?)B?", re.IGNORECASE | re.ASCII)
_LARGEST = 2**60
# Of what is free on a GPU: the rest is for hidden states and what lies scattered.
_PLANNED = 0.75


def parse_size(text: str) -> int:
    """Bytes of "6GiB", "5GB", "800M" or "1234".  Raises BudgetError showing how to write sizes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise BudgetError(f"size {shown!r}: write a number with a unit, as in 6GiB, 5GB or 800MB")
    number, unit, binary = match.groups()
    factor = _BINARY_UNITS[unit.upper()] if binary and unit else _UNITS[unit.upper()]
    size = int(float(number) * factor)
    if size > _LARGEST:
        raise BudgetError(f"size {text!r}: more than any machine has; write 6GiB, 5GB or 800MB")
    return size


def format_size(num_bytes: float) -> str:
    """Bytes for people: "1.25 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1024
    raise AssertionError("unreachable")


def with_spare(needed: int) -> int:
    """Bytes to ask for next time, a whole number of MiB: `needed` and a little more.

    The process itself is part of what is needed and weighs a MiB or two more in one run than
    in the next (where libraries are mapped, what the interpreter cached), so the bare figure of
    one run may be refused by the next.
    """
    return (-(-needed // 2**20) + _SPARE_MIB) * 2**20


def peak_vram(device: str) -> dict[str, int]:
    """`peak_vram_bytes`: the most that torch held on a GPU so far; nothing of a CPU."""
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda"):
        return {}
    return {"peak_vram_bytes": torch.cuda.max_memory_reserved(device)}


def free_vram(device: str) -> int | None:
    """Bytes of a GPU that a run may plan with, part of those free now; None for a CPU."""
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda"):
        return None
    return int(_PLANNED * torch.cuda.mem_get_info(device)[0])


def current_rss() -> int:
    """Resident bytes of this process now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_rss()
    return pages * resource.getpagesize()


def machine_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_rss() -> int:
    """Highest resident bytes of this process so far, as the operating system counts them."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_large_blocks() -> None:
    """Makes glibc map allocations over 1 MiB one by one, so that freeing them returns the memory.

    Otherwise its threshold grows to 32 MiB and freed weights stay resident in the heap.
    """
    libc = _glibc()
    if libc is not None:
        m_mmap_threshold = -3
        libc.mallopt(m_mmap_threshold, 1 << 20)


def release_free_memory() -> None:
    """Gives freed heap pages back to the operating system, where glibc is there to do it."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
