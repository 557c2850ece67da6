"""The block loop: how a checkpoint becomes a quantized one, resumable after every step.

source --load_block--> block --run--> statistics --transform, range, rounding--> packed tensors
packed tensors --> OUT.partial (synced) --> journal line --> ... --> manifest --> rename to OUT
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from quantkit.calibration.tokens import Calibration
from quantkit.checkpoint.memory import peak_rss, release_free_memory
from quantkit.checkpoint.output import OutputDirectory, OutputState
from quantkit.checks.verify import refuse_unsound
from quantkit.model.causal import CausalModel
from quantkit.model.fold_vectors import keep_source_folds
from quantkit.pipeline.blocks import BlockWork, SharedMethod
from quantkit.pipeline.finish import write_finished_files
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.predict import Prediction
from quantkit.pipeline.records import Record
from quantkit.pipeline.report import build_report


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


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where the result is; `written` is false if an earlier run had completed it."""

    out: Path
    written: bool
    seconds: float


def run(job: Job, out: Path, *, fresh: bool = False, progress: bool = True) -> Outcome:
    """Writes the quantized checkpoint to `out`, going on where an earlier run of the job ended.

    Raises ResumeError if `out` or its unfinished state belongs to another job and not `fresh`.
    """
    with contextlib.ExitStack() as stack:
        session = Session(job, out, fresh=fresh, stack=stack)
        if session.complete:
            return session.outcome
        bar = stack.enter_context(tqdm(unit="step", disable=None if progress else True))
        session.begin(tell=bar.set_postfix_str)
        bar.reset(total=len(session.steps))
        bar.update(session.resumed_after)
        for step in session.pending:
            bar.set_description(step)
            session.run(step)
            bar.update()
        return session.finish()


class Session:
    """One job's way to its output: steps that are done once each, whatever ends the process.

    `complete` tells that an earlier run of the job has written everything.  The output stays
    locked until `stack` unwinds.
    """

    def __init__(self, job: Job, out: Path, *, fresh: bool, stack: contextlib.ExitStack) -> None:
        self._began = time.monotonic()
        self._job, self._fresh, self._stack = job, fresh, stack
        self._output = stack.enter_context(OutputDirectory(out))
        self._done: dict[str, Record] = {}
        self.resumed_after = 0
        self.complete = self._output.state is OutputState.COMPLETE and not fresh
        if self.complete:
            self._output.check_complete(job.fingerprint)

    @property
    def outcome(self) -> Outcome:
        """Where the result is, for an output that was complete before."""
        seconds = time.monotonic() - self._began
        return Outcome(out=self._output.out, written=False, seconds=seconds)

    def begin(self, *, tell: Callable[[str], object], shared: SharedMethod | None = None) -> None:
        """Opens the journal and what steps work with.  Raises ResumeError for another job's."""
        job, output = self._job, self._output
        self._journal = output.begin(job.fingerprint, fresh=self._fresh)
        self._done = {str(e["step"]): Record.from_dict(e) for e in self._journal.records()}
        self.resumed_after = len(self._done)
        self._work = BlockWork(
            model=job.model,
            plan=job.plan,
            calibration=job.calibration,
            gram_budget=job.prediction.gram_budget(job.max_ram, job.max_vram),
            device=job.device,
            partial=output.partial,
            scratch=output.scratch,
            done=set(self._done),
            stack=self._stack,
            tell=tell,
            shared=shared,
        )

    @property
    def steps(self) -> list[str]:
        """All steps in their order."""
        return self._work.steps

    @property
    def pending(self) -> list[str]:
        """The steps that are left."""
        return [step for step in self._work.steps if step not in self._done]

    def run(self, step: str) -> None:
        """Does a step; it is in the journal on return."""
        self._done[step] = record = self._work.run(step)
        self._journal.append(record.to_dict())
        release_free_memory()

    def finish(self) -> Outcome:
        """Writes the files around the weights and puts the output in its place."""
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
            ),
            recipe=job.plan.recipe.to_dict(),
            run={
                "seconds": round(time.monotonic() - self._began, 3),
                "predicted_seconds": round(job.prediction.seconds, 1),
                "peak_rss_bytes": peak_rss(),
                "predicted_peak_bytes": job.prediction.peak(job.max_ram),
                "max_ram_bytes": job.max_ram,
                "steps_before_resume": self.resumed_after,
            },
        )
        keep_source_folds(job.model.source.home, self._output.partial)
        self._output.finish(refuse_unsound)
        return Outcome(out=self._output.out, written=True, seconds=time.monotonic() - self._began)
