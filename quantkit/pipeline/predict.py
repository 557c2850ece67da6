"""What a run will need: resident memory, disk and time, before any work is done.

Letters: I in features, O out features.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from quantkit.calibration.batches import BATCH_TOKENS, num_batches
from quantkit.calibration.data.tokens import Calibration
from quantkit.calibration.gather import gram_bytes
from quantkit.calibration.healing import LOGITS
from quantkit.calibration.held_blocks import held_layout
from quantkit.calibration.kept_training import KEPT_TIMES
from quantkit.calibration.processes.tree import num_leaves, sums_at_once
from quantkit.checkpoint.memory import current_rss, format_size, machine_bytes, with_spare
from quantkit.checkpoint.sidefiles import side_bytes
from quantkit.errors import BudgetError
from quantkit.methods.parts import Heal, Refine
from quantkit.methods.superblock import working_bytes
from quantkit.model.causal import CausalModel
from quantkit.model.rotations.rotated import Rotated
from quantkit.pipeline.duration import Speeds, duration
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.solve import BLOCK_CHUNK
from quantkit.pipeline.work.heal import held_weights

# Allocator slack, lazily imported modules, thread stacks and copy buffers.
_OVERHEAD_BYTES = 96 * 2**20
# Float32 copies of a group of weights while it is solved: the weights, corrected columns, pending
# errors, range candidates and their errors.
_SOLVE_COPIES = 5
# Float32 copies of a part of a weight on a block type: weight, values, codes, differences; with
# statistics also targets and errors.
_CHUNK_COPIES, _CALIBRATED_COPIES = 4, 6
# Float32 copies of one weight within a step; of hidden states within a block.
_STEP_COPIES, _HIDDEN_COPIES = 4, 12
# Float32 copies of a piece of logits: the original's and the model's, their exponentials, slopes.
_LOGIT_COPIES = 8
# Square matrices beside the Gram matrix while it is factorised.
_FACTOR_COPIES = 3


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a process of a run needs at most, in bytes, phase by phase.

    base        the process before work starts: imports, configuration, small tensors
    block       one block in the model's dtype
    forward     activations of one batch inside a block
    gram        statistics of the input group that needs most; they are gathered in passes that fit
    grams       statistics of a whole block, if they are to be gathered in one pass
    sums        partial sums of them that are held at once while they are gathered
    solve       float32 working copies of the group of weights that needs most
    heal        training of scales beside a block: activations, logits, the head, what is learned
    resident    all blocks at once, if they are to stay in memory meanwhile
    towers      towers for images with the activations of one sequence, before the first block
    seconds     at the speeds measured now
    note        what to know about them, or None
    here        processes on this machine, each of which needs as much
    """

    base: int
    block: int
    forward: int
    gram: int
    grams: int
    solve: int
    disk: int
    seconds: float
    note: str | None = None
    heal: int = 0
    resident: int = 0
    towers: int = 0
    sums: int = 1
    here: int = 1

    @property
    def smallest(self) -> int:
        """Peak resident bytes with statistics gathered in as many passes as there are inputs."""
        gathering, solving = self.forward + self.sums * self.gram, self.gram + self.solve
        return self.base + self.block + max(gathering, solving, self.heal, self.towers)

    @property
    def largest(self) -> int:
        """Peak resident bytes with a block's statistics gathered in one pass."""
        gathering, solving = self.forward + self.sums * self.grams, self.grams + self.solve
        return self.base + self.block + max(gathering, solving, self.heal, self.towers)

    def peak(self, max_ram: int | None) -> int:
        """The predicted peak under a budget."""
        resident = self.resident if self.heals_in_memory(max_ram, None, "cpu") else 0
        healing = self.base + self.block + self.heal + resident
        if max_ram is None:
            return max(self.largest, healing)
        return max(min(self.largest, max(max_ram, self.smallest)), healing)

    def peak_vram(self, max_vram: int | None) -> int:
        """The predicted peak on a GPU, where blocks and statistics live there."""
        least = max(self.smallest - self.base, self.block + self.heal)
        return max(min(self.largest - self.base, max_vram or self.largest), least)

    def machine_note(self, max_ram: int | None) -> str | None:
        """What to know where processes need more than the machine has together, else None."""
        needed = self.here * self.peak(max_ram)
        if needed <= machine_bytes():
            return None
        who = "this process" if self.here == 1 else f"{self.here} processes"
        return (
            f"{who} may take {format_size(needed)} of memory, and this machine has "
            f"{format_size(machine_bytes())}; give a --max-ram"
        )

    def gram_budget(self, max_ram: int | None, max_vram: int | None = None) -> int | None:
        """Bytes of statistics that are gathered in one pass, finished; None for no limit.

        With a GPU, blocks and statistics live there and `max_vram` limits them instead.
        """
        limit, base = (max_ram, self.base) if max_vram is None else (max_vram, 0)
        if limit is None or base + self.largest - self.base <= limit:
            return None
        left = limit - base - self.block
        return min((left - self.forward) // self.sums, left - self.solve)

    def heals_in_memory(self, max_ram: int | None, max_vram: int | None, device: str) -> bool:
        """Whether all blocks stay in memory while they are healed, which changes the time only:
        they fit into the budget, or without one into a quarter of the device's memory."""
        needed = self.block + self.heal + self.resident
        if device.startswith("cuda"):
            limit = torch.cuda.mem_get_info(device)[1] // 4 if max_vram is None else max_vram
            return needed <= limit
        if max_ram is not None:
            return self.base + needed <= max_ram
        return self.here * needed <= machine_bytes() // 4

    def check_vram(self, max_vram: int | None) -> None:
        """Raises BudgetError with the smallest --max-vram that works if the plan cannot fit."""
        needed = self.smallest - self.base
        if max_vram is not None and needed > max_vram:
            raise BudgetError(
                f"--max-vram {format_size(max_vram)} is too small: one block, its activations and "
                f"statistics need {format_size(needed)}; the smallest that works is --max-vram "
                f"{-(-needed // 2**20)}MiB"
            )

    def check(self, max_ram: int | None) -> None:
        """Raises BudgetError with the smallest --max-ram that works if the plan cannot fit."""
        if max_ram is not None and self.smallest > max_ram:
            raise BudgetError(
                f"--max-ram {format_size(max_ram)} is too small: this needs "
                f"{format_size(self.smallest)} (process {format_size(self.base)}, one block "
                f"{format_size(self.block)}, activations {format_size(self.forward)}, statistics "
                f"{format_size(self.sums * self.gram)}, solving {format_size(self.solve)}"
                + (f", towers {format_size(self.towers)}" if self.towers else "")
                + (f", healing {format_size(self.heal)}" if self.heal else "")
                + f"); the smallest that works is --max-ram {with_spare(self.smallest) // 2**20}MiB"
            )


def predict(
    model: CausalModel,
    plan: Plan,
    calibration: Calibration | None,
    *,
    device: str = "cpu",
    processes: int = 1,
    here: int = 1,
) -> Prediction:
    """The prediction for a plan.  Times a matrix product for a fraction of a second.

    Memory is that of each of the processes, disk of all together.
    """
    recipe = plan.recipe
    needs = recipe.needs(recipe.scheme)
    block = max(model.block_bytes(index) for index in range(model.num_blocks))
    largest_tensor = max(ref.shape[0] * ref.shape[1] for refs in plan.refs for ref in refs)
    turning = model.source.working_bytes if isinstance(model.source, Rotated) else 0
    # Before the trials, whose memory may stay with the process for a while.
    base = current_rss() + _OVERHEAD_BYTES
    alone = dataclasses.replace(needs, drift=False)
    grams, gram, solve, inputs = 0, 0, 0, 0
    for index in range(model.num_blocks):
        block_grams = 0
        inputs_seen: dict[str, int] = {}
        for key, refs in plan.input_groups(index):
            columns = refs[0].shape[1]
            rows = sum(ref.shape[0] for ref in refs)
            size = gram_bytes(columns, needs) if calibration is not None else 0
            block_grams += 0 if key in inputs_seen else size
            inputs_seen[key] = columns
            gram = max(gram, size)
            square = gram_bytes(columns, alone)
            factor = _FACTOR_COPIES * square if needs.gram == -1 and size else 0
            scheme = plan.scheme_of(refs[0])
            if scheme.kind == "ggml":
                largest = max(ref.shape[0] for ref in refs)
                solve = max(solve, _block_bytes(largest, columns, size, factor))
            else:
                solve = max(solve, _SOLVE_COPIES * 4 * rows * columns + factor)
        grams = max(grams, block_grams)
        inputs = max(inputs, sum(inputs_seen.values()))
    forward, tokens, towers, calls, sums = 0, 0, 0, 0, 1
    if calibration is not None:
        samples, length = calibration.ids.shape
        tokens = samples * length
        sums = sums_at_once(num_leaves(num_batches(calibration, device)), processes)
        if (pictured := calibration.pictured) is not None:
            towers = model.towers.working_bytes(pictured.largest)
            # Masks of up to two kinds, rotary tables, and what is added between blocks.
            wanted = 2 * length + 4 * model.text_config.hidden_size
            calls = tokens * wanted * model.dtype.itemsize
        batch = max(BATCH_TOKENS[device.split(":")[0]], length)
        width = max(max(ref.shape) for refs in plan.refs for ref in refs)
        # A gated MLP holds three activations of its width, statistics two float32 copies of one.
        forward = batch * width * (3 * model.dtype.itemsize + 2 * 4)
        if needs.drift:
            # The original's inputs of a block wait for those that are to be compared with them.
            forward += batch * (inputs * model.dtype.itemsize + 2 * width * 4)
    for _, refs in plan.extra_groups():
        rows, columns = sum(ref.shape[0] for ref in refs), refs[0].shape[1]
        solve = max(solve, (_SOLVE_COPIES + 1) * 4 * rows * columns)
    for ref in (plan.head, plan.embedding):
        if ref is not None and (scheme := plan.scheme_of(ref)).kind == "ggml":
            rows, columns = ref.shape
            calibrated = calibration is not None and ref.role == "head" and needs.gram == -1
            size = gram_bytes(columns, needs) if calibrated else 0
            matrix = (4 + model.source.info(ref.name).dtype.itemsize) * rows * columns
            working = _block_bytes(rows, columns, size, _FACTOR_COPIES * size)
            solve = max(solve, size + matrix + working)
    if calibration is not None and recipe.refines:
        solve = max(solve, _refining_bytes(model, plan, batch))
    heal, resident, held = 0, 0, 0
    if calibration is not None and recipe.heals:
        layout = held_layout(model, held_weights(model, plan))[0]
        resident = model.num_blocks * block + layout.num_bytes
        places = layout.places.items()
        scales = sum(at.info.nbytes for name, (_, at) in places if name.endswith(":scale"))
        held = layout.num_bytes + KEPT_TIMES * scales
        # Towers make what enters the first block anew in every step.
        heal = _healing_bytes(model, plan, batch) + towers
    if processes > 1:
        # Sums of one input that come from others; what a process solved until it is told to them.
        forward += 2 * gram
        solve += block
    speeds = Speeds.measure(model.dtype, device=device)
    hidden = 2 * tokens * model.text_config.hidden_size * model.dtype.itemsize
    hidden *= 1 + (needs.drift or recipe.heals)
    spill = grams if calibration is not None else 0
    beside = side_bytes(model.source) if plan.layout.side_files is None else 0
    return Prediction(
        base=base,
        # With a target the original of the block stays beside it.
        block=block * (1 + needs.drift) + 4 * largest_tensor + turning,
        forward=forward,
        gram=gram,
        grams=grams,
        solve=solve,
        heal=heal,
        resident=resident,
        disk=plan.layout.num_bytes + beside + hidden + spill + held + calls,
        seconds=duration(model, plan, calibration, speeds, processes=processes),
        note=speeds.note,
        towers=towers,
        sums=sums,
        here=here,
    )


def _refining_bytes(model: CausalModel, plan: Plan, tokens: int) -> int:
    """What the refinement of a block holds: numbers for each weight, and activations of a batch
    that wait for their gradient."""
    part = plan.recipe.make_refine()
    assert part is not None
    most = 0
    for index in range(model.num_blocks):
        taken = _taken(plan, index, part)
        if taken:
            # Its code, and its gradient in the model's dtype.
            numbers = sum(taken) * (1 + model.dtype.itemsize + part.held_bytes())
            numbers += _STEP_COPIES * 4 * max(taken)
            most = max(most, numbers + _waiting_bytes(model, plan, index, tokens))
    return most


def _healing_bytes(model: CausalModel, plan: Plan, tokens: int) -> int:
    """What healing holds beside a block: its codes and gradients, activations of a batch in it and
    between all blocks, the head, logits, and six numbers for each scale."""
    part = plan.recipe.make_heal()
    assert part is not None
    itemsize, most, weights = model.dtype.itemsize, 0, 0
    for index in range(model.num_blocks):
        taken = _taken(plan, index, part)
        weights += sum(taken)
        numbers = sum(taken) * (1 + itemsize) + _STEP_COPIES * 4 * max(taken, default=0)
        most = max(most, numbers + _waiting_bytes(model, plan, index, tokens))
    rows, columns = model.projection.shape
    between = (model.num_blocks + 2) * tokens * model.text_config.hidden_size * itemsize
    size = min(scheme.group_size or columns for scheme in plan.recipe.schemes)
    learned = 6 * 4 * weights // size
    return most + rows * columns * itemsize + between + learned + _LOGIT_COPIES * 4 * LOGITS


def _taken(plan: Plan, index: int, part: Refine | Heal) -> list[int]:
    """Sizes of the block's weights that a part takes."""
    return [
        ref.shape[0] * ref.shape[1]
        for _, refs in plan.input_groups(index)
        for ref in refs
        if part.takes(plan.scheme_of(ref))
    ]


def _waiting_bytes(model: CausalModel, plan: Plan, index: int, tokens: int) -> int:
    """Activations of a batch that wait for their gradient: both sides of each product and what lies
    between, norms and residuals in float32."""
    plain, experts = 0, []
    for _, refs in plan.input_groups(index):
        width = sum(ref.shape[0] for ref in refs) + refs[0].shape[1]
        if refs[0].role == "expert":
            experts.append(width)
        else:
            plain += width
    # Each token goes to a few of the experts, whose first and last products have their own inputs.
    routed = getattr(model.text_config, "num_experts_per_tok", None)
    count = len(experts) if routed is None else min(len(experts), 2 * routed)
    width = plain + sum(sorted(experts)[len(experts) - count :])
    hidden = _HIDDEN_COPIES * 4 * model.text_config.hidden_size
    return tokens * (2 * width * model.dtype.itemsize + hidden)


def _block_bytes(rows: int, columns: int, gram: int, factor: int) -> int:
    """Working copies while a weight on a block type is factorised, fitted and solved in parts."""
    chunk = min(rows, max(1, BLOCK_CHUNK // columns)) * columns
    copies = _CALIBRATED_COPIES if gram else _CHUNK_COPIES
    fitting = 4 * chunk + working_bytes(chunk // columns, columns)
    # One factor stays while the weight is solved; its codes and its values are whole.
    solving = max(factor + 4 * chunk, gram + max(fitting, 4 * copies * chunk))
    return solving + (1 + 4) * rows * columns
