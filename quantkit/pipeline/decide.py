"""What becomes of each weight: the recipe's scheme, a rule's, a fitted one, or none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set

from quantkit.checkpoint.memory import format_size
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.errors import FormatError, ModelError, RecipeError, SchemeError
from quantkit.formats.format import Container, Format, PartFormat, PlannedWeight, WholeFormat
from quantkit.formats.registry import asked_format, default_format, make_format
from quantkit.methods.recipe import KEEP, Recipe
from quantkit.methods.rules import ROLES
from quantkit.model.causal import CausalModel
from quantkit.model.fitting import Decisions, fit_groups, shared_inputs
from quantkit.model.probes.roles import purposes_of
from quantkit.model.refs import WeightRef
from quantkit.model.trace import OUTSIDE, UNREACHED
from quantkit.numbers.scheme import Scheme

# More of the blocks' weights than this stays in full precision only if the user says so.
_MOST_KEPT = 0.2


def head_name(model: CausalModel) -> str | None:
    """The head's name in the output: its own, even where it shares the embedding's tensor."""
    if model.head is None:
        return None
    return model.head.parameter if model.head_tied else model.head.name


def with_roles(recipe: Recipe, model: CausalModel, format_name: str | None) -> Recipe:
    """The recipe whose rules by role know their weights; the recipe itself if it has none.

    A rule for the head is `head`, unless that is given too.  Raises RecipeError for a role that no
    weight has or whose weights the format cannot hold, ModelError as `purposes_of` does.
    """
    if all(rule.role is None for rule in recipe.rules):
        return recipe
    roles = purposes_of(model)
    there = [role for role in ROLES if role in roles.values()]
    rules, head = [], recipe.head
    for rule in recipe.rules:
        if rule.role is not None and rule.role not in there:
            raise RecipeError(
                f"{rule.told}: no weight of this model has that role; it has {', '.join(there)}"
            )
        if rule.role == "head":
            # As of all rules the first one decides.
            head = rule.scheme if head is None else head
        if rule.role == "embeddings" and rule.scheme is not None:
            fmt = asked_format(format_name, recipe.scheme)
            if not isinstance(fmt, WholeFormat):
                raise RecipeError(f"{rule.told}: tables are quantized in gguf only")
        names = frozenset(name for name, found in roles.items() if found == rule.role)
        rules.append(rule if rule.role is None else dataclasses.replace(rule, names=names))
    return dataclasses.replace(recipe, rules=tuple(rules), head=head)


def planned_head(
    model: CausalModel, scheme: Scheme | None, name: str | None = None
) -> list[PlannedWeight]:
    """The head as formats know it, by the name it has in the output; none of a headless model."""
    name = name or head_name(model)
    if model.head is None or name is None:
        return []
    return [dataclasses.replace(planned(model, model.head, scheme), name=name)]


def check_rules(recipe: Recipe, model: CausalModel) -> None:
    """RecipeError if a rule matches no tensor."""
    names = model.source.names()
    for rule in recipe.rules:
        if rule.role is None and not any(rule.matches(name) for name in names):
            raise RecipeError(
                f"rule or --skip {rule.match!r} matches no tensor; names look like "
                f"{', '.join(ref.name for ref in model.weights(0)[:2])}"
            )


def check_experts(recipe: Recipe, model: CausalModel) -> None:
    """Raises unless statistics of experts can be what the recipe asks for.

    RecipeError where there are no experts or nothing is calibrated, ModelError where the model's
    own code picks them.
    """
    if recipe.experts == "routed":
        return
    found = {index: model.routed(index) for index in range(model.num_blocks)}
    if not recipe.calibrated or set(found.values()) == {None}:
        why = "the model has no experts" if recipe.calibrated else f"{recipe.method} needs no text"
        raise RecipeError(f"--experts {recipe.experts}: {why}; leave it out")
    own = next((index for index, routed in found.items() if routed is False), None)
    if own is not None:
        raise ModelError(
            f"--experts {recipe.experts}: {model.block_path(own)} picks experts in code of its own "
            "and not through transformers' ExpertsInterface, or without a router's product before "
            "it; leave it out"
        )


def notes_on(model: CausalModel, recipe: Recipe) -> list[str]:
    """What to know of a model that is one block, and of scales that a recipe cannot heal."""
    notes = []
    if model.whole:
        notes.append(
            f"the model's layers do not simply follow one another, so {model.block_path(0)} is "
            f"worked on as one block of {format_size(model.block_bytes(0))}"
        )
    part = recipe.make_heal()
    if model.head is None and recipe.heals:
        notes.append("scales are not healed, as the model has no head that predicts tokens")
    if part is not None and not recipe.heals and any(map(part.takes, recipe.block_schemes)):
        notes.append("scales are not healed, as some weights of blocks round their inputs")
    return notes


def unquantizable(model: CausalModel) -> dict[str, str]:
    """Checkpoint name -> reason, of all blocks' matrices that stay as they are."""
    return {name: why for i in range(model.num_blocks) for name, why in model.kept(i).items()}


