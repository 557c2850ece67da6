"""The block loop: how a checkpoint becomes a quantized one, resumable after every step.

source --load_block--> block --run--> statistics --transform, range, rounding--> packed tensors
packed tensors --> OUT.partial (synced) --> journal line --> ... --> manifest --> rename to OUT
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quantkit.calibration.data.tokens import Calibration
from quantkit.calibration.processes.ranks import ALONE, World, same_everywhere
from quantkit.calibration.shared import SharedMethod
from quantkit.calibration.spans import Timeline, phase
from quantkit.checkpoint.disk import disk_errors
from quantkit.checkpoint.journal import Journal
from quantkit.checkpoint.memory import free_vram, peak_rss, peak_vram, release_free_memory
from quantkit.checkpoint.output import OutputDirectory, OutputState, earlier_fingerprint
from quantkit.checks.verify import refuse_unsound
from quantkit.errors import FormatError, RanksError, StoppedError
from quantkit.formats.format import BuiltFormat
from quantkit.model.causal import CausalModel
from quantkit.model.fold_vectors import keep_source_folds
from quantkit.model.rotations.rotated import keep_rotation
from quantkit.pipeline.blocks import BlockWork
from quantkit.pipeline.budget.choose import Choice
from quantkit.pipeline.finish import write_finished_files
from quantkit.pipeline.onnx_export import export_onnx, graph_fingerprint
from quantkit.pipeline.options import format_duration
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.predict import Prediction
from quantkit.pipeline.records import Record
from quantkit.pipeline.report import build_report
from quantkit.pipeline.work.imatrix import GivenStats

# The first block warms caches up; from two on the time that is left is told.
_BLOCKS_TO_TELL = 2
# What rank 0 writes for the others to find.
_SIGN = "shared"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run needs, decided and checked beforehand."""

    model: CausalModel
    plan: Plan
    calibration: Calibration | None
    prediction: Prediction
    fingerprint: dict[str, str]
    max_ram: int | None = None
    max_vram: int | None = None
    device: str = "cpu"
    budget: Choice | None = None
    world: World = ALONE
    given: GivenStats | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where the result is; `written` is false if an earlier run had completed it."""

    out: Path
    written: bool
    seconds: float


def run(
    job: Job,
    out: Path,
    *,
    fresh: bool = False,
    progress: bool = True,
    profile: Path | None = None,
    deadline: float | None = None,
) -> Outcome:
    """Writes the quantized checkpoint to `out`, going on where an earlier run of the job ended.

    profile   where to write a trace of what the time went to
    deadline  of `time.monotonic()`: no step is begun that would end later, but for the first

    Raises ResumeError if `out` or its unfinished state belongs to another job and not `fresh`,
    StoppedError if the deadline came first.  With other ranks RanksError, on all of them, if they
    were not asked for the same, and LostError if one is gone.
    """
    if isinstance(job.plan.format, BuiltFormat):
        return _run_built(
            job, out, fresh=fresh, progress=progress, profile=profile, deadline=deadline
        )
    return _run(job, out, fresh=fresh, progress=progress, profile=profile, deadline=deadline)


def checkpoint_beside(out: Path) -> Path:
    """Where a checkpoint lies while the files of a format are built of it."""
    return out.with_name(f"{out.name}.checkpoint")


def _run_built(
    job: Job,
    out: Path,
    *,
    fresh: bool,
    progress: bool,
    profile: Path | None,
    deadline: float | None,
) -> Outcome:
    """The checkpoint first, beside `out`, then what is built of it; each goes on by itself.

    The checkpoint stays if building fails: it is whole, and other formats can be written from it.
    All ranks make it, and rank 0 builds.
    """
    began, world = time.monotonic(), job.world
    written = fresh or not world.first(lambda: is_built(job, out))
    if written:
        beside = checkpoint_beside(out)
        _run(job, beside, fresh=fresh, progress=progress, profile=profile, deadline=deadline)
    world.first(lambda: build(job, out, fresh=fresh, progress=progress))
    out = Path(os.path.abspath(out))
    return Outcome(out=out, written=written, seconds=time.monotonic() - began)


def is_built(job: Job, out: Path) -> bool:
    """Whether what is made of the job's checkpoint is complete at `out`.  Raises ResumeError."""
    with OutputDirectory(out) as output:
        if output.state is not OutputState.COMPLETE:
            return False
        output.check_complete(_built_fingerprint(job))
    return True


def build(job: Job, out: Path, *, fresh: bool, progress: bool) -> None:
    """Makes the files of a built format of the checkpoint beside `out`, unless that is done.

    Then the checkpoint is removed.
    """
    beside = checkpoint_beside(out)
    making = fresh or not is_built(job, out)
    if making:
        try:
            export_onnx(
                beside,
                out,
                trust_remote_code=_trusts(job),
                progress=progress,
                job=job.fingerprint,
                fresh=fresh,
            )
        except FormatError as error:
            raise FormatError(f"{error}. The quantized checkpoint is kept in {beside}") from error
    # Found beside a graph that was there before, it may be anybody's.
    if making or earlier_fingerprint(beside) == job.fingerprint:
        with disk_errors(beside):
            shutil.rmtree(beside)


