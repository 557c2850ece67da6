"""What becomes of layers that predict further tokens, which transformers' class does not have."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.errors import RecipeError
from quantkit.methods.recipe import Recipe
from quantkit.model.causal import CausalModel
from quantkit.model.extra_layers import announced
from quantkit.model.refs import WeightRef
from quantkit.numbers.scheme import Scheme
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
    asked = f"--mtp {recipe.mtp.name}"
    if not model.extra_layers:
        raise RecipeError(f"{asked}: {_none(model)}; leave it out")
    if whole:
        raise RecipeError(f"{asked}: a gguf holds no such layers; choose another --format")
    if recipe.mtp.static_input:
        raise RecipeError(
            f"{asked}: inputs of extra layers are not calibrated, and the scheme rounds them by a "
            "scale that is; choose one without static activations"
        )
    found = {ref.name: decide(recipe, ref) for layer in extra_weights(model) for ref in layer}
    return {
        name: (recipe.mtp, "--mtp") if why == f"method {recipe.method}" else (scheme, why)
        for name, (scheme, why) in found.items()
    }


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
