"""What is in a checkpoint: schemes, sizes, bits per weight, and how it was made."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.door import given_path
from quantkit.checkpoint.dtypes import name_of
from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.memory import format_size
from quantkit.checkpoint.output import refuse_unfinished
from quantkit.checkpoint.record import REPORT, read_report
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.formats.format import StoredWeight, format_of
from quantkit.formats.gguf.file import read_gguf
from quantkit.formats.onnx.describe import describe_onnx
from quantkit.formats.open import container_of, is_onnx, open_source
from quantkit.numbers.superblock import BLOCK_TYPES

# Codes that other tools pack into the 32-bit words of this tensor.
_PACKED = ".qweight"
_OPTIONS = (
    "bits",
    "w_bit",
    "group_size",
    "q_group_size",
    "sym",
    "desc_act",
    "version",
    "format",
    "checkpoint_format",
    "bnb_4bit_quant_type",
    "load_in_8bit",
    "fmt",
)


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
    if (file := container_of(path)) is not None:
        return _inspect_onnx(file) if is_onnx(file) else _inspect_gguf(file)
    source = open_source(path)
    directory = source.path if isinstance(source, FileSource) else path
    config = source.config
    quantization = _quantization_config(config)
    notes: list[str] = []
    stored: dict[str, StoredWeight] = {}
    name = "unquantized safetensors"
    if quantization is not None:
        name = _describe(quantization)
        try:
            fmt = format_of(source)
            stored = fmt.weights(source)
            name = fmt.name
        except QuantkitError as error:
            notes.append(f"not read by quantkit: {error}")
    return Inspection(
        path=path,
        model_type=str(config.get("model_type", "unknown")),
        format=name,
        groups=_groups(source, stored, quantization or {}),
        provenance=_provenance(directory, notes),
        notes=tuple(notes),
    )


def _inspect_gguf(path: Path) -> Inspection:
    """What a GGUF file holds, under its own names, of whatever architecture."""
    header = read_gguf(path)
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for tensor in header.tensors.values():
        sizes = found.setdefault((_pattern(tensor.name), tensor.type), [])
        sizes.append((tensor.numel, tensor.num_bytes))
    notes: list[str] = []
    made_by = header.metadata.get("quantkit.version")
    if made_by is not None:
        notes.append(f"written by quantkit {made_by}")
    undecoded = {label for _, label in found} - {"F32", "F16", "BF16", *BLOCK_TYPES}
    if undecoded:
        notes.append(f"not decoded by quantkit: {', '.join(sorted(undecoded))}")
    return Inspection(
        path=path,
        model_type=str(header.metadata.get("general.architecture", "unknown")),
        format=f"gguf version {header.version}",
        groups=tuple(
            Group(
                pattern=pattern,
                scheme=None if label in ("F32", "F16", "BF16") else label,
                dtype=label,
                count=len(sizes),
                parameters=sum(parameters for parameters, _ in sizes),
                num_bytes=sum(size for _, size in sizes),
            )
            for (pattern, label), sizes in sorted(
                found.items(), key=lambda item: (_natural(item[0][0]), item[0][1])
            )
        ),
        provenance=_provenance(path.parent, notes),
        notes=tuple(notes),
    )


def _inspect_onnx(path: Path) -> Inspection:
    """What an ONNX graph holds, by the checkpoint's names if they are known."""
    content = describe_onnx(path)
    found: dict[tuple[str, str | None, str], list[tuple[int, int]]] = {}
    for item in content.items:
        kind = (_pattern(item.name), item.scheme, item.dtype)
        found.setdefault(kind, []).append((item.parameters, item.num_bytes))
    notes = list(content.notes)
    return Inspection(
        path=path,
        model_type=content.model_type,
        format=content.format,
        groups=_sorted_groups(found),
        provenance=_provenance(content.home, notes),
        notes=tuple(notes),
    )


def _quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key) if isinstance(part, Mapping) else None
            if isinstance(found, dict):
                return found
    return None


def _describe(config: Mapping[str, Any]) -> str:
    """A foreign quantization_config in a line: its method and its main options."""
    options = [f"{key} {config[key]}" for key in _OPTIONS if config.get(key) not in (None, False)]
    method = str(config.get("quant_method", "unknown method"))
    return f"{method} ({', '.join(options)})" if options else method


def _groups(
    source: Source, stored: Mapping[str, StoredWeight], config: Mapping[str, Any]
) -> tuple[Group, ...]:
    """All tensors by kind, in the order of their names; a quantized weight counts as one."""
    found: dict[tuple[str, str | None, str], list[tuple[int, int]]] = {}
    packed = Counter(name for weight in stored.values() for name in weight.tensors)
    for weight in stored.values():
        # Experts may share their tensors.
        size = sum(source.info(name).nbytes // packed[name] for name in weight.tensors)
        kind = (_pattern(weight.name), weight.scheme.name, name_of(weight.label))
        found.setdefault(kind, []).append((math.prod(weight.shape), size))
    bits = config.get("bits", config.get("w_bit"))
    for name in source.names():
        if name in packed:
            continue
        info = source.info(name)
        parameters = info.numel
        if config and not stored:
            parameters = _foreign_parameters(name, info.numel, bits)
        found.setdefault((_pattern(name), None, name_of(info.label)), []).append(
            (parameters, info.nbytes)
        )
    return _sorted_groups(found)


def _sorted_groups(
    found: Mapping[tuple[str, str | None, str], Sequence[tuple[int, int]]],
) -> tuple[Group, ...]:
    """(pattern, scheme, dtype) -> (parameters, bytes) of each tensor, in the order of names."""
    return tuple(
        Group(
            pattern=pattern,
            scheme=scheme,
            dtype=dtype,
            count=len(sizes),
            parameters=sum(parameters for parameters, _ in sizes),
            num_bytes=sum(size for _, size in sizes),
        )
        for (pattern, scheme, dtype), sizes in sorted(
            found.items(), key=lambda item: (_natural(item[0][0]), str(item[0][1]))
        )
    )


def _foreign_parameters(name: str, numel: int, bits: object) -> int:
    """Original numbers in a tensor of another tool: scales, zeros and indices hold none."""
    if name.endswith(_PACKED) and isinstance(bits, int) and bits > 0:
        return numel * 32 // bits
    helpers = (".scales", ".qzeros", ".g_idx", "_scale", "_scale_inv", "_zero_point", ".SCB")
    return 0 if name.endswith(helpers) or ".weight." in name else numel


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
