"""Mixed recipes: which block type each tensor of a GGUF file gets, named as llama-quantize does.

The choices follow llama.cpp's src/llama-quant.cpp, so that a file of ours and one of theirs with
the same name have the same size; left out are its special cases for Falcon and for Q4_0 and Q5_0
with an importance matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.errors import SchemeError
from quantkit.formats.gguf.file import TENSOR_TYPES
from quantkit.formats.gguf.floats import FLOAT_TYPES
from quantkit.numbers.scheme import Scheme

# Name -> (the type of most tensors, the owner's number of the file type).
RECIPES: Mapping[str, tuple[str, int]] = {
    "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2), "q4_1": ("Q4_1", 3), "q5_0": ("Q5_0", 8),
    "q5_1": ("Q5_1", 9), "q2_k": ("Q2_K", 10), "q3_k_m": ("Q3_K", 12), "q4_k_m": ("Q4_K", 15),
    "q5_k_m": ("Q5_K", 17), "q6_k": ("Q6_K", 18), "mxfp4a16": ("MXFP4", 38),
}  # fmt: skip
# Weights in a block of each type.
SIZES = {label: size for label, size, _ in TENSOR_TYPES.values()}
# What llama-quantize takes where a row is no whole number of 256-weight blocks.
_SMALLER = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_VALUES = ("attn_v", "attn_qkv")
_DOWN = ("ffn_down", "ffn_down_exps")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A matrix to quantize: its stem, its block (-1 outside), and the columns of its rows."""

    name: str
    stem: str
    block: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A tensor's type, "F16" if no block fits; `fallback` names the type that did not fit."""

    type: str
    fallback: str | None = None


def check_recipe(name: str) -> None:
    """Nothing if the recipe exists, else SchemeError with those that do."""
    if name not in RECIPES:
        raise SchemeError(
            f"--scheme {name}: with --format gguf it is one of {', '.join(RECIPES)}; other schemes "
            "are quantized to another format first and then written with `quantkit export`"
        )


def mix_named_after(block: str) -> str:
    """The recipe most of whose tensors have a block type, as in "q4_k" -> "q4_k_m"."""
    return next(name for name, (base, _) in RECIPES.items() if base == block.upper())


def scheme_of(label: str) -> Scheme:
    """The scheme of a matrix of this type."""
    return Scheme.parse(FLOAT_TYPES[label][0] if label in FLOAT_TYPES else label.lower())


def choose_types(
    recipe: str,
    weights: Sequence[Weight],
    *,
    layers: int,
    heads: int,
    key_value_heads: int,
    experts: int,
    tied: bool,
) -> dict[str, Choice]:
    """GGUF name -> type, for the matrices of a model.

    `tied`: the token embedding is the output head too, and is treated as that.
    """
    check_recipe(recipe)
    model = _Model(
        layers=layers, groups=heads // max(key_value_heads, 1), experts=experts, tied=tied
    )
    found = {}
    for weight in weights:
        wanted = _wanted(recipe, weight, model)
        fitting = wanted
        if weight.columns % SIZES[wanted]:
            fitting = _SMALLER.get(wanted, wanted)
        if weight.columns % SIZES[fitting]:
            fitting = "F16"
        found[weight.name] = Choice(type=fitting, fallback=None if fitting == wanted else wanted)
    return found


@dataclass(frozen=True, kw_only=True)
class _Model:
    layers: int
    groups: int
    experts: int
    tied: bool


def _wanted(recipe: str, weight: Weight, model: _Model) -> str:
    base = RECIPES[recipe][0]
    block, stem = weight.block, weight.stem
    if base == "MXFP4":
        # llama-quantize has these for experts only, and Q8_0 for all else.
        return "Q8_0" if stem in ("output", "token_embd") else base
    if stem == "output" or (stem == "token_embd" and model.tied):
        return "Q8_0" if base == "Q8_0" or weight.columns % SIZES[base] else "Q6_K"
    more = _more_bits(block, model.layers) and recipe in ("q4_k_m", "q5_k_m")
    if stem in _VALUES:
        if model.experts == 8:
            return "Q8_0"
        chosen = base
        if recipe == "q2_k":
            chosen = "Q4_K" if model.groups >= 4 else "Q3_K"
        elif recipe == "q3_k_m":
            chosen = "Q5_K" if block < 2 else "Q4_K"
        elif more:
            chosen = "Q6_K"
        # Eight heads share the values of a 70B model: more bits there cost next to nothing.
        shared = model.layers == 80 and model.groups > 1
        return "Q5_K" if shared and chosen in ("Q3_K", "Q4_K") else chosen
    if stem == "attn_k" and model.experts == 8:
        return "Q8_0"
    if stem in _DOWN:
        if recipe == "q2_k":
            return "Q3_K"
        if recipe == "q3_k_m":
            return "Q5_K" if block < model.layers // 16 else "Q4_K"
        return "Q6_K" if more else base
    if stem == "attn_output":
        if model.experts == 8:
            return "Q5_K" if recipe in ("q2_k", "q3_k_m", "q4_k_m") else base
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K"}.get(recipe, base)
    return base


def _more_bits(block: int, layers: int) -> bool:
    """The first and last eighth of the blocks, and every third between."""
    eighth = layers // 8
    return block < eighth or block >= 7 * layers // 8 or (block - eighth) % 3 == 2