def _trusts(job: Job) -> bool:
    return job.fingerprint["trust_remote_code"] == "True"


def _built_fingerprint(job: Job) -> dict[str, str]:
    return graph_fingerprint(job.fingerprint, trust_remote_code=_trusts(job))


def _run(
    job: Job,
    out: Path,
    *,
    fresh: bool,
    progress: bool,
    profile: Path | None,
    deadline: float | None,
) -> Outcome:
    world = job.world
    asked = {"--out": os.path.abspath(out), "--fresh": str(fresh), "--until": str(deadline is None)}
    same_everywhere(world, {**job.fingerprint, **asked})
    timeline = Timeline(events=profile is not None)
    with contextlib.ExitStack() as stack:
        session = Session(job, out, fresh=fresh, stack=stack, timeline=timeline, deadline=deadline)
        if session.complete:
            return session.outcome
        if profile is not None and world.rank == 0:
            stack.callback(_write_trace, profile, timeline)
        bar = stack.enter_context(tqdm(unit="step", disable=None if progress else True))
        session.begin(tell=bar.set_postfix_str)
        bar.reset(total=len(session.steps))
        bar.update(session.resumed_after)
        for step in session.pending:
            if session.settled > session.resumed_after and world.first(
                functools.partial(session.late, session.expected(step))
            ):
                raise session.stopped()
            bar.set_description(f"{step}{session.remaining}")
            session.run(step)
            bar.update()
        return session.finish()


def _write_trace(path: Path, timeline: Timeline) -> None:
    with disk_errors(path):
        path.write_text(timeline.trace(), encoding="utf-8")


