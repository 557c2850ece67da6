"""The command line.  Results go to stdout, everything else to stderr.

Exit codes: 0 done, 1 a check failed, 2 a mistake in what was asked for, 3 stopped at --until (0 of
several processes) or by another process's end, 70 an error of quantkit's own, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from quantkit.calibration.processes.watch import is_first_process, refuse_several, several_processes
from quantkit.cli import auto as cli_auto
from quantkit.cli import compare as cli_compare
from quantkit.cli import evaluate as cli_eval
from quantkit.cli.crash import EXIT_CODE, command_line, machine_error, report_crash
from quantkit.cli.export import export
from quantkit.cli.imatrix import imatrix
from quantkit.cli.options import takes_options
from quantkit.cli.processes import joined_world
from quantkit.errors import QuantkitError, StoppedError
from quantkit.pipeline.options import QuantizeOptions

if TYPE_CHECKING:
    from quantkit.calibration.processes.ranks import World
    from quantkit.pipeline.session import Job

app = typer.Typer(
    help="Post-training quantization for Hugging Face language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str, typer.Argument(help="Directory or Hub name of a causal LM; hub://NAME stores no weights.")
]
Checkpoint = Annotated[
    Path, typer.Argument(help="Directory of a checkpoint, or a GGUF or ONNX file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]

DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]


@app.command()
@takes_options(leave_out=("out",))
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    options: QuantizeOptions,
    evaluate: Annotated[
        bool, typer.Option("--eval", help="Measure what it cost; the report lies in OUT.")
    ] = False,
    text: cli_eval.TextOption = "demo",
    fail_if: cli_eval.FailOption = None,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", help="With --method auto: most KL divergence, nats per token."),
    ] = None,
    card_results: cli_eval.CardOption = None,
    as_json: Json = False,
) -> None:
    """Quantize a model.  The same command goes on where an interrupted one stopped."""
    began = time.monotonic()
    cli_auto.check_auto(options, max_kl, fail_if or ())
    cli_eval.check_card(card_results)
    measured = evaluate or bool(fail_if) or card_results is not None
    if options.method == cli_auto.METHOD:
        refuse_several("quantkit quantize --method auto")
        try:
            found = cli_auto.run_auto(
                model,
                out,
                options,
                max_kl=max_kl,
                text=text,
                limits=fail_if or (),
                tell=lambda line: typer.echo(line, err=True),
            )
        except KeyboardInterrupt:
            kept = f"what was tried is kept in {out}.auto: the same command goes on there"
            typer.echo(f"interrupted; {kept}", err=True)
            raise typer.Exit(130) from None
        cli_eval.write_card(found.out, card_results)
        told = {"out": str(found.out), "tried": found.rows}
        typer.echo(json.dumps(told, indent=2) if as_json else f"{found.table}\n\n{found.out}")
        return

    stopped: StoppedError | None = None
    try:
        with contextlib.ExitStack() as stack:
            job = _job(model, options, out, joined_world(stack, model, options, out))
            from quantkit.pipeline.session import run

            if measured:
                cli_eval.check_wishes(
                    job, text=text, limits=fail_if or (), requantize=options.requantize
                )
            limit = options.until_seconds
            try:
                outcome = run(
                    job,
                    out,
                    fresh=options.fresh,
                    profile=None if options.profile is None else Path(options.profile),
                    deadline=None if limit is None else began + limit,
                )
            except StoppedError as stop:
                # All processes know, and none is to blame.
                stopped = stop
    except KeyboardInterrupt:
        partial = out.with_name(f"{out.name}.partial")
        kept = f"what is done is kept in {partial}: the same command goes on there"
        typer.echo(f"interrupted; {kept if partial.exists() else 'nothing was written'}", err=True)
        raise typer.Exit(130) from None
    if stopped is not None:
        _tell_stopped(stopped, out, as_json)
    if stopped is not None or not is_first_process():
        return
    from quantkit.cli.summary import outcome_json, outcome_text

    summary = outcome_json(job, outcome) if as_json else {}
    if not as_json:
        typer.echo(outcome_text(job, outcome))
    if measured:
        evaluated = cli_eval.evaluate_output(job, outcome.out, text=text, limits=fail_if or ())
        cli_eval.write_card(outcome.out, card_results)
        if not as_json:
            cli_eval.finish(evaluated, as_json)
        summary["evaluation"] = evaluated.summary()
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        if summary.get("evaluation", {}).get("violated"):
            raise typer.Exit(1)


@app.command()
@takes_options(leave_out=("out", "until", "profile"))
def plan(
    model: Model,
    options: QuantizeOptions,
    as_json: Json = False,
    out: Annotated[Path | None, typer.Option("--out", help="Where it would go.")] = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, help="Of a run on this machine, as torchrun starts."),
    ] = None,
) -> None:
    """Show every tensor's fate and what the run needs; exit 2 if it cannot fit."""
    if not is_first_process():
        return
    job = _job(model, options, out, processes=processes)
    from quantkit.cli.summary import plan_json, plan_text

    typer.echo(json.dumps(plan_json(job), indent=2) if as_json else plan_text(job))


@app.command()
def inspect(path: Checkpoint, as_json: Json = False) -> None:
    """Show what is in a checkpoint: schemes, bits per weight, size, method, provenance."""
    from quantkit.checks.inspection import inspect as inspect_checkpoint

    found = inspect_checkpoint(path)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.text())


