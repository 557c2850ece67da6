"""Whether a finished checkpoint is whole and holds what it should, read back from disk.

Works weight by weight: memory is bounded by the largest weight.
Letters: O out features, I in features, G groups per row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import FileSource, open_source
from quantkit.compare import Vectors, compare_copied, compare_quantized, compare_rescaled
from quantkit.errors import CheckpointError, NumericsError, QuantkitError
from quantkit.folds import FOLDS_FILE
from quantkit.format import FormatReader, StoredWeight, format_of
from quantkit.grid import IntegerGrid, grid_of
from quantkit.manifest import verify_manifest
from quantkit.runtimes import compare_runtime
from quantkit.source import Source
from quantkit.split_experts import split_experts
from quantkit.tensor import QuantizedTensor
from quantkit.tensorfile import read_header, read_into
from quantkit.unpacked import Unpacked

REPORT = "quantkit/report.json"
FATES = ("quantized", "rescaled", "kept", "copied")
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question asked: `detail` says what was looked at, `problems` what is wrong."""

    name: str
    detail: str
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """Every check of a checkpoint, in the order they were made."""

    path: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True if all checks passed."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "checks": [
                {
                    "name": check.name,
                    "ok": check.ok,
                    "detail": check.detail,
                    "problems": list(check.problems),
                }
                for check in self.checks
            ],
        }

    def text(self) -> str:
        """For people: one line per check, then its problems."""
        lines = []
        for check in self.checks:
            lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<10}  {check.detail}")
            lines += [f"        {problem}" for problem in check.problems[:_SHOWN]]
            if len(check.problems) > _SHOWN:
                lines.append(f"        and {len(check.problems) - _SHOWN} more")
        lines.append(f"{self.path}: {'all checks passed' if self.ok else 'verification FAILED'}")
        return "\n".join(lines)


