"""How long a run takes: what it multiplies, reads and writes, at speeds measured here and now.

Letters: O out features, I in features, T tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from quantkit.calibration.batches import lengths_of, num_batches
from quantkit.calibration.data.tokens import Calibration
from quantkit.methods.parts import Estimated, Learning, Work
from quantkit.methods.superblock import seconds_per_weight
from quantkit.model.causal import CausalModel
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.plan import Plan

# Reading, hashing and writing.
_BYTES_PER_SECOND = 2e8
# Passes over an activation for its moments; over a block's activations beside its products.
_MOMENT_PASSES, _ACTIVATION_PASSES = 12, 20
# Values of a patch of 14 x 14 pixels, which a tower reads in one row.
_PATCH_VALUES = 14 * 14 * 3
# Loading a block, its bookkeeping, a journal line.
_BLOCK_SECONDS = 0.1
# Rows whose output error is measured.
_ERROR_ROWS = 256
# The least share of its threads' time that a process gets on cores it has for itself.
_QUIET = 0.75


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Operations per second of products in the model's dtype and in float32, numbers per second
    that an elementwise pass reads, and the share of its threads' time that the process got."""

    own: float
    wide: float
    passes: float
    share: float

    @classmethod
    def measure(
        cls,
        dtype: torch.dtype,
        clock: Callable[[], float] = time.perf_counter,
        *,
        device: str = "cpu",
    ) -> Speeds:
        """The speeds now; takes some hundredths of a second."""
        began, used = time.perf_counter(), time.process_time()
        own, wide = (_product_speed(kind, clock, device) for kind in (dtype, torch.float32))
        passes = _pass_speed(clock, device)
        wall, threads = time.perf_counter() - began, torch.get_num_threads()
        share = (time.process_time() - used) / max(wall * threads, 1e-9)
        if device != "cpu":
            # A GPU is not waited for by all threads.
            share = 1.0
        return cls(own=own, wide=wide, passes=passes, share=min(share, 1.0))

    @property
    def note(self) -> str | None:
        """What to tell if others use the cores, else None."""
        if self.share >= _QUIET:
            return None
        threads = torch.get_num_threads()
        fewer = max(1, int(threads * self.share))
        told = f"other programs are at work: {threads} threads got {self.share:.0%} of their time"
        if fewer == threads:
            return f"{told}; a run takes less on a quiet machine"
        return f"{told}, and wait for each other; OMP_NUM_THREADS={fewer} would waste less"


def duration(
    model: CausalModel,
    plan: Plan,
    calibration: Calibration | None,
    speeds: Speeds,
    *,
    processes: int = 1,
) -> float:
    """Seconds that a plan's run takes at these speeds, arithmetic being shared out evenly."""
    recipe = plan.recipe
    parts = (recipe.make_target(), recipe.make_range(), recipe.make_rounding())
    transforms = recipe.make_transforms()
    needs = recipe.needs(recipe.scheme)
    gram = calibration is not None and needs.gram == -1
    work, own, weights = Work(), 0.0, 0
    fitted: dict[Scheme, int] = {}
    inputs: dict[tuple[int, str], int] = {}
    for index in range(model.num_blocks):
        for key, refs in plan.input_groups(index):
            scheme, columns = plan.scheme_of(refs[0]), refs[0].shape[1]
            rows = sum(ref.shape[0] for ref in refs)
            inputs[index, key] = columns
            work += _work(parts, rows, columns, scheme, fitted)
            measured = sum(min(ref.shape[0], _ERROR_ROWS) for ref in refs)
            work += Work(products=3 * 2.0 * measured * columns**2 if gram else 0.0)
        for group in plan.groups[index]:
            rows = sum(ref.shape[0] for ref in group.readers)
            work += _work(transforms, rows, len(group.channel_map), recipe.scheme, {})
        weights += sum(ref.shape[0] * ref.shape[1] for ref in plan.refs[index])
    for ref in (plan.head, plan.embedding):
        if ref is not None and (scheme := plan.scheme_of(ref)).kind == "ggml":
            fitted[scheme] = fitted.get(scheme, 0) + ref.shape[0] * ref.shape[1]
    if calibration is not None:
        lengths = lengths_of(calibration)
        tokens, pairs = sum(lengths), float(sum(length**2 for length in lengths))
        runs = (2 if recipe.propagate else 1) + (needs.drift or recipe.heals)
        width = model.text_config.hidden_size * model.num_blocks
        own += 2.0 * tokens * weights * runs
        own += sum(tokens * float(columns) ** 2 for columns in inputs.values()) if gram else 0.0
        drift = sum(2.0 * tokens * float(columns) ** 2 for columns in inputs.values())
        work += Work(
            products=4.0 * pairs * width * runs + drift * needs.drift,
            passes=_MOMENT_PASSES * float(tokens) * sum(inputs.values())
            + _ACTIVATION_PASSES * float(tokens) * width * runs,
        )
        own += _towers(model, calibration, len(lengths))
        learners = (
            recipe.make_refine() if recipe.refines else None,
            recipe.make_heal() if recipe.heals else None,
        )
        for part in learners:
            if isinstance(part, Learning):
                learning, moved = _learning(model, plan, calibration, part)
                own += learning
                work += moved
        if recipe.heals and isinstance(learners[1], Learning):
            batches, read = _batches(model, calibration)
            gradients, judged = learners[1].steps(batches)
            head = 2.0 * math.prod(model.projection.shape)
            own += head * read * (4 * gradients + 2 * judged)
            own += _towers(model, calibration, gradients + judged)
    fitting = sum(count * seconds_per_weight(scheme) for scheme, count in fitted.items())
    arithmetic = (
        own / speeds.own + work.products / speeds.wide + work.passes / speeds.passes + fitting
    )
    return (
        arithmetic / processes
        + plan.layout.num_bytes / _BYTES_PER_SECOND
        + model.num_blocks * _BLOCK_SECONDS
    )


