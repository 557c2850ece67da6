"""Several methods on one model from one calibration pass: ten cost little more than one.

Blocks are done in lockstep: the original's statistics of a block serve all methods, then go.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from quantkit.calibration.processes.ranks import World, owners_of
from quantkit.calibration.shared import SharedMethod, SharedStats
from quantkit.calibration.stream import CalibrationStream
from quantkit.errors import RecipeError
from quantkit.formats.format import BuiltFormat
from quantkit.methods.recipe import Recipe, load_recipe
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.session import Job, Outcome, Session, build, checkpoint_beside, is_built
from quantkit.pipeline.work.needs import block_needs

# What of a job's fingerprint hidden states of the original depend on.
_STATES = ("model", "calibration", "device", "hardware", "threads", "torch version",
           "transformers version")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method at one scheme; `name` is its directory, `label` what people call it."""

    name: str
    label: str
    recipe: Recipe


def candidates(
    methods: Sequence[str],
    bits: Sequence[int],
    *,
    samples: int | None = None,
    seq_len: int | None = None,
    default_scheme: str | None = None,
) -> list[Candidate]:
    """The methods at the given bits (none: each at its own), with recipes that do not propagate, so
    that each weight's own outputs are its target.

    `default_scheme`: what goes with a format, in the place of the methods' own.

    Methods whose grid has one width (nf4, 8-bit activations) come once, at that width.  Raises
    RecipeError for unknown methods and for bits that no method has.
    """
    found: list[tuple[str, Recipe]] = []
    for method in dict.fromkeys(methods):
        own = load_recipe(method, samples=samples, seq_len=seq_len, default_scheme=default_scheme)
        for scheme in _widths(own.scheme, bits):
            recipe = dataclasses.replace(
                own,
                scheme=Scheme.parse(scheme),
                propagate=False,
                target=None,
                refine=None,
                heal=None,
            )
            found.append((method, recipe))
    if not found:
        raise RecipeError("name at least one method with --methods, as in rtn,awq,gptq")
    once = {m for m, _ in found if sum(m == other for other, _ in found) == 1}
    return [
        Candidate(
            name=f"{method}-{recipe.scheme.name}",
            label=method if method in once else f"{method} {recipe.scheme.bits} bit",
            recipe=recipe,
        )
        for method, recipe in found
    ]


def _widths(scheme: Scheme, bits: Sequence[int]) -> list[str]:
    """The scheme's name at each number of bits it can have."""
    variable = scheme.kind == "int" and scheme.activation_bits != 8 and scheme.bits != 8
    if not bits or not variable:
        return [scheme.name]
    names = []
    for width in dict.fromkeys(bits):
        if not 2 <= width <= 8:
            raise RecipeError(f"--bits {width}: give numbers from 2 to 8")
        names.append(scheme.name.replace(f"w{scheme.bits}a", f"w{width}a", 1))
    return names


def run_spread(
    world: World,
    jobs: Sequence[Job],
    outs: Sequence[Path],
    scratch: Path,
    *,
    progress: bool = True,
) -> None:
    """As `run_together`, outputs being shared out over ranks: each is one rank's alone.

    Who does which is told by how long they are predicted to take; any number of ranks goes on.
    """
    seconds = {str(k): job.prediction.seconds for k, job in enumerate(jobs)}
    owners = world.first(lambda: owners_of(seconds, world.size))
    mine = [k for k in range(len(jobs)) if owners[str(k)] == world.rank]
    if world.size > 1:
        scratch = scratch.with_name(f"{scratch.stem}-{world.rank}{scratch.suffix}")
    if mine:
        here = [jobs[k] for k in mine], [outs[k] for k in mine]
        run_together(*here, scratch, progress=progress and world.rank == 0)
    # Nobody looks at outputs before all are there.
    world.gathered(None)


def run_together(
    jobs: Sequence[Job], outs: Sequence[Path], scratch: Path, *, progress: bool = True
) -> list[Outcome]:
    """Writes every job's checkpoint; goes on where an earlier run of the same jobs ended.

    jobs: of one model and calibration, with recipes that do not propagate.  Hidden states go below
    `scratch`, which is removed in the end.
    """
    began = time.monotonic()
    built = isinstance(jobs[0].plan.format, BuiltFormat)
    left = [k for k, job in enumerate(jobs) if not (built and is_built(job, outs[k]))]
    places = [checkpoint_beside(outs[k]) if built else outs[k] for k in left]
    outcomes = _run([jobs[k] for k in left], places, scratch, progress)
    if not built:
        return outcomes
    for job, out in zip(jobs, outs, strict=True):
        build(job, out, fresh=False, progress=progress)
    seconds = time.monotonic() - began
    return [Outcome(out=out, written=k in left, seconds=seconds) for k, out in enumerate(outs)]


def _run(jobs: Sequence[Job], outs: Sequence[Path], scratch: Path, progress: bool) -> list[Outcome]:
    """The checkpoints of jobs, block by block together."""
    assert all(not job.plan.recipe.propagate for job in jobs), "statistics are the original's"
    assert len({job.plan.recipe.experts for job in jobs}) < 2, "statistics are shared"
    with contextlib.ExitStack() as stack:
        sessions = [
            Session(job, out, fresh=False, stack=stack) for job, out in zip(jobs, outs, strict=True)
        ]
        open_ones = [k for k, session in enumerate(sessions) if not session.complete]
        calibrated = [k for k in open_ones if jobs[k].calibration is not None]
        shared = _share([jobs[k] for k in calibrated], scratch, stack)
        bar = stack.enter_context(tqdm(unit="step", disable=None if progress else True))
        for k in open_ones:
            part = None
            if shared is not None and k in calibrated:
                part = SharedMethod(stats=shared, number=calibrated.index(k))
            sessions[k].begin(tell=bar.set_postfix_str, shared=part)
        pending = {k: sessions[k].pending for k in open_ones}
        bar.reset(total=sum(len(steps) for steps in pending.values()))
        order = max((sessions[k].steps for k in open_ones), key=len, default=[])
        extra = [s for k in open_ones for s in sessions[k].steps if s not in order]
        for step in [*order, *dict.fromkeys(extra)]:
            for k in open_ones:
                if step in pending[k]:
                    bar.set_description(f"{outs[k].name}: {step}")
                    sessions[k].run(step)
                    bar.update()
        outcomes = [
            session.outcome if session.complete else session.finish() for session in sessions
        ]
    shutil.rmtree(scratch, ignore_errors=True)
    return outcomes


def _share(jobs: Sequence[Job], scratch: Path, stack: contextlib.ExitStack) -> SharedStats | None:
    """The statistics that calibrated jobs share; None if there are no such jobs."""
    if not jobs:
        return None
    first = jobs[0]
    assert first.calibration is not None
    budgets = [job.prediction.gram_budget(job.max_ram, job.max_vram) for job in jobs]
    limits = [budget for budget in budgets if budget is not None]
    stream = CalibrationStream(
        first.model,
        first.calibration,
        device=first.device,
        scratch=scratch,
        # A method that folds keeps rescaled matrices beside the shared ones.
        gram_budget=min(limits) // 2 if limits else None,
        stack=stack,
        spread=first.plan.recipe.experts == "all",
    )
    blocks = range(first.model.num_blocks)
    needs = [[block_needs(job.plan, index) for index in blocks] for job in jobs]
    return SharedStats(stream, needs, states={name: first.fingerprint[name] for name in _STATES})