@app.command()
def verify(
    out: Checkpoint,
    against: Annotated[
        str | None, typer.Option("--against", help="The source model to compare weights with.")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            help="transformers, vllm, llama.cpp or onnxruntime: let it run the checkpoint too.",
        ),
    ] = None,
    runtime_python: Annotated[
        Path | None,
        typer.Option("--runtime-python", help="Interpreter that has the runtime, if not this one."),
    ] = None,
    trust_remote_code: cli_eval.RemoteOption = False,
    as_json: Json = False,
) -> None:
    """Check a finished checkpoint; exit 1 if anything is wrong."""
    from quantkit.checkpoint.door import given_path
    from quantkit.formats.open import container_here, open_source

    container_here(given_path(out))
    if against is not None:
        open_source(against)
    from quantkit.checks.verify import verify as verify_checkpoint

    result = verify_checkpoint(
        out,
        against=against,
        runtime=runtime,
        runtime_python=runtime_python,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else result.text())
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def generate(
    path: Checkpoint,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="Image file that the prompt speaks of; repeatable."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    backend: Annotated[
        str, typer.Option("--backend", help="auto, triton, cpu, cpu-int8 or reference.")
    ] = "auto",
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Multiply q/k/v, and gate with up, at once.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16; by default the checkpoint's."),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile the step of each token: pays off in long texts."),
    ] = False,
    kv: Annotated[
        str | None,
        typer.Option("--kv", help="Keep older keys and values in 8 or 4 bits: int8 or int4."),
    ] = None,
    device: DeviceOption = "auto",
    trust_remote_code: cli_eval.RemoteOption = False,
) -> None:
    """Continue a text with a quantized (or plain) checkpoint, greedily."""
    from quantkit.formats.open import open_source

    open_source(path)
    from quantkit.inference.generate import generate_text

    text = generate_text(
        path, prompt, max_new_tokens,
        backend=backend, fuse=fuse, device=device, dtype=dtype, compiled=compiled, kv=kv,
        images=image or (), trust_remote_code=trust_remote_code,
    )  # fmt: skip
    typer.echo(text)


@app.command()
def tune(
    path: Checkpoint,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Time the kernels on this GPU for the shapes of a checkpoint, and keep the best settings."""
    from quantkit.cli.tune import tune as tune_checkpoint

    tune_checkpoint(path, dtype, typer.echo)


app.command()(export)
app.command()(imatrix)


@app.command()
def methods() -> None:
    """List the built-in methods."""
    from quantkit.methods.recipe import builtin_recipes, load_recipe

    for name in builtin_recipes():
        recipe = load_recipe(name)
        typer.echo(f"{name:<14}{recipe.scheme.name:<18}{recipe.summary}")


@app.command()
def formats() -> None:
    """List the on-disk formats."""
    from quantkit.formats.registry import available_formats, installed_formats, make_format

    for name in available_formats():
        first_line = (type(make_format(name)).__doc__ or "").strip().splitlines()[0]
        typer.echo(f"{name:<20}{first_line}")
    for name in installed_formats():
        typer.echo(f"{name:<20}Of an installed package.")


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Directory for the quantized models and the report.")
    ] = Path("demo-out"),
    method: Annotated[
        str, typer.Option("--method", help="Whose model writes a line; compared too.")
    ] = "awq",
) -> None:
    """Quantize the embedded demo model five ways and rate them in one report."""
    from quantkit.cli.demo import run_demo

    run_demo(out, method, typer.echo)


app.command("eval")(cli_eval.evaluate)
app.command()(cli_compare.compare)
app.command()(cli_eval.bench)


def _tell_stopped(stop: StoppedError, out: Path, as_json: bool) -> None:
    """Says how to go on.  Raises it, for its exit code, in a process by itself: a launcher would
    report code 3 as a failure and end with 1."""
    if as_json:
        typer.echo(json.dumps({"out": str(out), "written": False, "stopped": str(stop)}, indent=2))
    if not several_processes():
        raise stop
    typer.echo(f"quantkit: {stop}", err=True)


def _planned(processes: int | None) -> World:
    """Those of the run that is planned: as many as asked for, or as a launcher started."""
    from quantkit.calibration.processes.ranks import ALONE, Planned

    if processes is not None:
        return Planned(processes, processes)
    return Planned.launched() if several_processes() else ALONE


def _job(
    model: str,
    options: QuantizeOptions,
    out: Path | None,
    world: World | None = None,
    processes: int | None = None,
) -> Job:
    from quantkit.checkpoint.memory import return_large_blocks
    from quantkit.pipeline.asked import open_asked

    source = open_asked(model, [options])
    from quantkit.pipeline.job import prepare

    if options.max_ram_bytes is not None:
        return_large_blocks()
    return prepare(source, options, out=out, world=world or _planned(processes))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits."""
    if several_processes():
        # What goes with a process that is lost is told in one sentence.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not is_first_process():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] not in (["quantize"], ["plan"], ["compare"]):
            refuse_several(f"quantkit {given[0] if given else ''}".rstrip())
        app(args=None if arguments is None else given)
    except QuantkitError as error:
        typer.echo(f"quantkit: {error}", err=True)
        sys.exit(error.exit_code)
    # What is left over is the machine's fault or ours, whatever raised it.
    except Exception as error:
        if (told := machine_error(error)) is not None:
            typer.echo(f"quantkit: {told}", err=True)
            sys.exit(QuantkitError.exit_code)
        typer.echo(report_crash(error, command_line(arguments)), err=True)
        sys.exit(EXIT_CODE)
    sys.exit(0)
