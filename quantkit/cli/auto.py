"""`quantkit quantize --method auto`: the smallest checkpoint that keeps a limit on held-out text.

What is done lies in OUT.auto, from which the same command goes on; see quantkit_eval.tournament.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import OutputError, RecipeError, ResumeError
from quantkit.pipeline.options import QuantizeOptions

if TYPE_CHECKING:
    from quantkit_eval.tournament import Entrant, Rated, Table

    from quantkit.model.causal import CausalModel
    from quantkit.pipeline.session import Job
    from quantkit.pipeline.together import Candidate

METHOD = "auto"
# Cheap ones first: what they keep bounds what the dear ones are asked.
_ROUNDS = (("rtn",), ("awq", "gptq", "best"))
_GGUF_ROUNDS = (("rtn",), ("gptq", "best"))
_BITS = (2, 3, 4, 5, 6, 8)
# Blocks, and windows of text, that candidates are rated on first.
_SCREENED_BLOCKS, _SCREENED_WINDOWS = 3, 8
TRIED = "quantkit/evaluation.tried.json"
TRIED_TEXT = "quantkit/evaluation.tried.md"
_STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Where the winner lies, and what was tried: as a table for people, and as JSON values."""

    out: Path
    table: str
    rows: list[dict[str, Any]]


def check_auto(options: QuantizeOptions, max_kl: float | None, limits: Sequence[str]) -> None:
    """Raises RecipeError for what goes not with `--method auto`, or not without it."""
    if options.method != METHOD:
        if max_kl is not None:
            raise RecipeError(
                "--max-kl says what --method auto has to keep; with another method write "
                f'--fail-if "kl>{max_kl:g}"'
            )
        return
    if max_kl is None and not limits:
        raise RecipeError(
            '--method auto needs a limit to keep: --max-kl 0.01, or --fail-if as in "ppl>+1%"'
        )
    if max_kl is not None and not 0 < max_kl < math.inf:
        raise RecipeError(f"--max-kl {max_kl:g}: give nats per token above 0, as in 0.01")
    for flag, given in (
        ("--scheme", options.scheme),
        ("--recipe", options.recipe),
        ("--set", tuple(options.overrides)),
        ("--bits, --size or --fit-vram", options.has_budget),
        ("--requantize", options.requantize),
        ("--until", options.until),
    ):
        if given:
            raise RecipeError(
                f"{flag}: --method auto tries methods and schemes of its own; leave it out"
            )


def run_auto(
    model: str,
    out: Path,
    options: QuantizeOptions,
    *,
    max_kl: float | None,
    text: str,
    limits: Sequence[str],
    tell: Callable[[str], object],
) -> Auto:
    """Tries candidates till one is the answer, and puts it to `out` with its evaluation.

    Raises OutputError or ResumeError if `out` or what is unfinished belongs to another command, and
    EvaluationError if no candidate keeps the limits.
    """
    from quantkit_eval.command import check_wishes
    from quantkit_eval.errors import EvaluationError
    from quantkit_eval.setting import EvaluationRequest
    from quantkit_eval.tournament import Entrant, Table, play

    from quantkit.pipeline.asked import open_asked
    from quantkit.pipeline.together import candidates

    out = Path(os.path.abspath(out))
    if text != "demo" and text == options.calibration:
        raise EvaluationError(
            f"--text {text}: a limit is to be kept on text that calibration has not seen; give "
            "another --text or --calib"
        )
    # Of the recipes that are tried only the method differs; what is wrong shows here.
    options = dataclasses.replace(options, method="rtn")
    source = open_asked(model, [options])
    asked = [*limits, *([] if max_kl is None else [f"kl>{max_kl:g}"])]
    request = EvaluationRequest(
        model=model,
        quantized=(),
        text=text,
        limits=tuple(asked),
        max_ram=options.max_ram_bytes,
        prompts=0,
        noise_floor=False,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    )
    check_wishes(request)
    listed = [
        candidate
        for methods in (_GGUF_ROUNDS if options.format == "gguf" else _ROUNDS)
        for candidate in _candidates(candidates, methods, options)
    ]
    jobs = _prepared(source, options, listed)
    first = next(iter(jobs.values()))
    blocks = _some_blocks(first.model)
    state = _State.open(Path(f"{out}.auto"), _key(jobs, request), fresh=options.fresh)
    if (done := _finished(out, state.key, options.fresh)) is not None:
        _clear(state.home, out)
        return done
    entrants = tuple(
        Entrant(name=name, num_bytes=job.plan.layout.file_bytes) for name, job in jobs.items()
    )
    share = _share(first, blocks)
    table = Table(entrants=entrants, share=share, screened=state.screened, full=state.full)
    for methods in _ROUNDS:
        wanted = [
            c
            for c in listed
            if c.recipe.method in methods and c.name in jobs and c.name not in state.screened
        ]
        bound = _bound(table, max_kl)
        wanted = [c for c in wanted if jobs[c.name].plan.layout.file_bytes <= bound]
        if wanted:
            tell(f"rates {', '.join(c.name for c in wanted)} on blocks {blocks}")
            state.screened |= _screened(source, options, wanted, blocks, first, request, state)
            state.save()
        table = dataclasses.replace(table, screened=dict(state.screened))

    def try_whole(entrant: Entrant) -> Rated:
        tell(f"tries {entrant.name} as a whole")
        state.full[entrant.name] = _whole(jobs[entrant.name], entrant.name, request, state)
        state.save()
        return state.full[entrant.name]

    table = play(table, max_kl=max_kl, try_whole=try_whole)
    winner = table.winner
    if winner is None:
        raise EvaluationError(
            f"--method auto: no candidate keeps {' and '.join(asked)} on this text:\n"
            f"{table.text()}\nallow more, or measure on more text with --text"
        )
    return _published(table, winner, state, out)


