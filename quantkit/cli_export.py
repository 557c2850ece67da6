"""The `export` command; quantkit/cli.py registers it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def export(
    path: Annotated[Path, typer.Argument(help="Directory of a quantized checkpoint.")],
    format_name: Annotated[str, typer.Option("--format", help="See `quantkit formats`.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    allow_rounding: Annotated[
        bool, typer.Option("--allow-rounding", help="Round what the format cannot hold exactly.")
    ] = False,
    allow_unreadable: Annotated[
        bool, typer.Option("--allow-unreadable", help="Write what no known runtime reads.")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Largest weight file.")
    ] = "5GB",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.")
    ] = False,
) -> None:
    """Write a quantized checkpoint in another format, without quantizing anew."""
    from quantkit.budget import parse_size
    from quantkit.export import export as export_checkpoint

    done = export_checkpoint(
        path,
        out,
        format_name=format_name,
        allow_rounding=allow_rounding,
        allow_unreadable=allow_unreadable,
        max_shard_bytes=parse_size(max_shard_size),
        trust_remote_code=trust_remote_code,
    )
    typer.echo(json.dumps(done.to_dict(), indent=2) if as_json else done.text())
