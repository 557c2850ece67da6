"""A quantized checkpoint written in another format: the same codes, scales and zeros.

source --unpack--> QuantizedTensor --represent--> --pack--> OUT.partial --> manifest --> OUT
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from quantkit.checkpoint.door import given_path
from quantkit.checkpoint.memory import release_free_memory
from quantkit.checkpoint.output import OutputDirectory, OutputState, refuse_unfinished
from quantkit.checkpoint.record import EXPORT_OF, read_report
from quantkit.checkpoint.shards import TensorWriter
from quantkit.checkpoint.sidefiles import left_lines, side_record
from quantkit.checkpoint.source import Source
from quantkit.checkpoint.version import __version__
from quantkit.checks.verify import refuse_unsound
from quantkit.errors import FormatError, NumericsError
from quantkit.formats.format import BuiltFormat, Format, WholeFormat
from quantkit.formats.open import open_source
from quantkit.formats.registry import code_of, make_format
from quantkit.methods.recipe import load_recipe
from quantkit.model.causal import CausalModel
from quantkit.model.decoded import Unpacked
from quantkit.model.fold_vectors import copy_folds
from quantkit.model.rotations.rotated import keep_rotation
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import QuantizedTensor
from quantkit.pipeline.finish import write_finished_files
from quantkit.pipeline.plan import Plan, TensorFate, lay_out, open_container
from quantkit.pipeline.report import build_report

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Where the result is, and what was rounded: (weight, what) for each that was.

    left      files of the folder that do not travel, and why
    written   false if the very same export had completed before
    """

    out: Path
    format: str
    num_bytes: int
    weights: int
    rounded: tuple[tuple[str, str], ...]
    readers: Mapping[str, str | None]
    notes: tuple[str, ...]
    left: Mapping[str, str]
    written: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "out": str(self.out),
            "written": self.written,
            "format": self.format,
            "bytes": self.num_bytes,
            "weights": self.weights,
            "exact": self.weights - len(self.rounded),
            "rounded": dict(self.rounded),
            "readers": dict(self.readers),
            "notes": list(self.notes),
            "left": dict(self.left),
        }

    def text(self) -> str:
        """For people."""
        exact = self.weights - len(self.rounded)
        lines = [f"{self.out}: {self.format}, {exact} of {self.weights} weights exactly as stored"]
        lines += [f"rounded    {name}: {what}" for name, what in self.rounded[:_SHOWN]]
        if len(self.rounded) > _SHOWN:
            lines.append(f"           and {len(self.rounded) - _SHOWN} more")
        for runtime, reason in self.readers.items():
            lines.append(f"{runtime:<20} {'reads it' if reason is None else 'no: ' + reason}")
        lines += [f"note       {note}" for note in self.notes]
        lines += left_lines(self.left)
        return "\n".join(lines)


def export(
    path: str | Path,
    out: str | Path,
    *,
    format_name: str,
    allow_rounding: bool = False,
    allow_unreadable: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    trust_remote_code: bool = False,
    progress: bool = True,
    fresh: bool = False,
) -> Exported:
    """Writes the checkpoint at `path`, ours or another tool's, to `out` in another format.

    Nothing is quantized anew; gguf takes a model that is not quantized too.  Goes on where a
    killed run stopped, unless `fresh`, which replaces a complete `out` too.  Raises FormatError if
    the format cannot hold a weight, or, before anything is written and unless `allow_rounding`, if
    a number would have to be rounded.
    """
    path = given_path(path)
    refuse_unfinished(path)
    source = open_source(path)
    fmt = make_format(format_name)
    if isinstance(fmt, BuiltFormat):
        raise FormatError(f"{fmt.name}: {fmt.built_by} makes its files: see export_onnx")
    whole = isinstance(fmt, WholeFormat)
    if whole and "quantization_config" not in source.config:
        view = Unpacked(source, None, {})
    else:
        view = Unpacked.open(source, trust_remote_code=trust_remote_code)
    model = CausalModel.open(view, trust_remote_code=trust_remote_code)
    report = read_report(path)
    plan = _plan(model, view, report, fmt, max_shard_bytes, allow_unreadable)
    _check_permuted(view, plan)
    rounded = tuple(_rounded(view, plan, progress))
    if rounded and not allow_rounding:
        listed = "; ".join(f"{name}: {what}" for name, what in rounded[:_SHOWN])
        raise FormatError(
            f"{plan.format.name} cannot hold {len(rounded)} of {len(view.stored)} weights exactly "
            f"({listed}); pass --allow-rounding to round them, or choose another --format"
        )
    fingerprint = {
        EXPORT_OF: source.fingerprint(),
        "side files": source.fingerprint_beside(),
        "format": f"{plan.format.name} {code_of(plan.format)}".rstrip(),
        "allow rounding": str(allow_rounding),
        "max shard bytes": str(max_shard_bytes),
        "trust_remote_code": str(trust_remote_code),
        "quantkit version": __version__,
    }

    def exported(output: OutputDirectory, *, written: bool) -> Exported:
        return Exported(
            out=output.out,
            format=plan.format.name,
            num_bytes=plan.layout.num_bytes,
            weights=len(view.stored),
            rounded=rounded,
            readers=plan.readers,
            notes=plan.notes,
            left=side_record(model.source, plan.format.name, plan.layout).left,
            written=written,
        )

    with OutputDirectory(out) as output:
        if output.state is OutputState.COMPLETE and not fresh:
            output.check_complete(fingerprint)
            return exported(output, written=False)
        journal = output.begin(fingerprint, fresh=fresh)
        done = {str(entry["step"]) for entry in journal.records()}
        steps = plan.fates_of_block
        committed = [
            info.name
            for block, fates in steps.items()
            if str(block) in done
            for fate in fates
            for info in fate.output
        ]
        with (
            plan.layout.writer(output.partial, committed=committed) as writer,
            tqdm(total=len(steps), unit="step", disable=None if progress else True) as bar,
        ):
            for block, fates in steps.items():
                if str(block) not in done:
                    for fate in fates:
                        _write(writer, model.source, view, plan, fate)
                    writer.sync()
                    journal.append({"step": str(block)})
                    release_free_memory()
                bar.update()
            writer.close()
        _finish(output.partial, path, model, plan, report, fingerprint, dict(rounded))
        output.finish(refuse_unsound)
        return exported(output, written=True)


