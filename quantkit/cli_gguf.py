"""`quantkit quantize --format gguf`: the options it takes, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from quantkit.errors import RecipeError

# Options of `quantize` that belong to recipes of safetensors formats.
_OTHERS = (
    "recipe",
    "overrides",
    "skip",
    "lm_head",
    "max_ram",
    "max_vram",
    "trust_remote_code",
    "allow_unreadable",
    "requantize",
)


def quantize_to_gguf(model: str, out: Path, options: Mapping[str, Any]) -> None:
    """Runs it and prints the result.  Raises RecipeError for options that gguf does not take."""
    from quantkit.gguf_quantize import quantize_gguf

    if options["evaluate"] or options["fail_if"]:
        raise RecipeError("--eval and --fail-if are not taken with --format gguf")
    given = [name for name in _OTHERS if options.get(name)]
    if options["max_shard_size"] != "5GB":
        given.append("max_shard_size")
    if given:
        raise RecipeError(
            f"--{given[0].replace('_', '-')} is not taken with --format gguf; its recipes are "
            "fixed, and it quantizes embeddings and head too"
        )
    if options["device"] not in ("auto", "cpu"):
        raise RecipeError(f"--device {options['device']}: gguf files are quantized on the CPU")
    if options["scheme"] is None:
        raise RecipeError("--format gguf needs a --scheme such as q4_k_m or q8_0")
    done = quantize_gguf(
        model,
        out,
        scheme=options["scheme"],
        method=options["method"] or "gptq",
        calibration=options["calib"],
        samples=options["samples"] or 128,
        seq_len=options["seq_len"] or 2048,
        seed=options["seed"],
        revision=options["revision"],
        fresh=options["fresh"],
    )
    typer.echo(json.dumps(done.to_dict(), indent=2) if options["as_json"] else done.text())
