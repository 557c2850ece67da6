"""What the command line prints about a plan and about a finished run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.checkpoint.door import RECORD_BYTES, read_json
from quantkit.checkpoint.manifest import RUN
from quantkit.checkpoint.memory import format_size, machine_bytes, with_spare
from quantkit.checkpoint.record import read_report
from quantkit.checkpoint.sidefiles import SideRecord, left_lines, side_record
from quantkit.formats.format import BuiltFormat
from quantkit.methods.rules import ROLES
from quantkit.model.probes.roles import purposes_of
from quantkit.pipeline.session import Job, Outcome

# Kinds of degraded weights that are told one by one.
_SHOWN = 10


def plan_json(job: Job) -> dict[str, Any]:
    """The plan as JSON values."""
    plan, need = job.plan, job.prediction
    return {
        "method": plan.recipe.method,
        "scheme": plan.recipe.scheme.name,
        "fitted": plan.fitted,
        **({} if job.budget is None else {"budget": job.budget.reported(plan)}),
        **({"roles": [list(row) for row in table]} if (table := _roles(job)) else {}),
        "format": plan.format.name,
        "readers": dict(plan.readers),
        "notes": list(plan.notes),
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "bits_per_quantized_weight": round(plan.bits_per_quantized_weight, 4),
        "output_bytes": plan.layout.num_bytes,
        "predicted": {
            "peak_ram_bytes": need.peak(job.max_ram),
            "smallest_max_ram_bytes": with_spare(need.smallest),
            "disk_bytes": need.disk,
            "seconds": round(need.seconds, 1),
            "note": need.note,
            **_on_gpu(job),
            "machine": {
                "processes": need.here,
                "of": job.world.size,
                "peak_ram_bytes": need.here * need.peak(job.max_ram),
                "max_ram_bytes": None if job.max_ram is None else need.here * job.max_ram,
                "ram_bytes": machine_bytes(),
                "note": need.machine_note(job.max_ram),
            },
        },
        "calibration": None if job.calibration is None else job.calibration.record.to_dict(),
        "tensors": [
            {
                "name": fate.name,
                "fate": fate.fate,
                "scheme": None if fate.scheme is None else fate.scheme.name,
                "reason": fate.reason,
                "shape": list(fate.shape),
                "bytes": fate.num_bytes,
            }
            for fate in plan.fates
        ],
        "side_files": beside(job).to_dict(),
    }


def plan_text(job: Job) -> str:
    """The plan for people: every tensor's fate, then the totals."""
    plan, need = job.plan, job.prediction
    rows = [("tensor", "fate", "scheme", "size", "reason")]
    for fate in plan.fates:
        scheme = "" if fate.scheme is None else fate.scheme.name
        rows.append((fate.name, fate.fate, scheme, format_size(fate.num_bytes), fate.reason))
    lines = [*columns(rows), ""]
    if table := _roles(job):
        lines += [*columns([("role", "weights", "scheme"), *table]), ""]
    lines += [*_totals(job), *left_lines(beside(job).left)]
    lines.append(f"peak RAM   {format_size(need.peak(job.max_ram))} predicted{_for_each(job)}")
    for size in _on_gpu(job).values():
        lines.append(f"peak VRAM  {format_size(size)} predicted on each GPU")
    lines.append(f"disk       {format_size(need.disk)}")
    lines.append(f"time       about {_duration(need.seconds)}")
    for note in (need.note, need.machine_note(job.max_ram)):
        if note is not None:
            lines.append(f"note: {note}")
    return "\n".join(lines)


def _roles(job: Job) -> list[tuple[str, str, str]]:
    """(role, how many weights, their schemes) where the recipe has rules by role, else nothing."""
    plan, model = job.plan, job.model
    if all(rule.role is None for rule in plan.recipe.rules):
        return []
    found: dict[str, Counter[str]] = {}
    schemes = {weight.name: weight.scheme for weight in plan.weights}
    if model.head is not None:
        schemes[model.head.name] = plan.planned_head.scheme
    for name, role in purposes_of(model).items():
        scheme = schemes.get(name)
        found.setdefault(role, Counter())["kept" if scheme is None else scheme.name] += 1
    return [
        (
            role,
            str(found[role].total()),
            ", ".join(
                name if len(found[role]) == 1 else f"{name} ({count})"
                for name, count in found[role].most_common()
            ),
        )
        for role in ROLES
        if role in found
    ]


