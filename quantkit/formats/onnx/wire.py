"""How much memory an ONNX graph takes once parsed, told from its bytes before they are.

Two bytes of a protobuf can become an object of hundreds, so a small file can fill the memory of a
machine; fields are counted first, by the owner's own description of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError

# Graphs without their weights take some MB; a block of a model is about 900 fields.
LARGEST_GRAPH = 64 * 2**20
_MOST_FIELDS = 200_000
_DEEPEST = 32
# Packed integers take up to eight times their bytes.
_MOST_PACKED = 8 * 2**20
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
# Protobuf's numbers of the types string and bytes; what else has a length is packed numbers.
_STRING, _BYTES = 9, 12


def check_graph_size(path: Path, data: bytes, descriptor: Any) -> None:
    """Nothing if a graph's bytes are well formed and few enough; `descriptor` is ModelProto's.

    Raises CheckpointError naming the message and the place in the file.
    """
    fields = packed = 0
    waiting = [(0, len(data), descriptor, 0)]
    known: dict[Any, dict[int, Any]] = {}
    while waiting:
        position, end, message, depth = waiting.pop()
        numbers = known.get(message.full_name)
        if numbers is None:
            numbers = known[message.full_name] = dict(message.fields_by_number)
        while position < end:
            fields += 1
            if fields > _MOST_FIELDS:
                raise _damaged(path, message, position, f"more than {_MOST_FIELDS} fields")
            key = data[position]
            position += 1
            if key > 0x7F:
                key, position = _varint(path, message, data, position - 1, end)
            wire, field = key & 7, numbers.get(key >> 3)
            if wire == _VARINT:
                _, position = _varint(path, message, data, position, end)
                continue
            if wire == _LENGTH:
                length, position = _varint(path, message, data, position, end)
            elif wire in (_FIXED64, _FIXED32):
                length = 8 if wire == _FIXED64 else 4
            else:
                raise _damaged(path, message, position, f"wire type {wire}")
            start, position = position, position + length
            if position > end:
                raise _damaged(path, message, start, f"{length} bytes, {end - start} are there")
            if wire != _LENGTH or field is None:
                continue
            if field.message_type is not None:
                if depth == _DEEPEST:
                    raise _damaged(path, message, start, f"nested deeper than {_DEEPEST}")
                waiting.append((start, position, field.message_type, depth + 1))
            elif field.type not in (_STRING, _BYTES):
                packed += length
                if packed > _MOST_PACKED:
                    raise _damaged(path, message, start, f"more than {_MOST_PACKED} packed bytes")


def _varint(path: Path, message: Any, data: bytes, position: int, end: int) -> tuple[int, int]:
    """A number of variable length and where it ends."""
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise _damaged(path, message, position, "a number without an end")


def _damaged(path: Path, message: Any, position: int, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: no ONNX model, or a damaged one: {message.name} at byte {position}: {what}; "
        "download or export it again"
    )
