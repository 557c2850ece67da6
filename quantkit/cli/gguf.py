"""`--format gguf` of `quantize` and `plan`: the options it takes, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from quantkit.errors import RecipeError

if TYPE_CHECKING:
    from quantkit.pipeline.gguf_job import GgufJob, GgufRequest

_UNMEASURED = (
    "reports are made of directories of safetensors; llama.cpp's own llama-perplexity "
    "--kl-divergence measures the finished file"
)
# Options of `quantize` and `plan` that gguf has no use for, and what to do instead.
_OTHERS = {
    "recipe": "its recipes are fixed and named by --scheme",
    "overrides": "its recipes are fixed and named by --scheme",
    "max_vram": "it is quantized on the CPU; --max-ram limits it",
    "trust_remote_code": "the families that gguf is written for are transformers' own",
    "allow_unreadable": "llama.cpp reads all that is written",
    "evaluate": _UNMEASURED,
    "fail_if": _UNMEASURED,
}


def quantize_to_gguf(model: str, out: Path, options: Mapping[str, Any]) -> None:
    """Runs it and prints the result.  Raises RecipeError for options that gguf does not take."""
    from quantkit.checkpoint.memory import return_large_blocks
    from quantkit.pipeline.gguf_job import prepare_gguf
    from quantkit.pipeline.gguf_quantize import run_gguf

    request = _request(options)
    if request.max_ram is not None:
        return_large_blocks()
    job = prepare_gguf(model, request)
    done = run_gguf(job, out, Path(model).resolve().name, fresh=options["fresh"])
    typer.echo(json.dumps(done.to_dict(), indent=2) if options["as_json"] else done.text())


def plan_gguf(model: str, options: Mapping[str, Any]) -> None:
    """Prints every tensor's fate and what the run needs; raises what `quantize` would."""
    from quantkit.pipeline.gguf_job import prepare_gguf

    job = prepare_gguf(model, _request(options))
    typer.echo(json.dumps(_plan_json(job), indent=2) if options["as_json"] else _plan_text(job))


def _request(options: Mapping[str, Any]) -> GgufRequest:
    from quantkit.checkpoint.memory import parse_size
    from quantkit.pipeline.gguf_job import GgufRequest

    for name, advice in _OTHERS.items():
        if options.get(name):
            shown = {"overrides": "set", "evaluate": "eval"}.get(name, name.replace("_", "-"))
            raise RecipeError(f"--{shown} is not taken with --format gguf: {advice}")
    if options["max_shard_size"] != "5GB":
        raise RecipeError("--max-shard-size is not taken with --format gguf: it writes one file")
    if options["device"] not in ("auto", "cpu"):
        raise RecipeError(f"--device {options['device']}: gguf files are quantized on the CPU")
    if options["scheme"] is None:
        raise RecipeError("--format gguf needs a --scheme such as q4_k_m or q8_0")
    return GgufRequest(
        scheme=options["scheme"],
        method=options["method"] or "gptq",
        calibration=options["calib"],
        samples=options["samples"] or 128,
        seq_len=options["seq_len"] or 2048,
        seed=options["seed"],
        revision=options["revision"],
        skip=tuple(options["skip"] or ()),
        head=options["lm_head"],
        max_ram=None if options["max_ram"] is None else parse_size(options["max_ram"]),
        requantize=options["requantize"],
    )


def _plan_json(job: GgufJob) -> dict[str, Any]:
    from quantkit.checkpoint.memory import with_spare

    need, limit = job.prediction, job.request.max_ram
    return {
        "method": job.request.method,
        "scheme": job.request.scheme,
        "format": "gguf",
        "architecture": job.family.architecture,
        "bits_per_weight": round(job.bits_per_weight(), 4),
        "bits_per_quantized_weight": round(job.bits_per_weight(quantized=True), 4),
        "output_bytes": job.num_bytes,
        "predicted": {
            "peak_ram_bytes": need.peak(limit),
            "smallest_max_ram_bytes": with_spare(need.smallest),
            "disk_bytes": need.disk,
            "seconds": round(need.seconds, 1),
        },
        "calibration": None if job.tokens is None else job.tokens.record.to_dict(),
        "notes": list(job.notes),
        "tensors": [
            {
                "name": fate.name,
                "fate": fate.fate,
                "type": fate.type,
                "reason": fate.reason,
                "shape": list(fate.shape),
                "bytes": fate.num_bytes,
                "sources": list(fate.sources),
            }
            for fate in job.fates
        ],
    }


def _plan_text(job: GgufJob) -> str:
    from quantkit.checkpoint.memory import format_size
    from quantkit.cli.summary import columns

    rows = [("tensor", "fate", "type", "size", "reason")]
    for fate in job.fates:
        rows.append((fate.name, fate.fate, fate.type, format_size(fate.num_bytes), fate.reason))
    source = sum(fate.source_bytes for fate in job.fates)
    need, architecture = job.prediction, job.family.architecture
    lines = [
        *columns(rows),
        "",
        f"method     {job.request.method}, {job.request.scheme}, as gguf ({architecture})",
        f"size       {format_size(job.num_bytes)}, was {format_size(source)}: "
        f"{source / job.num_bytes:.2f}x smaller",
        f"bits       {job.bits_per_weight():.3f} per weight, "
        f"{job.bits_per_weight(quantized=True):.3f} among the quantized",
    ]
    if job.tokens is not None:
        record = job.tokens.record
        lines.append(f"calibrated on {record.source}: {record.samples} x {record.seq_len} tokens")
        lines += [f"note: {note}" for note in record.notes]
    lines += [f"note: {note}" for note in job.notes]
    lines.append(f"peak RAM   {format_size(need.peak(job.request.max_ram))} predicted")
    lines.append(f"disk       {format_size(need.disk)}")
    lines.append(f"time       about {need.seconds:.0f} s")
    return "\n".join(lines)
