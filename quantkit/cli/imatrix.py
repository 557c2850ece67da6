"""`quantkit imatrix`: what a model's weights read on a text, as llama.cpp's importance matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.options import takes_options
from quantkit.errors import OutputError
from quantkit.pipeline.options import QuantizeOptions


@takes_options(only=("calibration", "samples", "seq_len", "seed", "device", "trust_remote_code"))
def imatrix(
    model: Annotated[str, typer.Argument(help="Directory or Hub name of the model.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write; one that is there stays.")],
    options: QuantizeOptions,
) -> None:
    """Write an importance matrix (GGUF) for llama-quantize, from calibration text."""
    # A file that is there, or no folder for it, shows before a model is opened.
    if out.exists():
        raise OutputError(f"--out {out}: it is there; remove it or name another file")
    if not out.parent.is_dir():
        raise OutputError(f"--out {out}: there is no directory {out.parent}")
    from quantkit.formats.gguf.writer import import_gguf
    from quantkit.pipeline.job import prepare_text
    from quantkit.pipeline.work.imatrix import measure_imatrix

    import_gguf()
    found, calibration, device = prepare_text(model, options)
    told = calibration.record
    count = measure_imatrix(found, calibration, out, dataset=told.source, device=device)
    typer.echo(
        f"{out}: mean squares of the inputs of {count} tensors, on {told.source}: "
        f"{told.samples} x {told.seq_len} tokens"
    )
