"""The step that heals: what blocks keep for it, the training, and the weights that come of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from quantkit.calibration.healing import Healing, Late
from quantkit.calibration.held_blocks import Held, HeldBlocks
from quantkit.calibration.processes.ranks import World
from quantkit.calibration.spans import phase
from quantkit.calibration.stream import CalibrationStream
from quantkit.model.causal import CausalModel
from quantkit.numbers.tensor import PlainScale, QuantizedTensor
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.solve import Solved

_FOLDER = "held"
# A run forward, another one, and its gradient, which takes two.
_STEP_RUNS = 4


class HealWork:
    """Holds what blocks leave until their scales have been trained; `names` are the weights that
    wait."""

    def __init__(
        self,
        model: CausalModel,
        plan: Plan,
        scratch: Path,
        *,
        done: Collection[str],
        resident: bool,
        late: Late,
        stack: contextlib.ExitStack,
        world: World,
    ) -> None:
        """done: steps of an interrupted run; resident: keep all blocks in memory while healing."""
        self._model, self._plan, self._resident, self._late = model, plan, resident, late
        self._held = held_weights(model, plan)
        self.names = {name for held in self._held for name in held}
        kept = [int(step.removeprefix("block ")) for step in done if step.startswith("block ")]
        self.blocks = HeldBlocks(
            model, self._held, scratch / _FOLDER, done=kept, stack=stack, world=world
        )
        self._values: dict[str, torch.Tensor] = {}

    def keep(self, index: int, block: nn.Module, solved: Sequence[Solved]) -> None:
        """Stores a block as it computes now."""
        tensors = {w.ref.name: w.tensor for w in solved if w.ref.name in self.names}
        with phase("writing"):
            self.blocks.keep(index, block, tensors)

    def seconds(self, forward: float, batches: int) -> float:
        """Before healing is where it could be gone on with: a look at what is held out, and a step,
        which runs a batch forward twice and backward.

        forward: what runs of all of one process's `batches` through a block took, once at least.
        """
        part = self._plan.recipe.make_heal()
        assert part is not None
        runs = _STEP_RUNS + part.judges(batches)
        return self._model.num_blocks * runs * forward / max(batches, 1)

    def run(self, stream: CalibrationStream) -> tuple[float, float]:
        """Trains; the divergence before and after.  Raises StoppedError if it is `late`."""
        part = self._plan.recipe.make_heal()
        assert part is not None
        half = {
            name: self._plan.format.scale_dtype(self._model.source.info(name).dtype)
            == torch.float16
            for name in self.names
        }
        self.blocks.complete()
        healing = Healing(
            stream,
            part,
            self.blocks,
            self._held,
            half,
            resident=self._resident,
            late=self._late,
        )
        before, after = healing.run()
        self._values = healing.values
        return float(f"{before:.6g}"), float(f"{after:.6g}")

    def tensors(self) -> Iterator[tuple[str, QuantizedTensor]]:
        """The weights by name, with the scales that training found."""
        for index, held in enumerate(self._held):
            for name in held:
                dtype = self._model.source.info(name).dtype
                tensor = self.blocks.tensor(index, name, dtype)
                scale = PlainScale(tensor=self._values[name])
                healed = dataclasses.replace(tensor, scale=scale)
                healed.check(name)
                yield name, healed


def held_weights(model: CausalModel, plan: Plan) -> list[Held]:
    """By block, the weights whose scales are trained."""
    part = plan.recipe.make_heal()
    if part is None:
        return [{} for _ in range(model.num_blocks)]
    return [
        {
            ref.name: (ref, plan.scheme_of(ref))
            for _, refs in plan.input_groups(index)
            for ref in refs
            if part.takes(plan.scheme_of(ref))
        }
        for index in range(model.num_blocks)
    ]
