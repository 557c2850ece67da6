"""The end of a run by an error of quantkit's own: one line, and where the rest is."""

from __future__ import annotations

import errno
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence

from quantkit.checkpoint.version import __version__

# sysexits.h: EX_SOFTWARE.
EXIT_CODE = 70
# Set to anything but 0, the traceback is printed too.
SHOW = "QUANTKIT_TRACEBACK"
_MACHINE = frozenset(
    {
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE,
        errno.ENFILE, errno.ENOMEM, errno.ESTALE,
    }
)  # fmt: skip


def report_crash(error: BaseException, command: str) -> str:
    """The line that tells of an internal error; its traceback lies in a file of its own.

    Where no file can be written, or SHOW is set, the traceback comes before the line.
    """
    told = "".join(traceback.format_exception(error))
    versions = f"quantkit {__version__}, Python {platform.python_version()}"
    place = _save(f"{versions}\n{command}\n\n{told}")
    shown = f"{told}\n" if place is None or os.environ.get(SHOW, "0") != "0" else ""
    reason = (str(error).strip() or "no message").splitlines()[0]
    what = f"{type(error).__name__}: {ascii(reason)[1:-1][:200]}"
    kept = "" if place is None else f"; its traceback is in {place}"
    return f"{shown}quantkit: internal error: {what}{kept}; please report it"


def machine_error(error: BaseException) -> str | None:
    """The sentence for an error that is the machine's: no permission, no room, no memory."""
    # torch says it in a RuntimeError, with no class of its own on CPUs.
    if isinstance(error, MemoryError) or "not enough memory" in str(error):
        return "the machine has no memory left; --max-ram says how much may be used"
    if not isinstance(error, OSError) or error.errno not in _MACHINE:
        return None
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}; mend that and run the same command again"


def _save(text: str) -> str | None:
    """A new file of the temporary directory that holds the text; None if that cannot be."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="quantkit-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return None
    return name


def command_line(arguments: Sequence[str] | None) -> str:
    """The command as it was given, for the file."""
    return " ".join(["quantkit", *map(ascii, sys.argv[1:] if arguments is None else arguments)])
