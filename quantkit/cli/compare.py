"""`quantkit compare`: one model quantized several ways from one calibration pass, one report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.evaluate import (
    DeviceOption,
    FailOption,
    JsonOption,
    QuestionsOption,
    RamOption,
    RemoteOption,
    SeedOption,
    TasksOption,
    TextOption,
    WindowsOption,
    device_name,
    finish,
    memory_limit,
)

DEFAULT_METHODS = "rtn,awq,gptq,nf4,int8"


def compare(
    model: Annotated[str, typer.Argument(help="Directory or Hub name of the original.")],
    out: Annotated[Path, typer.Option("--out", help="Directory for checkpoints and report.")],
    methods: Annotated[
        str, typer.Option("--methods", help="With commas between them; see `quantkit methods`.")
    ] = DEFAULT_METHODS,
    bits: Annotated[
        str | None,
        typer.Option("--bits", help="As in 2,3,4,8; methods of one width keep it."),
    ] = None,
    calib: Annotated[str, typer.Option("--calib", help="Calibration text.")] = "demo",
    text: TextOption = "demo",
    tasks: TasksOption = None,
    questions: QuestionsOption = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Calibration sequences.")] = None,
    seq_len: Annotated[
        int | None,
        typer.Option("--seq-len", help="Tokens of a calibration sequence and of a window."),
    ] = None,
    windows: WindowsOption = None,
    fail_if: FailOption = None,
    prompts: Annotated[
        int, typer.Option("--prompts", min=0, help="Texts that all models continue.")
    ] = 3,
    max_ram: RamOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    trust_remote_code: RemoteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize several ways from one calibration pass, and rate them in one report."""
    evaluated = run_compare(
        model,
        out,
        methods=methods.split(","),
        bits=_numbers(bits),
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        max_ram=memory_limit(max_ram),
        device=device_name(device),
        seed=seed,
        trust_remote_code=trust_remote_code,
        evaluation={
            "text": text,
            "tasks": tuple(tasks or ()),
            "task_questions": questions,
            "windows": windows,
            "limits": tuple(fail_if or ()),
            "prompts": prompts,
        },
    )
    finish(evaluated, as_json)


def run_compare(
    model: str,
    out: Path,
    *,
    methods: list[str],
    bits: list[int],
    calib: str,
    samples: int | None,
    seq_len: int | None,
    max_ram: int | None,
    device: str,
    seed: int,
    trust_remote_code: bool,
    evaluation: dict[str, Any],
    title: str | None = None,
) -> Any:
    """The evaluation of all candidates, which lie in directories of their own below `out`.

    evaluation: further fields of the evaluation's request
    """
    from quantkit_eval.command import run_comparison
    from quantkit_eval.setting import EvaluationRequest, check_wishes

    from quantkit.pipeline.job import Request, prepare_all
    from quantkit.pipeline.together import candidates, run_together

    wishes = EvaluationRequest(
        model=model,
        quantized=(),
        seq_len=seq_len or 2048,
        max_ram=max_ram,
        device=device,
        seed=seed,
        trust_remote_code=trust_remote_code,
        title=title,
        **evaluation,
    )
    # Whatever is wrong with text, tasks or limits shows before hours of quantizing.
    check_wishes(wishes)
    chosen = candidates(methods, bits, samples=samples, seq_len=seq_len)
    requests = [
        Request(
            recipe=candidate.recipe,
            calibration=calib,
            seed=seed,
            max_ram=max_ram,
            device=device,
            trust_remote_code=trust_remote_code,
            # What few runtimes read may still be worth knowing the price of.
            allow_unreadable=True,
        )
        for candidate in chosen
    ]
    jobs = prepare_all(model, requests)
    outs = [out / candidate.name for candidate in chosen]
    run_together(jobs, outs, out / "statistics.partial")
    del jobs
    request = dataclasses.replace(wishes, quantized=tuple(str(path) for path in outs))
    return run_comparison(request, out, names=[candidate.label for candidate in chosen])


def _numbers(text: str | None) -> list[int]:
    from quantkit.errors import RecipeError

    if text is None:
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--bits {text!r}: write numbers with commas, as in 3,4,8") from None