@dataclass(kw_only=True)
class _State:
    """What was measured so far, beside the checkpoints that are being tried."""

    home: Path
    key: str
    screened: dict[str, Rated]
    full: dict[str, Rated]

    @classmethod
    def open(cls, home: Path, key: str, *, fresh: bool) -> _State:
        """Of an earlier run of the same command, or a new one."""
        from quantkit_eval.tournament import Rated

        from quantkit.checkpoint.door import RECORD_BYTES, read_json

        if fresh:
            shutil.rmtree(home, ignore_errors=True)
        if not (home / _STATE).exists():
            return cls(home=home, key=key, screened={}, full={})
        found = read_json(home / _STATE, largest=RECORD_BYTES)
        if found["key"] != key:
            raise ResumeError(
                f"{home}: belongs to another command or model; repeat that one, or use --fresh to "
                "start over"
            )
        screened, full = (
            {name: Rated(**values) for name, values in found[part].items()}
            for part in ("screened", "full")
        )
        return cls(home=home, key=key, screened=screened, full=full)

    def save(self) -> None:
        """Writes it down for a run that goes on."""
        from quantkit.checkpoint.disk import disk_errors, write_file

        told = {
            "key": self.key,
            **{
                part: {name: rated.to_dict() for name, rated in found.items()}
                for part, found in (("screened", self.screened), ("full", self.full))
            },
        }
        with disk_errors(self.home):
            self.home.mkdir(parents=True, exist_ok=True)
            fresh = self.home / f"{_STATE}.new"
            write_file(fresh, json.dumps(told, indent=2).encode())
            fresh.rename(self.home / _STATE)


def _candidates(
    make: Callable[..., list[Candidate]], methods: Sequence[str], options: QuantizeOptions
) -> list[Candidate]:
    """Methods at all widths, or at all mixes of a GGUF file."""
    shared = {"samples": options.samples, "seq_len": options.seq_len}
    if options.format != "gguf":
        return make(methods, _BITS, **shared)
    mixes = ("q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q8_0")
    return [c for mix in mixes for c in make(methods, (), default_scheme=mix, **shared)]


def _prepared(source: Any, options: QuantizeOptions, listed: Sequence[Candidate]) -> dict[str, Job]:
    """Name -> job of each candidate that a runtime reads, with its method's whole recipe."""
    from quantkit.methods.recipe import load_recipe
    from quantkit.pipeline.job import prepare_all

    requests = []
    for candidate in listed:
        recipe = load_recipe(
            candidate.recipe.method,
            skip=options.skip,
            samples=options.samples,
            seq_len=options.seq_len,
        )
        recipe = dataclasses.replace(recipe, scheme=candidate.recipe.scheme)
        requests.append(
            dataclasses.replace(options, method=None, recipe=recipe, allow_unreadable=True)
        )
    jobs = prepare_all(source, requests)
    found = {
        candidate.name: job
        for candidate, job in zip(listed, jobs, strict=True)
        if options.allow_unreadable or None in job.plan.readers.values()
    }
    if not found:
        raise RecipeError("--method auto: no runtime reads any candidate; name a method instead")
    return found


def _some_blocks(model: CausalModel) -> list[int]:
    """The first, the middle and the last block."""
    last = model.num_blocks - 1
    return sorted({round(k * last / (_SCREENED_BLOCKS - 1)) for k in range(_SCREENED_BLOCKS)})


def _share(job: Job, blocks: Sequence[int]) -> float:
    """How much of the quantized weights some blocks hold."""
    sizes = [
        sum(math.prod(ref.shape) for ref in refs if job.plan.scheme(ref) is not None)
        for refs in job.plan.refs
    ]
    return sum(sizes[index] for index in blocks) / sum(sizes)


def _bound(table: Table, max_kl: float | None) -> float:
    """Bytes of the smallest that should keep the limit by far: what is larger need not be rated."""
    if max_kl is None:
        return math.inf
    sure = [
        e.num_bytes
        for e in table.entrants
        if e.name in table.screened and 2 * table.estimate(e.name) <= max_kl
    ]
    return min(sure, default=math.inf)


