"""quantkit's report of a checkpoint, read back: every field that is used has been checked.

It tells how a checkpoint came about, and what became of each tensor of its source.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args

from quantkit.checkpoint.door import (
    RECORD_BYTES,
    Fields,
    check_fields,
    is_bool,
    is_number,
    is_object,
    is_text,
    list_of,
    object_of,
    read_json,
)
from quantkit.checkpoint.source import Source

REPORT = "quantkit/report.json"
# What becomes of a tensor of the source; "added" is one that the source does not have.
Fate = Literal["quantized", "rescaled", "kept", "copied", "left out", "added"]
FATES: tuple[Fate, ...] = get_args(Fate)
# Fingerprint of the checkpoint that a graph or file holds the numbers of.
EXPORT_OF = "export of"


def _is_weight(value: Any) -> bool:
    """What the pages show of a weight."""
    return is_object(value) and is_text(value.get("name")) and is_number(value.get("error"))


_FIELDS: Fields = {
    **dict.fromkeys(("method", "scheme", "format", "model_type"), (is_text, "a text")),
    **dict.fromkeys(("recipe", "size", "readers", "calibration"), (is_object, "an object")),
    **dict.fromkeys(("fingerprint", "degraded"), (object_of(is_text), "texts by name")),
    "folded": (list_of(is_text), "a list of texts"),
    "tensors": (list_of(is_object), "a list of objects"),
    "weights": (list_of(_is_weight), "a list of objects with name and error"),
    "unties_head": (is_bool, "true or false"),
}


def read_report(home: Path) -> dict[str, Any]:
    """The report of the checkpoint in a directory; empty if there is none.

    Fields that are null are left out.  Raises CheckpointError for a file that is no such report.
    """
    path = home / REPORT
    if not os.path.lexists(path):
        return {}
    report = read_json(path, largest=RECORD_BYTES)
    check_fields(report, _FIELDS, f"{path}: ")
    return report


def holds_numbers_of(home: Path | None, source: Source) -> bool:
    """False if the weights at `home` were quantized anew from the quantized `source`."""
    made = {} if home is None else read_report(home).get("fingerprint")
    if not isinstance(made, dict) or made.get("requantize") != "True":
        return True
    return bool(made.get(EXPORT_OF) == source.fingerprint())
