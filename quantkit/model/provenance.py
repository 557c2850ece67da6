"""How a checkpoint came about, told beside what is exported from it, and read by `verify`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from quantkit.checkpoint.disk import disk_errors, write_file
from quantkit.checkpoint.record import REPORT, read_report
from quantkit.checkpoint.source import Source
from quantkit.model.fold_vectors import copy_folds

# What becomes of a tensor of the source.
Fate = Literal["quantized", "rescaled", "kept", "copied", "left out"]
FATES: tuple[Fate, ...] = get_args(Fate)
_TOLD = ("method", "scheme", "calibration")
# Fingerprint of the checkpoint that a graph or file holds the numbers of.
EXPORT_OF = "export of"


def copy_provenance(source: Source, partial: Path, fingerprint: Mapping[str, str]) -> None:
    """Writes how a checkpoint was made, and what transforms did, beside a graph or file made of it.

    Nothing where no report of quantkit's tells it.
    """
    copy_folds(source.home, partial)
    report = {} if source.home is None else read_report(source.home)
    made = report.get("fingerprint")
    if not isinstance(made, dict) or any(key not in report for key in _TOLD):
        return
    told = {**{key: report[key] for key in _TOLD}, "fingerprint": {**made, **fingerprint}}
    text = json.dumps(told, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    path = partial / REPORT
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        write_file(path, text.encode())


def holds_numbers_of(home: Path | None, source: Source) -> bool:
    """False if the weights at `home` were quantized anew from the quantized `source`."""
    made = {} if home is None else read_report(home).get("fingerprint")
    if not isinstance(made, dict) or made.get("requantize") != "True":
        return True
    return bool(made.get(EXPORT_OF) == source.fingerprint())