def _on_gpu(job: Job) -> dict[str, int]:
    """What a process needs of its GPU; empty where it has none."""
    if not job.device.startswith("cuda"):
        return {}
    return {"peak_vram_bytes": job.prediction.peak_vram(job.max_vram)}


def _for_each(job: Job) -> str:
    """What several processes need together, of people's interest."""
    need = job.prediction
    if job.world.size == 1:
        return ""
    together = format_size(need.here * need.peak(job.max_ram))
    if need.here == job.world.size:
        return f" for each of {need.here} processes, {together} together"
    return f" for each of {job.world.size} processes, {together} for the {need.here} of a machine"


def outcome_json(job: Job, outcome: Outcome) -> dict[str, Any]:
    """The final summary as JSON values."""
    report = read_report(outcome.out)
    told = ["method", "scheme", "format", "size", "readers", "notes", "degraded", "side_files"]
    if job.budget is not None:
        told.append("budget")
    return {
        "out": str(outcome.out),
        "written": outcome.written,
        **{key: report.get(key) for key in told},
        "run": read_json(outcome.out / RUN, largest=RECORD_BYTES),
    }


def outcome_text(job: Job, outcome: Outcome) -> str:
    """The final summary for people."""
    if not outcome.written:
        return f"{outcome.out}: already complete, made by this very command; nothing to do"
    run = read_json(outcome.out / RUN, largest=RECORD_BYTES)
    report = read_report(outcome.out)
    lines = [f"{outcome.out}: complete in {_duration(outcome.seconds)}", *_totals(job)]
    if isinstance(job.plan.format, BuiltFormat):
        size = format_size(sum(path.stat().st_size for path in _files(outcome.out)))
        lines.append(f"files      {size}, as other tensors are float32 in what is built")
    peak, predicted = run["peak_rss_bytes"], run["predicted_peak_bytes"]
    each = f", each of {run['processes']} processes at most" if run["processes"] > 1 else ""
    lines.append(f"peak RAM   {format_size(peak)} ({format_size(predicted)} predicted){each}")
    lines += [f"note: {note}" for note in report["notes"] if note not in job.plan.notes]
    lines += left_lines(beside(job).left)
    lines += degraded_lines(report["degraded"])
    lines.append(f"report     {outcome.out / 'quantkit' / 'report.html'}")
    return "\n".join(lines)


def degraded_lines(degraded: Mapping[str, str]) -> list[str]:
    """What was handled otherwise, for people: a line for all of a kind that say the same."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, note in degraded.items():
        alike.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), note), []).append(name)
    lines = []
    for (pattern, note), names in list(alike.items())[:_SHOWN]:
        shown = names[0] if len(names) == 1 else f"{len(names)} weights {pattern}"
        lines.append(f"degraded   {shown}: {note}")
    if len(alike) > _SHOWN:
        rest = sum(map(len, list(alike.values())[_SHOWN:]))
        lines.append(f"           and {rest} more weights, see the report")
    return lines


def _files(out: Path) -> Iterator[Path]:
    """What was built, without the pages about it."""
    return (path for path in out.iterdir() if path.is_file())


def beside(job: Job) -> SideRecord:
    """The files beside the weights: what travels, and what does not."""
    return side_record(job.model.source, job.plan.format.name, job.plan.layout)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned text, the last column ragged."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _totals(job: Job) -> list[str]:
    plan = job.plan
    source = sum(fate.source_bytes for fate in plan.fates)
    lines = [
        f"method     {plan.recipe.method}, {plan.recipe.scheme.name}, as {plan.format.name}",
        f"size       {format_size(plan.layout.num_bytes)}, was {format_size(source)}: "
        f"{source / plan.layout.num_bytes:.2f}x smaller",
        f"bits       {plan.bits_per_weight:.3f} per weight, "
        f"{plan.bits_per_quantized_weight:.3f} among the quantized",
    ]
    if job.budget is not None:
        lines.append(f"budget     {job.budget.line(plan)}")
    if plan.fitted is not None:
        lines.append(f"groups     {plan.fitted}")
    for runtime, reason in plan.readers.items():
        lines.append(f"{runtime:<20} {'reads it' if reason is None else 'no: ' + reason}")
    if job.calibration is not None:
        record = job.calibration.record
        lines.append(f"calibrated on {record.source}: {record.samples} x {record.seq_len} tokens")
        lines.extend(f"note: {note}" for note in record.notes)
    lines += [f"note: {note}" for note in plan.notes]
    if plan.unties_head:
        lines.append("note: the output head was tied to the embedding and is stored apart now")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