def _batches(model: CausalModel, calibration: Calibration) -> tuple[int, float]:
    """How many batches there are, and the tokens of one."""
    batches = num_batches(calibration, model.device.type)
    return batches, sum(lengths_of(calibration)) / batches


def _towers(model: CausalModel, calibration: Calibration, runs: int) -> float:
    """Operations of the towers on so many sequences, each as large as the largest."""
    if calibration.pictured is None:
        return 0.0
    patches = calibration.pictured.largest / torch.float32.itemsize / _PATCH_VALUES
    return 2.0 * runs * patches * model.towers.num_bytes / model.dtype.itemsize


def _learning(
    model: CausalModel, plan: Plan, calibration: Calibration, part: Learning
) -> tuple[float, Work]:
    """Operations of matrix products in the model's dtype, and other work, of learning in all
    blocks.  A gradient costs twice what a run of the block does."""
    lengths = lengths_of(calibration)
    length = sum(length**2 for length in lengths) / sum(lengths)
    batches, tokens = _batches(model, calibration)
    gradients, runs = part.steps(batches)
    own, work = 0.0, Work()
    for index in range(model.num_blocks):
        refs = [ref for _, group in plan.input_groups(index) for ref in group]
        taken = [ref for ref in refs if part.takes(plan.scheme_of(ref))]
        if not taken:
            continue
        weights = sum(ref.shape[0] * ref.shape[1] for ref in plan.refs[index])
        own += 2.0 * tokens * weights * (3 * gradients + runs)
        width = float(model.text_config.hidden_size)
        passes = _ACTIVATION_PASSES * tokens * width * (3 * gradients + runs)
        products = 4.0 * tokens * length * width * (3 * gradients + runs)
        work += Work(products=products, passes=passes)
        for ref in taken:
            work += part.work(*ref.shape, plan.scheme_of(ref))
    return own, work


def _work(
    parts: Sequence[object],
    rows: int,
    columns: int,
    scheme: Scheme,
    fitted: dict[Scheme, int],
) -> Work:
    """The work of parts on one input's weights; of block types of ggml what is fitted is kept."""
    if scheme.kind == "ggml":
        fitted[scheme] = fitted.get(scheme, 0) + rows * columns
    total = Work(passes=10.0 * rows * columns)
    for part in parts:
        if isinstance(part, Estimated):
            total += part.work(rows, columns, scheme)
    return total


def _product_speed(dtype: torch.dtype, clock: Callable[[], float], device: str) -> float:
    """Operations per second of a matrix product large enough to fill the device."""
    size = 384 if device == "cpu" else 4096
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, a), clock, device)


def _pass_speed(clock: Callable[[], float], device: str) -> float:
    """Numbers per second that an elementwise pass reads."""
    x = torch.ones(1 << (22 if device == "cpu" else 26), device=device)
    return x.numel() / _seconds(lambda: x.abs(), clock, device)


def _seconds(call: Callable[[], object], clock: Callable[[], float], device: str) -> float:
    """What a call takes, once it is warm."""
    repeats = 5

    def finished() -> float:
        if device != "cpu":
            torch.cuda.synchronize(device)
        return clock()

    call()
    began = finished()
    for _ in range(repeats):
        call()
    return max((finished() - began) / repeats, 1e-9)
