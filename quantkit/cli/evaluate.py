"""Commands that measure: each is a function that `quantkit.cli` registers.

quantkit_eval is a package above this one, so it is imported when a command runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from quantkit.pipeline.session import Job

TextOption = Annotated[
    str,
    typer.Option(
        "--text",
        help="Text to evaluate on: demo, a Hub dataset (name:config:split), a .txt, .jsonl or "
        ".parquet file, or a saved dataset directory; conversations with images as --calib does.",
    ),
]
TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        help="demo, demo:NAME, FILE.jsonl or lm-eval:NAME, with commas between them; "
        "may be given several times.",
    ),
]
FailOption = Annotated[
    list[str] | None,
    typer.Option("--fail-if", help='Exit with 1 if shown, as in "kl>0.05", "task:sort<-2pt".'),
]
CardOption = Annotated[
    str | None,
    typer.Option(
        "--card-results",
        help="With --eval (which it implies): ORG/DATASET:TASK, under which the model card and "
        ".eval_results list perplexity; ORG/DATASET:TASK,KL_TASK lists KL too.",
    ),
]
RamOption = Annotated[
    str | None, typer.Option("--max-ram", help="Most memory the process may use, as in 6GiB.")
]
QuestionsOption = Annotated[
    int | None,
    typer.Option("--questions", min=1, help="Of each demo task (default 200) or lm-eval task."),
]
BackendOption = Annotated[
    str,
    typer.Option("--backend", help="auto, triton, cpu, cpu-int8 or reference, in whole models."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of the demo's questions.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]
WindowsOption = Annotated[
    int | None,
    typer.Option(
        "--windows",
        help="At most so many windows; of an embedding model texts, of a reranker queries.",
    ),
]
SeqLenOption = Annotated[
    int, typer.Option("--seq-len", help="Tokens of a window; cut to the model's positions.")
]
RemoteOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


def evaluate(
    model: Annotated[str, typer.Argument(help="The original: a directory or Hub name.")],
    quantized: Annotated[list[str], typer.Argument(help="What was made of it.")],
    out: Annotated[Path, typer.Option("--out", help="Directory for the report.")],
    text: TextOption = "demo",
    tasks: TasksOption = None,
    questions: QuestionsOption = None,
    seq_len: SeqLenOption = 2048,
    windows: WindowsOption = None,
    protocol: Annotated[
        str, typer.Option("--protocol", help="standard, strided or llama.cpp.")
    ] = "standard",
    stride: Annotated[
        int | None, typer.Option("--stride", help="Of the strided protocol; default half a window.")
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="KL divergence of each block quantized alone.")
    ] = False,
    fail_if: FailOption = None,
    prompts: Annotated[
        int, typer.Option("--prompts", min=0, help="Texts that both models continue.")
    ] = 3,
    noise_floor: Annotated[bool, typer.Option(help="Measure the original in bfloat16 too.")] = True,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Accept what was made from another original.")
    ] = False,
    kv: Annotated[
        str,
        typer.Option(
            "--kv",
            help="Round keys and values as a cache does: stored (as the checkpoint asks), none, "
            "fp8 (with scales of 1 where the checkpoint has none), int8 or int4.",
        ),
    ] = "stored",
    max_ram: RamOption = None,
    device: DeviceOption = "cpu",
    backend: BackendOption = "auto",
    seed: SeedOption = 0,
    trust_remote_code: RemoteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what quantization cost; exit 1 if a --fail-if limit is shown to be broken."""
    from quantkit_eval.limits import parse_limit

    from quantkit.formats.open import open_source

    # What is wrong with these shows before torch is imported.
    for limit in fail_if or ():
        parse_limit(limit)
    for path in (model, *quantized):
        open_source(path)
    from quantkit_eval.command import run_evaluation
    from quantkit_eval.setting import EvaluationRequest

    request = EvaluationRequest(
        model=model,
        quantized=tuple(quantized),
        text=text,
        tasks=tuple(tasks or ()),
        task_questions=questions,
        seq_len=seq_len,
        windows=windows,
        protocol=_protocol(protocol),
        stride=stride,
        sensitivity=sensitivity,
        limits=tuple(fail_if or ()),
        prompts=prompts,
        noise_floor=noise_floor,
        any_base=any_base,
        kv=kv,
        max_ram=memory_limit(max_ram),
        device=device_name(device),
        backend=backend,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    finish(run_evaluation(request, out, tell=lambda line: typer.echo(line, err=True)), as_json)


def check_card(names: str | None) -> None:
    """Nothing if a card's figures can be named so."""
    if names is not None:
        from quantkit_eval.card import parse_card_names

        parse_card_names(names)


def write_card(out: Path, names: str | None) -> None:
    """The evaluation's figures in the model card of a finished checkpoint, if they are named."""
    if names is not None:
        from quantkit_eval.card import parse_card_names, write_card_results

        write_card_results(out, parse_card_names(names))


def check_wishes(job: Job, *, text: str, limits: Sequence[str], requantize: bool) -> None:
    """Nothing if a job's output can be evaluated so; found out before the work."""
    from quantkit_eval.command import check_wishes as check
    from quantkit_eval.errors import EvaluationError

    if requantize:
        raise EvaluationError(
            "--eval measures against the original, and --requantize has none: use quantkit eval "
            "with the full-precision model"
        )
    check(_request_after(job, text=text, limits=limits))


def evaluate_output(job: Job, out: Path, *, text: str, limits: Sequence[str]) -> Any:
    """The evaluation of a job's finished checkpoint; the report lies in its directory."""
    from quantkit_eval.command import run_evaluation

    from quantkit.checkpoint.manifest import EVALUATION

    request = _request_after(job, str(out), text=text, limits=limits)
    return run_evaluation(request, out / EVALUATION)


def _request_after(job: Job, *quantized: str, text: str, limits: Sequence[str]) -> Any:
    from quantkit_eval.setting import EvaluationRequest

    address = job.model.source.address
    assert address is not None, "the command line reads models from files"
    return EvaluationRequest(
        model=address,
        quantized=quantized,
        text=text,
        limits=tuple(limits),
        max_ram=job.max_ram,
        device=job.device,
    )


def bench(
    path: Annotated[Path, typer.Argument(help="Directory of a checkpoint.")],
    batches: Annotated[
        str, typer.Option("--batches", help="Batch sizes with commas between them.")
    ] = "1,4,16",
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2)] = 32,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="After one warm-up.")] = 5,
    draft: Annotated[
        Path | None,
        typer.Option("--draft", help="Checkpoint that drafts tokens for it: measures if it pays."),
    ] = None,
    draft_tokens: Annotated[
        int, typer.Option("--draft-tokens", help="With --draft: tokens it proposes at a time.")
    ] = 4,
    prompts: Annotated[
        int, typer.Option("--prompts", help="With --draft: prompts taken from --text.")
    ] = 8,
    text: TextOption = "demo",
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    trust_remote_code: RemoteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure speed and memory of a checkpoint, quantized or not, on the device at hand."""
    from quantkit_eval.errors import EvaluationError

    from quantkit.formats.open import open_source

    open_source(path)
    if draft is not None:
        from quantkit_eval.records import to_json
        from quantkit_eval.timing.draft import measure_draft

        drafted = measure_draft(
            path,
            draft,
            text=text,
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            draft_tokens=draft_tokens,
            device=device_name(device),
            backend=backend,
            trust_remote_code=trust_remote_code,
        )
        typer.echo(json.dumps(to_json(drafted), indent=2) if as_json else drafted.said())
        return
    try:
        sizes = [int(part) for part in batches.split(",")]
    except ValueError:
        raise EvaluationError(f"--batches {batches!r}: write numbers, as in 1,4,16") from None
    from quantkit_eval.records import to_json
    from quantkit_eval.timing.speed import measure_speed

    measured = measure_speed(
        path,
        batches=sizes,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        device=device_name(device),
        backend=backend,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(json.dumps(to_json(measured), indent=2) if as_json else measured.text())


def finish(evaluated: Any, as_json: bool) -> None:
    """Prints an evaluation and ends with exit code 1 if it broke a limit."""
    from quantkit_eval.records import to_json

    if as_json:
        typer.echo(json.dumps(to_json(evaluated.report), indent=2))
    else:
        typer.echo(evaluated.text())
    if evaluated.violated:
        raise typer.Exit(1)


def memory_limit(text: str | None) -> int | None:
    """Bytes of a --max-ram, and the allocator prepared to give memory back; None without one."""
    from quantkit.checkpoint.memory import parse_size, return_large_blocks

    if text is None:
        return None
    return_large_blocks()
    return parse_size(text)


def device_name(name: str) -> str:
    """The device that `auto`, `cpu` or `cuda` stands for here."""
    from quantkit.inference.device import choose_device

    return choose_device(name)


def _protocol(name: str) -> Any:
    from quantkit_eval.errors import EvaluationError
    from quantkit_eval.windows import KINDS

    if name not in KINDS:
        raise EvaluationError(f"--protocol {name!r}: use one of {', '.join(KINDS)}")
    return name
