"""What becomes of weights outside the stack of blocks, which are rounded without data if asked for:
layers that predict further tokens, which transformers' class does not have, and towers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantkit.checkpoint.sidefiles import MODULES
from quantkit.errors import RecipeError
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.formats.format import CacheFormat, Format, PlannedWeight
from quantkit.formats.readers import may_decode_at_load
from quantkit.methods.recipe import Recipe
from quantkit.model.causal import CausalModel
from quantkit.model.extra_layers import announced
from quantkit.model.refs import WeightRef
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.cache import CachePlan
from quantkit.pipeline.decide import decide


def extra_weights(model: CausalModel) -> tuple[tuple[WeightRef, ...], ...]:
    """The weights of each extra layer."""
    return tuple(layer.refs(model.weights(layer.like)) for layer in model.extra_layers)


def decide_extra(
    recipe: Recipe, model: CausalModel, whole: bool
) -> dict[str, tuple[Scheme | None, str]]:
    """Name -> scheme and reason of extra layers' weights that --mtp quantizes.

    `whole` says that the format is a container of the model.  Raises RecipeError where there are
    none, the container has no place for them, or the scheme needs data.
    """
    if recipe.mtp is None:
        return {}
    weights = [ref for layer in extra_weights(model) for ref in layer]
    return _by_option(
        recipe,
        weights,
        ("--mtp", recipe.mtp),
        kind="extra layers",
        lacks=None if model.extra_layers else _none(model),
        unheld="such layers" if whole else None,
    )


def decide_towers(
    recipe: Recipe, model: CausalModel, whole: bool
) -> dict[str, tuple[Scheme | None, str]]:
    """Name -> scheme and reason of towers' weights that --towers quantizes.

    `whole` says that the format is a container of the model.  Raises RecipeError where there are
    none, the container has no place for them, or the scheme needs data.
    """
    if recipe.towers is None:
        return {}
    weights = model.towers.weights
    return _by_option(
        recipe,
        weights,
        ("--towers", recipe.towers),
        kind="towers",
        lacks=None if weights else "the model has no tower with linear layers",
        unheld="towers" if whole else None,
    )


def _by_option(
    recipe: Recipe,
    weights: Sequence[WeightRef],
    option: tuple[str, Scheme],
    *,
    kind: str,
    lacks: str | None,
    unheld: str | None,
) -> dict[str, tuple[Scheme | None, str]]:
    """Name -> scheme and reason of weights that an option has rounded without data.

    lacks   why the model has none of the kind; unheld: what a gguf holds none of, if it is one
    """
    flag, given = option
    asked = f"{flag} {given.name}"
    if lacks is not None:
        raise RecipeError(f"{asked}: {lacks}; leave it out")
    if unheld is not None:
        raise RecipeError(f"{asked}: a gguf holds no {unheld}; choose another --format")
    if given.static_input:
        raise RecipeError(
            f"{asked}: inputs of {kind} are not calibrated, and the scheme rounds them by a scale "
            "that is; choose one without static activations"
        )
    found = {ref.name: decide(recipe, ref) for ref in weights}
    return {
        name: (given, flag) if why == f"method {recipe.method}" else (scheme, why)
        for name, (scheme, why) in found.items()
    }


def unread(model: CausalModel, fmt: Format, weights: Sequence[PlannedWeight]) -> dict[str, str]:
    """Runtime -> why it does not read quantized towers or models without a head, if it does not."""
    paths = {ref.name: ref.parameter.removesuffix(".weight") for ref in model.towers.weights}
    found: dict[str, str] = {}
    if model.head is None:
        found["vllm"] = "it was not tried with models that have no head"
    for weight in weights:
        if weight.scheme is None or weight.name not in paths:
            continue
        found["vllm"] = "it was not tried whether it reads quantized towers"
        stored = fmt.layout(weight, model.source.info(weight.name).dtype)
        if all(info.name != weight.name for info in stored):
            kind = model.towers.initialises(paths[weight.name])
            if kind is not None:
                found["transformers"] = (
                    f"its {kind} sets the weight of every linear layer before loading, and one "
                    f"packed as {weight.scheme.name} has none; --towers w8a8_row has one"
                )
    return found


def extra_config(
    model: CausalModel, fmt: Format, weights: Sequence[PlannedWeight], cache: CachePlan | None
) -> dict[str, Any]:
    """What the `quantization_config` says besides: of the cache, and of models that give vectors.

    sentence-transformers 6.2 calls a model's forward past the hook by which compressed-tensors
    decodes weights at the first use, so what it may load is to be decoded while loading.
    """
    found: dict[str, Any] = {}
    if cache is not None and isinstance(fmt, CacheFormat):
        found |= fmt.cache_config(cache.scheme)
    vectors = model.head is None or MODULES in model.source.side_files()
    if vectors and isinstance(fmt, CompressedTensors) and may_decode_at_load(weights):
        found["dequantize"] = True
    return found


def extra_reason(model: CausalModel, name: str) -> str | None:
    """Why a tensor of an extra layer stays; None if it belongs to none."""
    if any(name.startswith(layer.root) for layer in model.extra_layers):
        return "layer that predicts further tokens, beyond the model class"
    return None


def extra_notes(model: CausalModel, quantized: Sequence[WeightRef]) -> tuple[str, ...]:
    """A line on the extra layers, or on those that config.json names and the checkpoint lacks."""
    layers = model.extra_layers
    if layers:
        listed = ", ".join(layer.prefix.removesuffix(".") for layer in layers)
        what = f"{len(quantized)} weights are quantized" if quantized else "kept as they are"
        more = "" if quantized else "; --mtp SCHEME would quantize them"
        return (f"layers that predict further tokens ({listed}): {what}{more}",)
    return (_none(model),) if announced(model.source.config) is not None else ()


def _none(model: CausalModel) -> str:
    named = announced(model.source.config)
    if named is None:
        return "the checkpoint has no layer like the model's blocks beyond them"
    return (
        f"config.json says {named[0]} {named[1]}, but the checkpoint holds no such layer like the "
        "model's blocks"
    )