def verify(
    out: str | Path,
    *,
    against: object = None,
    runtime: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> VerifyResult:
    """All checks of the checkpoint at `out`; `against` is its source: path, Hub name or live model.

    `runtime` names a program (transformers, vllm) that is asked to load and run it too.  What is
    wrong with `out` is in the result.  Raises CheckpointError if `out` is no directory, `against`
    cannot be opened, or the runtime is not installed or cannot load `out`.
    """
    path = Path(out)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give the output of quantkit quantize")
    reference: Source | None = None
    if against is not None:
        reference = _open_original(against, revision, trust_remote_code)
    problems = verify_manifest(path)
    checks = [Check(name="files", detail="manifest: size and sha256", problems=tuple(problems))]
    opened = _open(path, checks)
    if opened is not None:
        checks += [_coverage(opened), *_numbers(opened, reference)]
        if runtime is not None and all(check.ok for check in checks):
            checks.append(_runtime(path, runtime))
    return VerifyResult(path=path, checks=tuple(checks))


def _open_original(against: object, revision: str | None, trust_remote_code: bool) -> Source:
    """The source as `quantize` saw it: decoded if it was quantized, its experts one by one."""
    source = open_source(against, revision=revision, trust_remote_code=trust_remote_code)
    if isinstance(source.config.get("quantization_config"), dict):
        source = Unpacked.open(source, trust_remote_code=trust_remote_code)
    return split_experts(source, trust_remote_code=trust_remote_code)


def _runtime(path: Path, runtime: str) -> Check:
    found = compare_runtime(path, runtime)
    return Check(
        name="runtime",
        detail=f"{found.runtime} {found.version}: {found.agreed} of {found.tokens} greedy tokens "
        f"are quantkit's own, worst gap {found.worst_gap:.3f}",
        problems=found.problems,
    )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the report says about one tensor of the source."""

    name: str
    fate: str
    scheme: str | None
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    output: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A checkpoint whose headers, configuration and report could be read."""

    source: FileSource
    format: FormatReader
    stored: Mapping[str, StoredWeight]
    entries: tuple[Entry, ...]
    unties_head: bool
    vectors: Vectors


def read_entries(report: Mapping[str, Any]) -> tuple[Entry, ...]:
    """The report's tensors.  Raises CheckpointError if they have another form."""
    try:
        found = tuple(
            Entry(
                name=str(tensor["name"]),
                fate=str(tensor["fate"]),
                scheme=None if tensor["scheme"] is None else str(tensor["scheme"]),
                shape=tuple(int(size) for size in tensor["shape"]),
                dtype=str(tensor["dtype"]),
                num_bytes=int(tensor["bytes"]),
                output=tuple(str(name) for name in tensor["output"]),
            )
            for tensor in report["tensors"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{REPORT}: its tensors cannot be read ({error!r})") from error
    if unknown := [entry for entry in found if entry.fate not in FATES]:
        raise CheckpointError(f"{REPORT}: {unknown[0].name}: unknown fate {unknown[0].fate!r}")
    return found


def _open(path: Path, checks: list[Check]) -> _Opened | None:
    """The checkpoint, or None after adding the check that says why it cannot be read."""
    try:
        source = FileSource(path)
        fmt = format_of(source)
        stored = fmt.weights(source)
        report = _report(path)
        opened = _Opened(
            source=source,
            format=fmt,
            stored=stored,
            entries=read_entries(report),
            unties_head=bool(report.get("unties_head", False)),
            vectors=Vectors(_read_folds(path / FOLDS_FILE)),
        )
    except QuantkitError as error:
        checks.append(Check(name="headers", detail="cannot be read", problems=(str(error),)))
        return None
    detail = f"{fmt.name}: {len(source.names())} tensors, {len(stored)} quantized weights"
    checks.append(Check(name="headers", detail=detail))
    return opened


def _report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads((path / REPORT).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / REPORT}: cannot be read ({error})") from error
    if not isinstance(report, dict):
        raise CheckpointError(f"{path / REPORT}: no JSON object")
    return report


def _coverage(opened: _Opened) -> Check:
    """Every tensor in the files belongs to one entry of the report, as the report says."""
    source, stored = opened.source, opened.stored
    names = set(source.names())
    problems: list[str] = []
    claimed: dict[str, str] = {}
    for entry in opened.entries:
        for name in entry.output:
            if name in claimed:
                problems.append(f"{name}: claimed by {claimed[name]} and by {entry.name}")
            claimed[name] = entry.name
        missing = [name for name in entry.output if name not in names]
        if missing:
            problems.append(f"{entry.name}: {entry.fate}, but {missing[0]} is not in the files")
        else:
            problems += _entry_problems(entry, source, stored.get(entry.name))
    for name in sorted(set(stored) - {entry.name for entry in opened.entries}):
        if not opened.unties_head:
            problems.append(f"{name}: quantized, but not in the report")
        claimed.update(dict.fromkeys(stored[name].tensors, name))
    problems += [f"{name}: in no entry of the report" for name in sorted(names - set(claimed))]
    counts = {fate: sum(entry.fate == fate for entry in opened.entries) for fate in FATES}
    detail = ", ".join(f"{count} {fate}" for fate, count in counts.items() if count)
    return Check(name="coverage", detail=detail, problems=tuple(problems))


def _entry_problems(entry: Entry, source: FileSource, weight: StoredWeight | None) -> Iterator[str]:
    """What is wrong with a tensor whose files are all there."""
    stored_bytes = sum(source.info(name).nbytes for name in entry.output)
    if stored_bytes != entry.num_bytes:
        yield f"{entry.name}: {stored_bytes} bytes stored, the report says {entry.num_bytes}"
    if entry.fate != "quantized":
        if weight is not None:
            yield f"{entry.name}: quantized in the files, {entry.fate} in the report"
            return
        info = source.info(entry.name)
        dtype = str(info.dtype).removeprefix("torch.")
        if (info.shape, dtype) != (entry.shape, entry.dtype):
            yield (
                f"{entry.name}: {dtype} {list(info.shape)} stored, the report says {entry.dtype} "
                f"{list(entry.shape)}"
            )
        return
    if weight is None:
        yield f"{entry.name}: not quantized in the files, though the report says so"
        return
    if weight.scheme.name != entry.scheme:
        yield f"{entry.name}: stored as {weight.scheme.name}, the report says {entry.scheme}"
    if entry.shape not in (weight.shape, weight.shape[::-1]):
        yield f"{entry.name}: stored as {weight.shape}, the report says {entry.shape}"
    if sorted(weight.tensors) != sorted(entry.output):
        yield f"{entry.name}: stored in {weight.tensors}, the report says {entry.output}"


@dataclass(kw_only=True)
class _Tally:
    """What the pass over all weights has found so far."""

    numbers: list[str] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    worst: float = 0.0
    worst_name: str = ""


def _numbers(opened: _Opened, reference: Source | None) -> Iterator[Check]:
    """One pass over all weights: what they hold, and how they compare with the source."""
    tally = _Tally()
    for name, weight in opened.stored.items():
        try:
            tensor = opened.format.unpack(weight, opened.source)
        except CheckpointError as error:
            tally.numbers.append(str(error))
            continue
        tally.numbers += _value_problems(name, tensor)
        if reference is not None:
            _compare_weight(opened, reference, name, tensor, tally)
    kept = [entry for entry in opened.entries if entry.fate != "quantized"]
    present = set(opened.source.names()) - set(opened.stored)
    for entry in kept:
        if entry.name in present and entry.fate != "copied":
            tally.numbers += _finite_problems(entry.name, opened.source)
    yield Check(
        name="numbers",
        detail=f"scales and codes of {len(opened.stored)} weights; {len(kept)} other tensors",
        problems=tuple(tally.numbers),
    )
    if reference is None:
        return
    tally.source += _name_problems(opened, reference)
    theirs = set(reference.names())
    for entry in kept:
        if entry.name in present and entry.name in theirs:
            if entry.fate == "rescaled":
                vectors = opened.vectors
                found = compare_rescaled(entry.name, opened.source, reference, vectors)
            else:
                found = compare_copied(entry.name, opened.source, reference)
            tally.source += found
    yield Check(
        name="source",
        detail=f"largest relative error of a weight {tally.worst:.4f} ({tally.worst_name})",
        problems=tuple(tally.source),
    )


def _value_problems(name: str, tensor: QuantizedTensor) -> Iterator[str]:
    """Scales that are not finite, codes or zeros outside the scheme's range."""
    try:
        tensor.check(name)
    except NumericsError as error:
        yield str(error)
    grid = grid_of(tensor.scheme)
    if not isinstance(grid, IntegerGrid) or not tensor.codes.numel():
        return
    if int(tensor.codes.min()) < grid.low:
        yield f"{name}: a code below {grid.low}, the lowest that {tensor.scheme.name} has"
    if tensor.zero is not None and int(tensor.zero.max()) > grid.high:
        yield f"{name}: a zero above {grid.high}"
    if not bool(tensor.scale.values().all()):
        yield f"{name}: a scale is zero"


def _finite_problems(name: str, source: Source) -> Iterator[str]:
    info = source.info(name)
    if not info.dtype.is_floating_point or info.dtype.itemsize == 1:
        return
    step = 4 * 2**20
    for start in range(0, info.numel, step):
        piece = source.read_flat(name, start, min(start + step, info.numel))
        if not all(bool(edge.isfinite()) for edge in torch.aminmax(piece)):
            yield f"{name}: holds NaN or infinity"
            return


def _compare_weight(
    opened: _Opened, reference: Source, name: str, tensor: QuantizedTensor, tally: _Tally
) -> None:
    original = _original_name(name, tensor, reference)
    if original is None:
        tally.source.append(f"{name}: the source has no such weight")
        return
    error, problems = compare_quantized(name, original, tensor, reference, opened.vectors)
    tally.source += problems
    if error > tally.worst:
        tally.worst, tally.worst_name = error, name


def _original_name(name: str, tensor: QuantizedTensor, reference: Source) -> str | None:
    """The source's name for a weight; of a head that was untied, the embedding's."""
    names = reference.names()
    if name in names:
        return name
    alike = [other for other in names if reference.info(other).shape == tensor.shape]
    return alike[0] if len(alike) == 1 else None


def _name_problems(opened: _Opened, reference: Source) -> Iterator[str]:
    """Tensors that only the source or only the report has; a head that was untied is new."""
    ours = {
        entry.name
        for entry in opened.entries
        if not (opened.unties_head and entry.name in opened.stored)
    }
    theirs = set(reference.names())
    ours |= theirs.intersection(opened.stored)
    for name in sorted(theirs - ours):
        yield f"{name}: in the source, but the report gives it no fate"
    for name in sorted(ours - theirs):
        yield f"{name}: in the report, but not in the source"


def _read_folds(path: Path) -> dict[str, torch.Tensor]:
    """All fold vectors; none if nothing was folded."""
    if not path.is_file():
        return {}
    found = {}
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for stored in read_header(path):
            buffer = torch.empty(stored.info.shape, dtype=stored.info.dtype)
            if read_into(descriptor, buffer, stored.offset) < buffer.nbytes:
                raise CheckpointError(f"{path}: the file was cut short")
            found[stored.info.name] = buffer
    finally:
        os.close(descriptor)
    return found