def _plan(
    model: CausalModel,
    view: Unpacked,
    report: Mapping[str, Any],
    fmt: Format,
    max_shard_bytes: int,
    allow_unreadable: bool,
) -> Plan:
    """The plan that gives every weight the scheme it is stored in."""
    container = open_container(model, fmt)
    schemes = {name: _scheme_in(fmt, name, weight.scheme) for name, weight in view.stored.items()}
    decisions: dict[str, tuple[Scheme | None, str]] = {
        name: (scheme, "as stored") for name, scheme in schemes.items()
    }
    if not decisions and container is None:
        raise FormatError("no weight of the checkpoint is quantized; there is nothing to export")
    recipe = dataclasses.replace(load_recipe("rtn"), method=str(report.get("method", "unknown")))
    if schemes:
        (scheme, _), *_ = Counter(schemes.values()).most_common()
        recipe = dataclasses.replace(recipe, scheme=scheme)
    plan = lay_out(
        model,
        recipe,
        decisions,
        fmt=fmt,
        container=container,
        plain=not decisions,
        max_shard_bytes=max_shard_bytes,
        allow_unreadable=allow_unreadable,
    )
    planned = {weight.name for weight in plan.weights if weight.scheme is not None}
    if lost := sorted(set(view.stored) - planned):
        raise FormatError(
            f"{lost[0]}: it is quantized, but is no weight that a block or the head multiplies by"
        )
    # What transforms had changed is so still; `verify --against` must know.
    earlier = {str(t.get("name")): t for t in report.get("tensors") or ()}
    fates = tuple(
        dataclasses.replace(fate, fate="rescaled", reason=str(earlier[fate.name].get("reason")))
        if fate.fate == "kept" and earlier.get(fate.name, {}).get("fate") == "rescaled"
        else fate
        for fate in plan.fates
    )
    notes = plan.notes
    if (cache := view.cache_scheme()) is not None:
        notes += (f"scales of the cache of keys and values ({cache.name}) are left out",)
    untied = bool(report.get("unties_head"))
    return dataclasses.replace(plan, fates=fates, notes=notes, unties_head=untied)


def _scheme_in(fmt: Format, name: str, scheme: Scheme) -> Scheme:
    """The scheme that holds a weight's codes in the format; FormatError if it has none."""
    if not isinstance(fmt, WholeFormat):
        return scheme
    found = fmt.stored_as(scheme)
    if isinstance(found, str):
        raise FormatError(f"{name}: {scheme.name} cannot be {fmt.name}: {found}")
    return found


def _check_permuted(view: Unpacked, plan: Plan) -> None:
    for name, weight in view.stored.items():
        if weight.permuted and not plan.format.holds_permuted:
            raise FormatError(
                f"{name}: its columns are permuted (activation order), which {plan.format.name} "
                "does not hold; formats that can: gptq, gptq_v2"
            )


def _rounded(view: Unpacked, plan: Plan, progress: bool) -> list[tuple[str, str]]:
    """(weight, what would be rounded), found by going through all weights once."""
    found = []
    for name in tqdm(view.stored, desc="check", unit="weight", disable=None if progress else True):
        _, what = _represented(view, plan, name)
        if what is not None:
            found.append((name, what))
    return found


def _write(
    writer: TensorWriter, source: Source, view: Unpacked, plan: Plan, fate: TensorFate
) -> None:
    if fate.fate != "quantized":
        for info in fate.output:
            writer.copy(info.name, source, fate.name)
        return
    tensor, _ = _represented(view, plan, fate.name)
    for name, packed in plan.format.pack(plan.weight_of[fate.name], tensor).items():
        writer.put(name, packed)


def _represented(view: Unpacked, plan: Plan, name: str) -> tuple[QuantizedTensor, str | None]:
    try:
        return plan.format.represent(view.tensor(name))
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from error


def _finish(
    partial: Path,
    path: Path,
    model: CausalModel,
    plan: Plan,
    report: Mapping[str, Any],
    fingerprint: Mapping[str, str],
    rounded: Mapping[str, str],
) -> None:
    """Writes the files around the weights; what the source's report told of them is kept."""
    provenance = {**(report.get("fingerprint") or {}), **fingerprint}
    fresh = build_report(plan, None, [], provenance)
    degraded = dict(report.get("degraded") or {})
    for name, what in rounded.items():
        degraded[name] = f"{degraded[name]}; {what}" if name in degraded else what
    told = ["calibration", "folded", "weights"]
    if not any(plan.format.scale_dtype(fate.dtype) == torch.float16 for fate in plan.fates):
        told.append("notes")
    kept = {key: report[key] for key in told if report.get(key) is not None}
    write_finished_files(
        partial,
        model=model,
        plan=plan,
        report={**fresh, **kept, "degraded": degraded, "recipe": report.get("recipe")},
        recipe=report.get("recipe"),
        run={},
    )
    copy_folds(model.source.home, partial)
    keep_rotation(model.source, partial)
