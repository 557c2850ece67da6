"""The `export` command; quantkit/cli/app.py registers it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.checkpoint.door import given_path
from quantkit.errors import OutputError
from quantkit.formats.open import open_source
from quantkit.formats.registry import make_format

if TYPE_CHECKING:
    from quantkit.pipeline.export import Exported

# Options that only some formats have a use for; "" stands for all formats of safetensors.
_TAKEN = {
    "allow_rounding": ("gguf", ""),
    "allow_unreadable": ("",),
    "max_shard_size": ("",),
    "accuracy_level": ("onnx",),
    "triton_repository": ("onnx",),
    "trust_remote_code": ("onnx", "gguf", ""),
}


def export(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="Directory of a quantized checkpoint.")],
    format_name: Annotated[
        str, typer.Option("--format", help="See `quantkit formats`; or gguf, onnx.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Directory to write.")] = None,
    allow_rounding: Annotated[
        bool, typer.Option("--allow-rounding", help="Round what the format cannot hold exactly.")
    ] = False,
    allow_unreadable: Annotated[
        bool, typer.Option("--allow-unreadable", help="Write what no known runtime reads.")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Largest weight file.")
    ] = "5GB",
    accuracy_level: Annotated[
        int, typer.Option("--accuracy-level", help="onnx: 4 = int8 activations, 1 = float32.")
    ] = 4,
    triton_repository: Annotated[
        Path | None,
        typer.Option(
            "--triton-repository",
            help="onnx, instead of --out: write a model into this Triton Inference Server "
            "repository, under the checkpoint's name.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; replaces a complete directory.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.")
    ] = False,
) -> None:
    """Write a quantized checkpoint in another format, without quantizing anew."""
    _check_options(context, format_name)
    target = _target(path, format_name, out, triton_repository)
    # What is wrong with the names shows before torch is imported.
    open_source(path)
    make_format(format_name)
    if format_name == "onnx":
        from quantkit.pipeline.onnx_export import export_onnx

        done: Exported = export_onnx(
            path,
            target,
            accuracy_level=accuracy_level,
            triton=triton_repository is not None,
            trust_remote_code=trust_remote_code,
            fresh=fresh,
        )
    else:
        from quantkit.checkpoint.memory import parse_size
        from quantkit.pipeline.export import export as export_checkpoint

        done = export_checkpoint(
            path,
            target,
            format_name=format_name,
            allow_rounding=allow_rounding,
            allow_unreadable=allow_unreadable,
            max_shard_bytes=parse_size(max_shard_size),
            trust_remote_code=trust_remote_code,
            fresh=fresh,
        )
    typer.echo(json.dumps(done.to_dict(), indent=2) if as_json else done.text())


def _check_options(context: typer.Context, format_name: str) -> None:
    """OutputError naming an option that was given and that the format would not heed."""
    kind = format_name if format_name in ("gguf", "onnx") else ""
    for name, kinds in _TAKEN.items():
        source = context.get_parameter_source(name)
        if kind not in kinds and source is not None and source.name == "COMMANDLINE":
            able = " or ".join(found or "a format of safetensors" for found in kinds)
            raise OutputError(
                f"--{name.replace('_', '-')} goes with --format {able}, not {format_name}, where "
                "it would change nothing; leave it out"
            )


def _target(path: Path, format_name: str, out: Path | None, repository: Path | None) -> Path:
    """The directory to write.  OutputError unless exactly one place is given."""
    if out is not None and repository is None:
        return out
    if repository is not None and out is None:
        return repository / given_path(path).resolve().name
    raise OutputError("give either --out or, with --format onnx, --triton-repository")
