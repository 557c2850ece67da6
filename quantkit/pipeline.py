"""The block loop: how a checkpoint becomes a quantized one, resumable after every step.

source --load_block--> block --run--> statistics --transform, range, rounding--> packed tensors
packed tensors --> OUT.partial (synced) --> journal line --> ... --> manifest --> rename to OUT
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from quantkit.blocks import BlockWork
from quantkit.budget import peak_rss, release_free_memory
from quantkit.calibration import Calibration
from quantkit.finish import write_finished_files
from quantkit.models import CausalModel
from quantkit.output import OutputDirectory, OutputState
from quantkit.plan import Plan
from quantkit.predict import Prediction
from quantkit.report import build_report
from quantkit.steps import Record


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
    began = time.monotonic()
    with OutputDirectory(out) as output, contextlib.ExitStack() as stack:
        if output.state is OutputState.COMPLETE and not fresh:
            output.check_complete(job.fingerprint)
            return Outcome(out=output.out, written=False, seconds=time.monotonic() - began)
        journal = output.begin(job.fingerprint, fresh=fresh)
        done = {str(entry["step"]): Record.from_dict(entry) for entry in journal.records()}
        resumed_after = len(done)
        bar = stack.enter_context(tqdm(unit="step", disable=None if progress else True))
        work = BlockWork(
            model=job.model,
            plan=job.plan,
            calibration=job.calibration,
            gram_budget=job.prediction.gram_budget(job.max_ram, job.max_vram),
            device=job.device,
            partial=output.partial,
            scratch=output.scratch,
            done=set(done),
            stack=stack,
            tell=bar.set_postfix_str,
        )
        bar.reset(total=len(work.steps))
        bar.update(resumed_after)
        for step in work.steps:
            if step not in done:
                bar.set_description(step)
                done[step] = record = work.run(step)
                journal.append(record.to_dict())
                release_free_memory()
                bar.update()
        work.close()
        write_finished_files(
            output.partial,
            model=job.model,
            plan=job.plan,
            report=build_report(
                job.plan, job.calibration, [done[step] for step in work.steps], job.fingerprint
            ),
            recipe=job.plan.recipe.to_dict(),
            run={
                "seconds": round(time.monotonic() - began, 3),
                "predicted_seconds": round(job.prediction.seconds, 1),
                "peak_rss_bytes": peak_rss(),
                "predicted_peak_bytes": job.prediction.peak(job.max_ram),
                "max_ram_bytes": job.max_ram,
                "steps_before_resume": resumed_after,
            },
        )
        output.finish()
        return Outcome(out=output.out, written=True, seconds=time.monotonic() - began)
