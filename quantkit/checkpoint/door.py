"""The one door for files that come from outside: of which kind, how large and how deep they may be.

Configurations, indices, tokenizers, reports, manifests, recipes and calibration text are opened
here.  Links may lead to a file; devices, FIFOs, sockets and giants are refused before a byte of
them is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError, QuantkitError

# The largest that each kind of file is read whole; several times the largest known.
CONFIG_BYTES = 16 * 2**20
INDEX_BYTES = 64 * 2**20
RECORD_BYTES = 64 * 2**20
TOKENIZER_BYTES = 256 * 2**20
FOLDS_BYTES = 256 * 2**20
RECIPE_BYTES = 2**19
# Of calibration or evaluation text, which is hashed whole; no run needs a hundredth of it.
TEXT_BYTES = 8 * 2**30
# Nested containers; what reads them later recurses, several frames to a level.
MAX_DEPTH = 64
_NAME_BYTES, _PATH_BYTES = 255, 4095
_PIECE_BYTES = 4 * 2**20
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def given_path(
    path: str | os.PathLike[str], *, error: type[QuantkitError] = CheckpointError
) -> Path:
    """The path as a user wrote it, `~` expanded and never a pattern; there need be nothing.

    Raises `error` for what no system takes: an unknown home, a name that is too long, a zero byte,
    links in a circle.
    """
    text = os.fspath(path)
    shown = ascii(text if len(text) <= 100 else f"{text[:100]}...")
    if "\0" in text:
        raise error(f"path {shown}: holds a zero byte; no file can be called so")
    try:
        found = Path(text).expanduser()
    except RuntimeError as cause:
        raise error(f"path {shown}: there is no such home directory; write it in full") from cause
    try:
        raw = os.fsencode(found)
    except UnicodeEncodeError as cause:
        raise error(f"path {shown}: holds what no file name can hold") from cause
    if len(raw) > _PATH_BYTES or any(len(part) > _NAME_BYTES for part in raw.split(b"/")):
        raise error(
            f"path {shown}: {len(raw)} bytes; a path has at most {_PATH_BYTES}, each name in it "
            f"at most {_NAME_BYTES}"
        )
    try:
        found.stat()
    except FileNotFoundError:
        pass
    except OSError as cause:
        raise error(f"path {shown}: cannot be reached: {cause.strerror}") from cause
    return found


def open_plain(
    path: Path, *, largest: int | None = None, error: type[QuantkitError] = CheckpointError
) -> int:
    """A descriptor of a plain file to read, which the caller closes; links are followed.

    Raises `error` if it is missing, of another kind, or larger than `largest` bytes.
    """
    try:
        # Opening a device may do something, and opening a FIFO may wait: look first.
        _demand_plain(path, os.stat(path), largest, error)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as cause:
        what = "this is a link to nothing" if path.is_symlink() else "there is no such file"
        raise error(f"{path}: {what}") from cause
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror}") from cause
    try:
        _demand_plain(path, os.fstat(descriptor), largest, error)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_plain(path: Path, *, largest: int, error: type[QuantkitError] = CheckpointError) -> bytes:
    """The content of a plain file of at most `largest` bytes.  Raises `error` as `open_plain`."""
    descriptor = open_plain(path, largest=largest, error=error)
    with _reading(path, error), os.fdopen(descriptor, "rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise error(f"{path}: grows while it is read; at most {largest} bytes are read")
    return content


def read_start(
    path: Path, num_bytes: int, *, error: type[QuantkitError] = CheckpointError
) -> bytes:
    """The first bytes of a plain file, fewer if it is shorter.  Raises `error` as `open_plain`."""
    with _reading(path, error), os.fdopen(open_plain(path, error=error), "rb") as file:
        return file.read(num_bytes)


def file_sha256(
    path: Path, *, largest: int | None = None, error: type[QuantkitError] = CheckpointError
) -> str:
    """Hex sha256 of a plain file, read in bounded pieces.  Raises `error` as `open_plain`."""
    digest = hashlib.sha256()
    descriptor = open_plain(path, largest=largest, error=error)
    with _reading(path, error), os.fdopen(descriptor, "rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def read_json(
    path: Path, *, largest: int, error: type[QuantkitError] = CheckpointError
) -> dict[str, Any]:
    """The object in a JSON file.  Raises `error` as `open_plain` and `parse_json` do."""
    return parse_json(read_plain(path, largest=largest, error=error), str(path), error=error)


def parse_json(
    content: bytes,
    where: str,
    *,
    wide: bool = False,
    error: type[QuantkitError] = CheckpointError,
) -> dict[str, Any]:
    """The object that JSON text holds, as deep as MAX_DEPTH; `where` names it in errors.

    Raises `error` for anything else, and for what JSON allows and nothing else takes: halves of a
    character, integers beyond 64 bits (unless `wide`: tokenizers write 10**30 for no limit).
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as cause:
        raise error(f"{where}: this is no valid JSON ({cause}); download it again") from cause
    if not isinstance(value, dict):
        raise error(f"{where}: no JSON object; download it again")
    if (problem := unfit(value, wide=wide)) is not None:
        raise error(f"{where}: {problem}")
    return value


