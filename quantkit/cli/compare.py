"""`quantkit compare`: one model quantized several ways from one calibration pass, one report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.evaluate import (
    FailOption,
    JsonOption,
    QuestionsOption,
    TasksOption,
    TextOption,
    WindowsOption,
    device_name,
    finish,
)
from quantkit.cli.options import takes_options
from quantkit.cli.processes import joined_world
from quantkit.pipeline.options import QuantizeOptions

if TYPE_CHECKING:
    from quantkit.calibration.processes.ranks import World
    from quantkit.pipeline.together import Candidate

DEFAULT_METHODS = "rtn,awq,gptq,nf4,int8"


@takes_options(
    only=(
        "format",
        "calibration",
        "samples",
        "seq_len",
        "max_ram",
        "device",
        "seed",
        "trust_remote_code",
    )
)
def compare(
    model: Annotated[str, typer.Argument(help="Directory or Hub name of the original.")],
    out: Annotated[Path, typer.Option("--out", help="Directory for checkpoints and report.")],
    options: QuantizeOptions,
    methods: Annotated[
        str, typer.Option("--methods", help="With commas between them; see `quantkit methods`.")
    ] = DEFAULT_METHODS,
    bits: Annotated[
        str | None,
        typer.Option("--bits", help="As in 2,3,4,8; methods of one width keep it."),
    ] = None,
    text: TextOption = "demo",
    tasks: TasksOption = None,
    questions: QuestionsOption = None,
    windows: WindowsOption = None,
    fail_if: FailOption = None,
    prompts: Annotated[
        int, typer.Option("--prompts", min=0, help="Texts that all models continue.")
    ] = 3,
    as_json: JsonOption = False,
) -> None:
    """Quantize several ways from one calibration pass, and rate them in one report."""
    evaluation = {
        "text": text,
        "tasks": tuple(tasks or ()),
        "task_questions": questions,
        "windows": windows,
        "limits": tuple(fail_if or ()),
        "prompts": prompts,
    }
    with contextlib.ExitStack() as stack:
        more = {"--methods": methods, "--bits": bits, **evaluation}
        evaluated = run_compare(
            model,
            out,
            methods=methods.split(","),
            bits=_numbers(bits),
            options=options,
            evaluation=evaluation,
            world=joined_world(stack, model, options, out, more),
        )
    if evaluated is not None:
        finish(evaluated, as_json)


def run_compare(
    model: str,
    out: Path,
    *,
    methods: list[str],
    bits: list[int],
    options: QuantizeOptions,
    evaluation: dict[str, Any],
    title: str | None = None,
    world: World | None = None,
) -> Any:
    """The evaluation of all candidates, which lie in directories of their own below `out`.

    options: what all of them share
    evaluation: further fields of the evaluation's request
    world: processes that candidates are shared out over; rank 0 evaluates, others get None
    """
    from quantkit_eval.limits import parse_limit

    from quantkit.checkpoint.door import given_path
    from quantkit.checkpoint.memory import return_large_blocks
    from quantkit.errors import OutputError
    from quantkit.formats.registry import default_scheme
    from quantkit.methods.recipe import load_recipe
    from quantkit.pipeline.asked import open_asked

    # Found out before the work, as all that follows; this much before torch is imported.
    given_path(out, error=OutputError)
    for limit in evaluation.get("limits", ()):
        parse_limit(limit)
    for method in methods:
        load_recipe(method)
    source = open_asked(model, [options])
    from quantkit_eval.command import check_wishes, run_comparison
    from quantkit_eval.setting import EvaluationRequest

    from quantkit.pipeline.together import candidates

    if options.max_ram is not None:
        return_large_blocks()
    wishes = EvaluationRequest(
        model=model,
        quantized=(),
        seq_len=options.seq_len or 2048,
        max_ram=options.max_ram_bytes,
        device=device_name(options.device),
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
        title=title,
        **evaluation,
    )
    # Whatever is wrong with text, tasks or limits shows before hours of quantizing.
    check_wishes(wishes)
    chosen = candidates(
        methods,
        bits,
        samples=options.samples,
        seq_len=options.seq_len,
        default_scheme=default_scheme(options.format),
    )
    outs = quantize_together(source, options, chosen, out, world)
    if world is not None and world.rank != 0:
        return None
    request = dataclasses.replace(wishes, quantized=tuple(str(path) for path in outs))
    return run_comparison(request, out, names=[candidate.label for candidate in chosen])


def quantize_together(
    source: Any,
    options: QuantizeOptions,
    chosen: Sequence[Candidate],
    out: Path,
    world: World | None = None,
) -> list[Path]:
    """Where the candidates' checkpoints lie below `out`, from one calibration pass.

    world: processes that candidates are shared out over
    """
    from quantkit.calibration.processes.ranks import ALONE
    from quantkit.pipeline.job import prepare_all
    from quantkit.pipeline.together import run_spread

    requests = [
        # What few runtimes read may still be worth knowing the price of.
        dataclasses.replace(options, method=None, recipe=candidate.recipe, allow_unreadable=True)
        for candidate in chosen
    ]
    world = world or ALONE
    jobs = prepare_all(source, requests, world=world.apart())
    outs = [out / candidate.name for candidate in chosen]
    run_spread(world, jobs, outs, out / "statistics.partial")
    return outs


def _numbers(text: str | None) -> list[int]:
    from quantkit.errors import RecipeError

    if text is None:
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--bits {text!r}: write numbers with commas, as in 3,4,8") from None