def check_enough(recipe: Recipe, model: CausalModel) -> None:
    """ModelError if much of what the blocks hold cannot be quantized and no rule keeps it."""
    reasons = unquantizable(model)
    stay = {
        name: math.prod(model.source.info(name).shape)
        for name, why in reasons.items()
        if why not in (UNREACHED, OUTSIDE) and recipe.rule_for(name) is None
    }
    refs = {ref.name for i in range(model.num_blocks) for ref in model.weights(i)}
    if model.whole:
        # Not to call a model quantized of which only a small part is.
        known = refs | model.tables | reasons.keys()
        known |= set() if model.head is None else {model.head.name}
        for name in model.block_tensors(0):
            shape = model.source.info(name).shape
            if name not in known and len(shape) > 1 and recipe.rule_for(name) is None:
                stay[name], reasons[name] = math.prod(shape), "no matrix product reads it"
    rest = sum(math.prod(ref.shape) for i in range(model.num_blocks) for ref in model.weights(i))
    share = sum(stay.values()) / max(sum(stay.values()) + rest, 1)
    if share > _MOST_KEPT:
        name = max(stay, key=lambda key: stay[key])
        raise ModelError(
            f"{name}: {reasons[name]}; {share:.0%} of the weights in blocks would stay as they "
            f"are: accept that with --skip, as in --skip '*{name.split('.')[-2]}*'"
        )


def decide(recipe: Recipe, ref: WeightRef) -> tuple[Scheme | None, str]:
    """The weight's scheme (None: kept) and the reason."""
    if ref.role == "router":
        return None, "router"
    if ref.kept is not None:
        return None, ref.kept
    rule = recipe.rule_for(ref.name)
    if rule is not None:
        return rule.scheme, rule.told
    return recipe.scheme, f"method {recipe.method}"


def decide_all(
    recipe: Recipe, model: CausalModel, fmt: Format | None, refs: Sequence[Sequence[WeightRef]]
) -> dict[str, tuple[Scheme | None, str]]:
    """`decide` for every weight of the blocks; a format that is for some weights leaves others.

    Raises FormatError if it would leave all.
    """
    every = [ref for block in refs for ref in block]
    found = {ref.name: decide(recipe, ref) for ref in every}
    left: str | None = None
    if isinstance(fmt, PartFormat):
        for ref in every:
            scheme, _ = found[ref.name]
            if scheme is None or recipe.rule_for(ref.name) is not None:
                continue
            if (reason := fmt.leaves(planned(model, ref, scheme))) is not None:
                found[ref.name] = None, reason
                left = f"{ref.name}: {fmt.name} leaves it as it is: {reason}"
    if left is not None and all(scheme is None for scheme, _ in found.values()):
        raise FormatError(f"{left}; the model has none of those; choose another --format")
    return found


def decide_fed(
    recipe: Recipe, model: CausalModel, refs: Sequence[Sequence[WeightRef]]
) -> dict[str, tuple[Scheme | None, str]]:
    """Name -> what `recurrent` says, of weights that feed a state and that no rule speaks of.

    Those that share their input go with them: serving runtimes fuse them.  RecipeError where the
    model carries no state, ModelError where probing cannot tell.
    """
    if recipe.recurrent is None:
        return {}
    scheme = None if recipe.recurrent == KEEP else recipe.recurrent
    why = f"--recurrent {recipe.recurrent_name}: "
    if model.whole:
        raise ModelError(
            f"{why}the model is worked on as one block, in which what reaches a later token by way "
            "of a state is not told apart; name weights in rules instead"
        )
    found: dict[str, tuple[Scheme | None, str]] = {}
    for index, block in enumerate(refs):
        fed = model.fed(index)
        for shared in shared_inputs(block):
            first = next((ref.name for ref in shared if ref.name in fed), None)
            for ref in shared if first is not None else ():
                feeds = "feeds a state that later tokens read"
                reads = f"reads the input of {first}, which {feeds}"
                found[ref.name] = scheme, why + (feeds if ref.name in fed else reads)
    if not found:
        raise RecipeError(
            f"{why}no weight of this model feeds a state carried along the sequence; leave it out"
        )
    return {name: told for name, told in found.items() if recipe.rule_for(name) is None}


