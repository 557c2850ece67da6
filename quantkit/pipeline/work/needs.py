"""What a plan's method needs at each input and weight: statistics, and the scheme as stored."""

from __future__ import annotations

import dataclasses

import torch

from quantkit.calibration.shared import BlockNeeds
from quantkit.methods.recipe import input_needs
from quantkit.methods.stats import Needs
from quantkit.model.causal import CausalModel
from quantkit.model.refs import WeightRef
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.plan import Plan


def block_needs(
    plan: Plan, index: int, *, parts: bool = True, transforms: bool = True
) -> BlockNeeds:
    """The statistics that a plan's method reads at the inputs of a block.

    Those of its target, range and rounding, those of its transforms, or both.
    """
    recipe = plan.recipe
    solving = recipe.make_target(), recipe.make_range(), recipe.make_rounding()
    needs: dict[str, Needs] = {}
    features: dict[str, int] = {}
    for key, refs in plan.input_groups(index) if parts else ():
        needs[key] = input_needs(solving, plan.scheme_of(refs[0]))
        if refs[0].role == "expert":
            # The two models route differently.
            needs[key] = dataclasses.replace(needs[key], drift=False)
        features[key] = refs[0].shape[1]
    for group in plan.groups[index] if transforms else ():
        for transform in recipe.make_transforms():
            for key in group.inputs:
                needs[key] = needs.get(key, Needs()) | transform.needs(recipe.scheme)
                features[key] = len(group.channel_map)
    needs = {key: fitting(need, features[key]) for key, need in needs.items() if need}
    return BlockNeeds(needs=needs, features=features)


def fitting(needs: Needs, features: int) -> Needs:
    """The needs without a block diagonal that does not divide the features.

    Only flat blocks (nf4, fp4) get there: they straddle rows, and parts use moments instead.
    """
    if needs.gram > 0 and features % needs.gram:
        return dataclasses.replace(needs, gram=0, moments=True)
    return needs


def stored_scheme(model: CausalModel, plan: Plan, ref: WeightRef, scheme: Scheme) -> Scheme:
    """A weight's scheme, with what the format stores its scales in."""
    dtype = plan.format.scale_dtype(model.source.info(ref.name).dtype)
    return dataclasses.replace(scheme, half_scales=dtype == torch.float16)