def unfit(value: Any, *, wide: bool = False) -> str | None:
    """Why values of JSON or YAML cannot be worked with, naming the field; None if they can."""
    for names, each in _walk(value):
        if len(names) > MAX_DEPTH:
            return f"{_field(names[:3])}: nested more than {MAX_DEPTH} deep"
        if not wide and isinstance(each, int) and abs(each) >= 2**64:
            return f"{_field(names)}: an integer beyond 64 bits"
        for text in (*names[-1:], each):
            if isinstance(text, str) and not _is_text(text):
                return f"{_field(names)}: {ascii(text)[:80]} is no valid text"
    return None


def is_count(value: Any) -> bool:
    """A whole number of at least 0; true and false are none."""
    return type(value) is int and value >= 0


def is_size(value: Any) -> bool:
    """A whole number of at least 1."""
    return type(value) is int and value >= 1


def is_integer(value: Any) -> bool:
    """A whole number."""
    return type(value) is int


def is_number(value: Any) -> bool:
    """A number."""
    return type(value) in (int, float)


def is_bool(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def is_text(value: Any) -> bool:
    """A text."""
    return isinstance(value, str)


def is_object(value: Any) -> bool:
    """An object."""
    return isinstance(value, dict)


def list_of(each: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The test for a list whose every entry passes a test."""
    return lambda value: isinstance(value, list) and all(map(each, value))


def object_of(each: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The test for an object whose every value passes a test."""
    return lambda value: isinstance(value, dict) and all(map(each, value.values()))


# What a field must be: the test, and its words in errors.
Fields = Mapping[str, tuple[Callable[[Any], bool], str]]


def check_fields(
    found: Mapping[str, Any], fields: Fields, where: str, *, needed: frozenset[str] = frozenset()
) -> None:
    """Nothing if the known fields are what they should be; else CheckpointError naming one.

    A field that is missing or null is one that was not set, unless it is `needed`.
    """
    for name, (test, wanted) in fields.items():
        value = found.get(name)
        if value is None and (name not in needed or name not in found):
            continue
        if not test(value):
            shown = ascii(value)
            shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
            raise CheckpointError(
                f"{where}{name} is {shown}; it takes {wanted}: mend it, or download the file again"
            )


@contextmanager
def _reading(path: Path, error: type[QuantkitError]) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror}") from cause


def _walk(value: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value with the keys that lead to it, without recursion; stops below MAX_DEPTH."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while waiting:
        names, each = waiting.pop()
        yield names, each
        if len(names) > MAX_DEPTH:
            continue
        if isinstance(each, dict):
            waiting += [((*names, key), inner) for key, inner in each.items()]
        elif isinstance(each, list):
            waiting += [((*names, index), inner) for index, inner in enumerate(each)]


def _field(names: tuple[Any, ...]) -> str:
    return ".".join(ascii(str(name))[1:-1][:60] for name in names) or "the whole"


def _is_text(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _demand_plain(
    path: Path, status: os.stat_result, largest: int | None, error: type[QuantkitError]
) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((word for test, word in _KINDS if test(status.st_mode)), "something else")
        raise error(f"{path}: this is {kind}, and a plain file is needed")
    if largest is not None and status.st_size > largest:
        raise error(
            f"{path}: {status.st_size} bytes; such a file is read up to {largest}, so this is "
            "another one, or a damaged one"
        )