def _screened(
    source: Any,
    options: QuantizeOptions,
    wanted: Sequence[Candidate],
    blocks: Sequence[int],
    first: Job,
    request: Any,
    state: _State,
) -> dict[str, Rated]:
    """The candidates with some blocks quantized, from one calibration pass, and what that costs."""
    from quantkit_eval.evaluation import evaluate
    from quantkit_eval.report.writing import report_directory, scratch

    from quantkit.cli.compare import quantize_together
    from quantkit.methods.rules import Rule

    others = [k for k in range(first.model.num_blocks) if k not in blocks]
    rules = tuple(
        Rule(match=f"{_common(first.model.block_tensors(k))}.*", scheme=None) for k in others
    )
    chosen = [
        dataclasses.replace(
            c, recipe=dataclasses.replace(c.recipe, rules=(*c.recipe.rules, *rules))
        )
        for c in wanted
    ]
    folder = state.home / "screened"
    outs = quantize_together(source, options, chosen, folder)
    asked = dataclasses.replace(
        request,
        quantized=tuple(str(path) for path in outs),
        limits=(),
        windows=_SCREENED_WINDOWS,
    )
    with report_directory(state.home / "report") as work:
        report = evaluate(asked, scratch(work), names=[c.name for c in wanted])
    found = {c.name: _rated(result) for c, result in zip(wanted, report.candidates, strict=True)}
    shutil.rmtree(folder)
    return found


def _common(names: Sequence[str]) -> str:
    """The components that all names begin with."""
    parts = [name.split(".") for name in names]
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return ".".join(column[0] for column in shared)


def _whole(job: Job, name: str, request: Any, state: _State) -> Rated:
    """The whole checkpoint of a candidate, measured; its report lies in it."""
    from quantkit_eval.command import run_evaluation

    from quantkit.checkpoint.manifest import EVALUATION
    from quantkit.pipeline.session import run

    made = run(job, state.home / name).out
    evaluated = run_evaluation(
        dataclasses.replace(request, quantized=(str(made),)), made / EVALUATION
    )
    (result,) = evaluated.report.candidates
    if result.outcome != "within":
        shutil.rmtree(made)
    return _rated(result, held=True)


def _rated(result: Any, *, held: bool = False) -> Rated:
    from quantkit_eval.tournament import Rated

    measured = result.divergence
    return Rated(
        kl=measured.mean,
        low=measured.mean_interval.low,
        high=measured.mean_interval.high,
        outcome=result.outcome if held else None,
    )


def _published(table: Table, winner: Entrant, state: _State, out: Path) -> Auto:
    """Puts the winner to `out` with the table of what was tried."""
    from quantkit.checkpoint.disk import disk_errors, sync_directory, write_file
    from quantkit.checkpoint.manifest import EVALUATION

    made = state.home / winner.name
    told = {"key": state.key, "tried": table.rows()}
    with disk_errors(out):
        write_file(made / TRIED, (json.dumps(told, indent=2) + "\n").encode())
        write_file(made / TRIED_TEXT, f"# What was tried\n\n{table.text()}\n".encode())
        _add_to_pages(made / EVALUATION, table)
        if out.exists():
            out.rename(_before(out))
        made.rename(out)
        sync_directory(out.parent)
    _clear(state.home, out)
    return Auto(out=out, table=table.text(), rows=table.rows())


def _add_to_pages(report: Path, table: Table) -> None:
    """The table at the end of the evaluation's pages, once."""
    from quantkit.checkpoint.disk import write_file

    title = "What was tried"
    for name, end, added in (
        ("report.md", "", f"\n## {title}\n\n{table.text()}\n"),
        (
            "report.html",
            "</main>",
            f"<h2>{title}</h2>\n<pre>{html.escape(table.text())}</pre>\n",
        ),
    ):
        page = (report / name).read_text(encoding="utf-8")
        if title not in page:
            head, found, tail = page.rpartition(end) if end else (page, "", "")
            write_file(report / name, f"{head}{added}{found}{tail}".encode())


def _before(out: Path) -> Path:
    """Where an earlier result waits till the new one stands in its place."""
    return out.with_name(f"{out.name}.before")


def _clear(home: Path, out: Path) -> None:
    for left in (home, _before(out)):
        shutil.rmtree(left, ignore_errors=True)


def _finished(out: Path, key: str, fresh: bool) -> Auto | None:
    """What this very command completed before.  Raises OutputError for anything else there."""
    from quantkit.checkpoint.door import RECORD_BYTES, read_json

    if not out.exists() or fresh:
        return None
    if (out / TRIED).is_file():
        found = read_json(out / TRIED, largest=RECORD_BYTES)
        if found.get("key") == key:
            table = (out / TRIED_TEXT).read_text(encoding="utf-8").partition("\n\n")[2].rstrip()
            return Auto(out=out, table=table, rows=found["tried"])
    raise OutputError(f"{out}: exists and is not of this command; remove it, or use --fresh")


def _key(jobs: dict[str, Job], request: Any) -> str:
    """sha256 of everything that decides what is taken."""
    from quantkit_eval.texts import read_text

    told = [
        {name: job.fingerprint for name, job in jobs.items()},
        [request.limits, request.seq_len, read_text(request.text).sha256],
        [_SCREENED_BLOCKS, _SCREENED_WINDOWS],
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
