"""A block's weights moved once more, all at once, for the sake of the block's outputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from quantkit.calibration.block_loss import BlockLoss
from quantkit.calibration.stream import CalibrationStream
from quantkit.methods.parts import Refine
from quantkit.pipeline.plan import Plan
from quantkit.pipeline.solve import Solved, refine_weights
from quantkit.pipeline.work.needs import stored_scheme


def refine_block_(
    part: Refine,
    stream: CalibrationStream,
    plan: Plan,
    index: int,
    block: nn.Module,
    solved: Sequence[Solved],
) -> tuple[dict[str, Solved], tuple[float, float] | None]:
    """The weights that the part takes, by name, as they lie in the block now; the loss of the
    block's outputs on text that is held out, before and after, None if it takes none."""
    taken = {weight.ref.name: weight for weight in solved if part.takes(weight.tensor.scheme)}
    if not taken:
        return {}, None
    refs = [weight.ref for weight in taken.values()]
    half = [
        stored_scheme(stream.model, plan, ref, taken[ref.name].tensor.scheme).half_scales
        for ref in refs
    ]
    wanted = stream.hidden if stream.original is None else stream.original
    outputs = BlockLoss(stream, index, block, refs, wanted)
    moved, loss = refine_weights(part, list(taken.values()), half, outputs)
    for weight in moved:
        taken[weight.ref.name] = weight
        stream.model.set_weight_(block, weight.ref, weight.tensor.dequantize())
    return taken, loss