def spread(
    recipe: Recipe, container: Container, fmt: Format, refs: Sequence[Sequence[WeightRef]]
) -> dict[str, tuple[Scheme | None, str]]:
    """Decisions of a mix, for the matrices that no rule speaks of."""
    if (reason := fmt.supports(recipe.scheme)) is not None:
        raise SchemeError(f"--scheme {recipe.scheme.name}: with --format {fmt.name} {reason}")
    kept = ("router", "read")
    shapes = {ref.name: ref.shape for block in refs for ref in block if ref.role not in kept}
    shapes |= container.matrices()
    rules = {name: recipe.rule_for(name) for name in shapes}
    # What a rule decides is not the mix's to say, nor to tell of.
    mixed = {name: shape for name, shape in shapes.items() if rules[name] is None}
    found = container.spread(recipe.scheme, mixed)
    ruled = {name: rule for name, rule in rules.items() if rule is not None}
    return found | {name: (rule.scheme, rule.told) for name, rule in ruled.items()}


def fit(
    model: CausalModel, recipe: Recipe, decisions: Decisions, fmt: Format | None
) -> dict[str, tuple[Scheme | None, str]]:
    """The decisions with groups that divide what has the recipe's own scheme: see `fit_groups`."""
    refs = [model.weights(index) for index in range(model.num_blocks)]
    own = [
        [
            ref
            for ref in block
            if ref.role != "router"
            and ref.kept is None
            and recipe.rule_for(ref.name) is None
            and decisions[ref.name][0] == recipe.scheme
        ]
        for block in refs
    ]
    model_type = str(model.source.config.get("model_type", ""))

    def served(schemes: Mapping[str, Scheme | None]) -> Set[str] | None:
        weights = [planned(model, ref, schemes[ref.name]) for block in refs for ref in block]
        weights += planned_head(model, schemes.get(head_name(model) or ""))
        chosen = fmt or make_format(default_format(recipe.scheme))
        if chosen.supports_together(weights) is not None:
            return None
        readers = chosen.readers(weights, model_type)
        return {runtime for runtime, reason in readers.items() if reason is None}

    return fit_groups(recipe.scheme, own, decisions, served)


def check_shared(refs: Sequence[WeightRef], schemes: Mapping[str, Scheme | None]) -> None:
    """Weights that share an input, and the experts of one layer, are fused by serving runtimes."""
    for first, *others in shared_inputs(refs):
        for ref in others:
            if schemes[ref.name] == schemes[first.name]:
                continue
            mine, its = (_spelled(schemes[r.name]) for r in (ref, first))
            shared = "are experts of one layer" if ref.role == "expert" else "read the same input"
            raise RecipeError(
                f"{ref.name} ({mine}) and {first.name} ({its}) {shared}, which vLLM fuses: give "
                "both the same scheme or keep both"
            )


def _spelled(scheme: Scheme | None) -> str:
    return "kept" if scheme is None else scheme.name


def kept_reason(model: CausalModel, info: TensorInfo, in_block: bool) -> str:
    """Why a tensor stays of which nothing else is known."""
    if info.name in model.towers.names:
        return "in a tower beside the text"
    if info.name in model.tables:
        return "embedding"
    if len(info.shape) < 2:
        return "norm or bias"
    return "not a matrix product's weight" if in_block else "outside of the blocks that run on text"


def table_ref(name: str, shape: tuple[int, int]) -> WeightRef:
    """The table of embeddings as a weight: it multiplies nothing and reads tokens."""
    return WeightRef(name=name, block=None, shape=shape, parameter=name, input="tokens")


def planned(model: CausalModel, ref: WeightRef, scheme: Scheme | None) -> PlannedWeight:
    """The weight as formats know it."""
    path = (
        f"{model.block_path(ref.block)}.{ref.parameter}" if ref.block is not None else ref.parameter
    )
    return PlannedWeight(
        name=ref.name,
        module=path.removeprefix(model.added).removesuffix(".weight"),
        shape=ref.shape,
        scheme=scheme,
        transposed=ref.transposed and ref.expert is None,
        expert=ref.role == "expert",
        split=ref.split,
        joined=ref.expert is None and ref.rows is not None,
    )
