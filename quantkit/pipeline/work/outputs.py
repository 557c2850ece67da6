"""Which tensors of the output a step of a run writes."""

from __future__ import annotations

from collections.abc import Set

from quantkit.pipeline.plan import Plan


def outputs_of(plan: Plan, healed: Set[str], step: str) -> list[str]:
    """Names of the output tensors that a step writes; `healed`: weights that wait for "heal"."""
    if step == "embed":
        return []
    if step == "heal":
        return [info.name for fate in plan.fates if fate.name in healed for info in fate.output]
    if step == "head":
        return [info.name for info in plan.head_layout]
    if step == "embedding":
        assert plan.embedding is not None
        return [plan.embedding.name]
    if step == "extra":
        wanted = {ref.name for ref in plan.extra}
        outside = plan.fates_of_block.get(None, ())
        return [info.name for fate in outside if fate.name in wanted for info in fate.output]
    if step == "outside":
        kept = [f for f in plan.fates_of_block.get(None, ()) if f.fate != "quantized"]
        return [info.name for fate in kept for info in fate.output]
    fates = plan.fates_of_block.get(int(step.removeprefix("block ")), ())
    return [info.name for fate in fates if fate.name not in healed for info in fate.output]