class Session:
    """One job's way to its output: steps that are done once each, whatever ends the process.

    `complete` tells that an earlier run of the job has written everything.  The output stays
    locked until `stack` unwinds.
    """

    def __init__(
        self,
        job: Job,
        out: Path,
        *,
        fresh: bool,
        stack: contextlib.ExitStack,
        timeline: Timeline | None = None,
        deadline: float | None = None,
    ) -> None:
        self._deadline = deadline
        self.timeline = Timeline() if timeline is None else timeline
        self._began = time.monotonic()
        self._job, self._fresh, self._stack = job, fresh, stack
        self._world = job.world
        # Rank 0's alone, as the journal.
        self._output: OutputDirectory | None = None
        self._journal: Journal | None = None
        self._done: dict[str, Record] = {}
        # Steps that are done, but not yet so that a run could go on from there.
        self._unsettled: list[Record] = []
        self.resumed_after = 0
        self._out, self.complete = self._world.first(lambda: self._open(out))

    def _open(self, out: Path) -> tuple[Path, bool]:
        """Locks the output; returns where it is and whether it is complete."""
        self._output = self._stack.enter_context(OutputDirectory(out))
        complete = self._output.state is OutputState.COMPLETE and not self._fresh
        if complete:
            self._output.check_complete(self._job.fingerprint)
        return self._output.out, complete

    @property
    def outcome(self) -> Outcome:
        """Where the result is, for an output that was complete before."""
        seconds = time.monotonic() - self._began
        return Outcome(out=self._out, written=False, seconds=seconds)

    def begin(self, *, tell: Callable[[str], object], shared: SharedMethod | None = None) -> None:
        """Opens the journal and what steps work with.  Raises ResumeError for another job's."""
        job, world = self._job, self._world
        partial, scratch, records = world.first(self._begin)
        self._done = {str(e["step"]): Record.from_dict(e) for e in records}
        self._check_shared(scratch)
        # The ranks make as many passes; each weighs a little more or less.
        vram = free_vram(job.device) if job.max_vram is None else job.max_vram
        budgets = world.gathered(job.prediction.gram_budget(job.max_ram, vram))
        limits = [budget for budget in budgets if budget is not None]
        self.resumed_after = len(self._done)
        self._work = BlockWork(
            model=job.model,
            plan=job.plan,
            calibration=job.calibration,
            gram_budget=min(limits, default=None),
            device=job.device,
            partial=partial,
            scratch=scratch,
            done=set(self._done),
            stack=self._stack,
            tell=tell,
            shared=shared,
            # What a limit leaves is for statistics.
            keep_hidden=job.max_vram is None,
            ahead=job.device.startswith("cuda") and job.max_ram is None,
            resident=job.prediction.heals_in_memory(job.max_ram, job.max_vram, job.device),
            late=self.late,
            given=job.given,
            world=world,
        )

    def _begin(self) -> tuple[Path, Path, tuple[dict[str, Any], ...]]:
        """Opens the journal; returns the directories to work in and what is done."""
        assert self._output is not None
        self._journal = self._output.begin(self._job.fingerprint, fresh=self._fresh)
        return self._output.partial, self._output.scratch, self._journal.records()

    def _check_shared(self, scratch: Path) -> None:
        """Raises RanksError, on all ranks, if one of them does not see what rank 0 writes."""

        def write() -> str:
            sign = secrets.token_hex(8)
            with disk_errors(scratch):
                (scratch / _SIGN).write_text(sign)
            return sign

        def sees(sign: str) -> bool:
            with contextlib.suppress(OSError):
                return (scratch / _SIGN).read_text() == sign
            return False

        seen = self._world.gathered(sees(self._world.first(write)))
        if not all(seen):
            raise RanksError(
                f"{scratch.parent}: rank {seen.index(False)} does not see what rank 0 writes; "
                "--out has to lie on a disk that all machines share"
            )

    @property
    def steps(self) -> list[str]:
        """All steps in their order."""
        return self._work.steps

    @property
    def pending(self) -> list[str]:
        """The steps that are left."""
        return [step for step in self._work.steps if step not in self._done]

    @property
    def settled(self) -> int:
        """How many steps the same command would not do again."""
        return len(self._done) - len(self._unsettled)

    def late(self, seconds: float) -> bool:
        """Whether the deadline comes before so many seconds are over."""
        return self._deadline is not None and time.monotonic() + seconds > self._deadline

    def expected(self, step: str) -> float:
        """Wall seconds of a step, or before it is where it could be gone on with: those of the
        longest so far, and of healing what blocks tell."""
        found = [self.timeline.total(step).wall for step in self.timeline.steps]
        heal, stream = self._work.heal, self._work.stream
        if step == "heal" and heal is not None and stream is not None:
            forward = self.timeline.mean("block ", "forward")
            found.append(heal.seconds(forward, len(stream.batches)))
        return max(found, default=0.0)

    def stopped(self, kept: str = "") -> StoppedError:
        """What ends a run at its deadline; `kept`: how far the next step is."""
        done = self.settled
        told = f" ({kept})" if kept else ""
        return StoppedError(
            f"{self._out}: stopped before --until with {done} of {len(self.steps)} steps done, "
            f"{self.steps[done]} being next{told}; the same command goes on there"
        )

    @property
    def remaining(self) -> str:
        """What is left by the blocks that are done, from the second on, for people: ", 12 min"."""
        blocks = [step for step in self.timeline.steps if step.startswith("block ")]
        if len(blocks) < _BLOCKS_TO_TELL:
            return ""
        seconds = [self.timeline.total(step).wall for step in blocks]
        left = sum(step.startswith("block ") for step in self.pending)
        return f", {format_duration(left * statistics.median(seconds))} left"

    def run(self, step: str) -> None:
        """Does a step; it is in the journal on return, if a run can go on from there."""
        with self.timeline.step(step):
            try:
                record = self._work.run(step)
            except StoppedError as stop:
                raise self.stopped(str(stop)) from None
            self._done[step] = record
            self._unsettled.append(record)
            if self._work.settle():
                with phase("fsync"):
                    if self._journal is not None:
                        for record in self._unsettled:
                            self._journal.append(record.to_dict())
                self._unsettled.clear()
            release_free_memory()

    def finish(self) -> Outcome:
        """Writes the files around the weights and puts the output in its place."""
        peaks = self._world.gathered(peak_rss())
        return self._world.first(lambda: self._finish(max(peaks)))

    def _finish(self, peak: int) -> Outcome:
        assert self._output is not None
        job = self._job
        self._work.close()
        write_finished_files(
            self._output.partial,
            model=job.model,
            plan=job.plan,
            report=build_report(
                job.plan,
                job.calibration,
                [self._done[step] for step in self._work.steps],
                job.fingerprint,
                budget=job.budget,
            ),
            recipe=job.plan.recipe.to_dict(),
            run={
                "seconds": round(time.monotonic() - self._began, 3),
                "predicted_seconds": round(job.prediction.seconds, 1),
                "processes": self._world.size,
                "processes_on_this_machine": self._world.here,
                "peak_rss_bytes": peak,
                **peak_vram(job.device),
                "predicted_peak_bytes": job.prediction.peak(job.max_ram),
                "max_ram_bytes": job.max_ram,
                "steps_before_resume": self.resumed_after,
                "phases": self.timeline.to_dict(),
            },
        )
        keep_rotation(job.model.source, self._output.partial)
        keep_source_folds(job.model.source.home, self._output.partial)
        self._output.finish(refuse_unsound)
        return Outcome(out=self._output.out, written=True, seconds=time.monotonic() - self._began)
