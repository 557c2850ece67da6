"""What is in a checkpoint: schemes, sizes, bits per weight, and how it was made."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.door import given_path
from quantkit.checkpoint.memory import format_size
from quantkit.checkpoint.output import refuse_unfinished
from quantkit.checkpoint.record import REPORT, read_report
from quantkit.errors import CheckpointError
from quantkit.formats.contents import Item
from quantkit.formats.describe import describe


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors of one kind: names equal but for their numbers (`*`), stored alike.

    scheme  name of the quantized weights' scheme, else None
    dtype   as stored, without "torch."; of quantized weights that of the original
    """

    pattern: str
    scheme: str | None
    dtype: str
    count: int
    parameters: int
    num_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each of the original's numbers."""
        return 8 * self.num_bytes / max(self.parameters, 1)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How quantkit made the checkpoint, as its report tells."""

    method: str
    scheme: str
    calibration: str
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found; `notes` say what could not be told, and why."""

    path: Path
    model_type: str
    format: str
    groups: tuple[Group, ...]
    provenance: Provenance | None
    notes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(group.num_bytes for group in self.groups)

    @property
    def parameters(self) -> int:
        """Numbers in the original model, packed ones counted one by one."""
        return sum(group.parameters for group in self.groups)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter: scales, zeros and unquantized tensors included."""
        return 8 * self.num_bytes / max(self.parameters, 1)

    @property
    def bits_per_quantized_weight(self) -> float | None:
        """The same among quantized weights alone; None if there are none."""
        quantized = [group for group in self.groups if group.scheme is not None]
        if not quantized:
            return None
        total = sum(group.num_bytes for group in quantized)
        return 8 * total / max(sum(group.parameters for group in quantized), 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        alone = self.bits_per_quantized_weight
        return {
            "path": str(self.path),
            "model_type": self.model_type,
            "format": self.format,
            "bytes": self.num_bytes,
            "parameters": self.parameters,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "bits_per_quantized_weight": None if alone is None else round(alone, 4),
            "groups": [
                {
                    "pattern": group.pattern,
                    "scheme": group.scheme,
                    "dtype": group.dtype,
                    "count": group.count,
                    "parameters": group.parameters,
                    "bytes": group.num_bytes,
                    "bits_per_weight": round(group.bits_per_weight, 4),
                }
                for group in self.groups
            ],
            "provenance": None if self.provenance is None else dataclasses.asdict(self.provenance),
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """For people: a table of the groups, then the totals."""
        rows = [("tensors", "count", "scheme", "size", "bits")]
        for group in self.groups:
            scheme = group.scheme or group.dtype
            size = format_size(group.num_bytes)
            bits = f"{group.bits_per_weight:.3f}" if group.parameters else ""
            rows.append((group.pattern, str(group.count), scheme, size, bits))
        alone = self.bits_per_quantized_weight
        among = "" if alone is None else f", {alone:.3f} among the quantized"
        lines = [
            *_aligned(rows),
            "",
            f"model      {self.model_type}, {self.parameters:,} parameters",
            f"format     {self.format}",
            f"size       {format_size(self.num_bytes)}",
            f"bits       {self.bits_per_weight:.3f} per weight{among}",
        ]
        if self.provenance is not None:
            made = self.provenance
            lines.append(f"method     {made.method}, {made.scheme}")
            lines.append(f"calibrated {made.calibration}")
            versions = ", ".join(f"{key} {value}" for key, value in made.versions.items())
            lines.append(f"made with  {versions or 'versions not recorded'}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def inspect(path: str | Path) -> Inspection:
    """What the checkpoint at `path` holds; reads headers and configuration, and no weights.

    Formats that quantkit does not read are summarised from their configuration.  Raises
    CheckpointError if this is no checkpoint, or an unfinished one.
    """
    path = given_path(path)
    refuse_unfinished(path)
    found = describe(path)
    notes = list(found.notes)
    return Inspection(
        path=path,
        model_type=found.model_type,
        format=found.format,
        groups=_groups(found.items),
        provenance=_provenance(found.home, notes),
        notes=tuple(notes),
    )


def _groups(items: Sequence[Item]) -> tuple[Group, ...]:
    """All tensors by kind, in the order of their names."""
    found: dict[tuple[str, str | None, str], list[Item]] = {}
    for item in items:
        found.setdefault((_pattern(item.name), item.scheme, item.dtype), []).append(item)
    return tuple(
        Group(
            pattern=pattern,
            scheme=scheme,
            dtype=dtype,
            count=len(alike),
            parameters=sum(item.parameters for item in alike),
            num_bytes=sum(item.num_bytes for item in alike),
        )
        for (pattern, scheme, dtype), alike in sorted(
            found.items(), key=lambda kind: (_natural(kind[0][0]), str(kind[0][1]), kind[0][2])
        )
    )


def _provenance(directory: Path, notes: list[str]) -> Provenance | None:
    """What quantkit's report says; None (and a note if it is damaged) without one."""
    try:
        report = read_report(directory)
        if not report:
            return None
        calibration = report["calibration"]
        told = "without data"
        if calibration is not None:
            told = (
                f"on {calibration['source']}: {calibration['samples']} x {calibration['seq_len']} "
                "tokens"
            )
        fingerprint = report.get("fingerprint") or {}
        versions = {
            key.removesuffix(" version"): str(value)
            for key, value in fingerprint.items()
            if key == "python" or key.endswith(" version")
        }
        return Provenance(
            method=str(report["method"]),
            scheme=str(report["scheme"]),
            calibration=told,
            versions=versions,
        )
    except CheckpointError as error:
        notes.append(str(error))
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        notes.append(f"{REPORT} cannot be read: {error!r}")
        return None


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def _natural(pattern: str) -> tuple[bool, str]:
    """Sorts what is outside blocks first."""
    return "*" in pattern, pattern


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join(cells).rstrip()
