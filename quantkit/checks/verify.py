"""Whether a finished checkpoint is whole and holds what it should, read back from disk.

Works weight by weight: memory is bounded by the largest weight.
Letters: O out features, I in features, G groups per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.checkpoint.door import given_path
from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.manifest import verify_manifest
from quantkit.checkpoint.record import FATES, REPORT, read_report
from quantkit.checkpoint.source import Source
from quantkit.checks.against import (
    Vectors,
    compare_copied,
    compare_quantized,
    compare_rescaled,
    retargeted,
)
from quantkit.checks.result import (
    Check,
    VerifyResult,
    finite_problems,
    scale_problems,
    value_problems,
)
from quantkit.checks.runtimes import compare_runtime
from quantkit.checks.verify_container import check_files, container_checks
from quantkit.errors import CheckpointError, QuantkitError, UnsoundError
from quantkit.formats.format import FormatReader, StoredWeight
from quantkit.formats.open import container_here, container_of, open_source
from quantkit.formats.registry import format_of
from quantkit.model import skeleton
from quantkit.model.decoded import Unpacked
from quantkit.model.fold_vectors import folds_since
from quantkit.model.names import map_names
from quantkit.model.split_experts import split_experts
from quantkit.model.views import converted, under_owners
from quantkit.numbers.tensor import QuantizedTensor

# Problems that an error names.
_SHOWN = 3


def verify(
    out: str | Path,
    *,
    against: object = None,
    runtime: str | None = None,
    runtime_python: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> VerifyResult:
    """All checks of the checkpoint at `out`; `against` is its source: path, Hub name or live model.

    `out` is a directory, or a GGUF or ONNX file.  `runtime` names a program (transformers, vllm,
    llama.cpp, onnxruntime) that is asked to load and run it too, in `runtime_python`'s environment
    if it is not in this one.  What is wrong with `out` is in the result.  Raises CheckpointError
    if there is no `out`, `against` cannot be opened, or the runtime is not installed, does not
    read this kind of checkpoint or cannot load it.
    """
    path = given_path(out)
    file = container_here(path)
    reference: Source | None = None
    if against is not None:
        reference = open_source(against, revision=revision)
    if file is not None:
        files = check_files(path, file)
    else:
        problems = verify_manifest(path)
        files = Check(name="files", detail="manifest: size and sha256", problems=tuple(problems))
    checks = [files, *_contents(path, file, reference, trust_remote_code)]
    if runtime is not None and all(check.ok for check in checks):
        checks.append(_runtime(path, runtime, runtime_python))
    return VerifyResult(path=path, checks=tuple(checks))


def refuse_unsound(partial: Path) -> None:
    """Nothing if an output that is about to be finished passes all checks that need no other model.

    Only the manifest is not looked at, which comes after.  Reads everything once, a weight at a
    time.  Raises UnsoundError that names what is wrong.
    """
    checks = _contents(partial, container_of(partial), None, False)
    problems = [problem for check in checks for problem in check.problems]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UnsoundError(
            f"{partial}: not finished, because `quantkit verify` would reject it: "
            f"{'; '.join(problems[:_SHOWN])}{more}. The disk may be faulty: run the same command "
            "with --fresh; if that says the same, this is a fault of quantkit's, please report it"
        )


def _contents(
    path: Path, file: Path | None, reference: Source | None, trust_remote_code: bool
) -> list[Check]:
    """All checks but that of the manifest; `file` is the container at `path`, if it is one."""
    if file is not None:
        return container_checks(file, reference, trust_remote_code=trust_remote_code)
    checks: list[Check] = []
    opened = _open(path, checks, None if reference is None else reference.home)
    if opened is not None:
        original = None
        if reference is not None:
            known = {entry.name for entry in opened.entries}
            original = _original(reference, known, trust_remote_code)
        checks += [_coverage(opened), *_numbers(opened, original)]
    return checks


def _original(source: Source, known: Set[str], trust_remote_code: bool) -> Source:
    """The source as `quantize` saw it: decoded if it was quantized, its experts one by one.

    Tied weights have their owners' names, unless the report knows them by those of the file.
    """
    if isinstance(source.config.get("quantization_config"), dict):
        source = Unpacked.open(source, trust_remote_code=trust_remote_code)
    source = split_experts(source, trust_remote_code=trust_remote_code)
    if known >= set(source.names()):
        return source
    model = skeleton.build(source, trust_remote_code=trust_remote_code, dtype=None)
    source = converted(source, model)
    return under_owners(source, model, map_names(model, source))


def _runtime(path: Path, runtime: str, python: Path | None) -> Check:
    found = compare_runtime(path, runtime, python=python)
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
            for tensor in report["tensors"] or ()
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{REPORT}: its tensors cannot be read ({error!r})") from error
    if unknown := [entry for entry in found if entry.fate not in FATES]:
        raise CheckpointError(f"{REPORT}: {unknown[0].name}: unknown fate {unknown[0].fate!r}")
    return found


def _open(path: Path, checks: list[Check], reference: Path | None) -> _Opened | None:
    """The checkpoint, or None after adding the check that says why it cannot be read.

    `reference` is where what it is compared with keeps its own folds.
    """
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
            vectors=Vectors(folds_since(path, reference), retargeted(report)),
        )
    except QuantkitError as error:
        checks.append(Check(name="headers", detail="cannot be read", problems=(str(error),)))
        return None
    detail = f"{fmt.name}: {len(source.names())} tensors, {len(stored)} quantized weights"
    checks.append(Check(name="headers", detail=detail))
    return opened


def _report(path: Path) -> dict[str, Any]:
    report = read_report(path)
    if not report:
        raise CheckpointError(f"{path / REPORT}: missing, or nothing in it")
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
        tally.numbers += value_problems(name, tensor)
        if reference is not None:
            _compare_weight(opened, reference, name, tensor, tally)
    kept = [entry for entry in opened.entries if entry.fate != "quantized"]
    present = set(opened.source.names()) - set(opened.stored)
    for entry in kept:
        if entry.name in present and entry.fate != "copied":
            tally.numbers += finite_problems(entry.name, opened.source)
        if entry.name in present and entry.fate == "added":
            tally.numbers += scale_problems(entry.name, opened.source)
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
            vectors = opened.vectors
            if entry.fate == "rescaled" or vectors.change(entry.name):
                found = compare_rescaled(entry.name, opened.source, reference, vectors)
            else:
                found = compare_copied(entry.name, opened.source, reference)
            tally.source += found
    yield Check(
        name="source",
        detail=f"largest relative error of a weight {tally.worst:.4f} ({tally.worst_name})",
        problems=tuple(tally.source),
    )


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
        if entry.fate != "added" and not (opened.unties_head and entry.name in opened.stored)
    }
    theirs = set(reference.names())
    ours |= theirs.intersection(opened.stored)
    for name in sorted(theirs - ours):
        yield f"{name}: in the source, but the report gives it no fate"
    for name in sorted(ours - theirs):
        yield f"{name}: in the report, but not in the source"
