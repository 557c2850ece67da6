"""compressed-tensors' config groups: what `quantization_config` says of a scheme, and back.

The words are those of compressed-tensors 0.20 (quantization/quant_args.py, quant_scheme.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from quantkit.errors import CheckpointError
from quantkit.formats.format import PlannedWeight
from quantkit.numbers.scheme import Scheme

# The module class that a config group names to mean all weights not named otherwise.
CLASS = "Linear"
Layout = Literal[
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "mxfp8-quantized",
    "mxfp4-pack-quantized",
    "nvfp4-pack-quantized",
]
# Layouts of the kinds that have only one.
_LAYOUTS: Mapping[str, Layout] = {
    "fp8": "float-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
# dtypes of stored scales, where they differ from the model's.
_SCALE_DTYPES = {"mxfp8": "torch.uint8", "mxfp4": "torch.uint8", "nvfp4": "torch.float8_e4m3fn"}
# Float schemes that the format holds.  A checkpoint's group is looked for among them.
FLOATS = (
    "fp8a8_row",
    "fp8a16_row",
    "fp8a8_b128",
    "fp8a8_tensor",
    "mxfp8a8",
    "mxfp8a16",
    "mxfp4a4",
    "mxfp4a16",
    "nvfp4a4",
    "nvfp4a16",
)


def layout_of(scheme: Scheme) -> Layout:
    """How weights of the scheme are stored."""
    if scheme.kind != "int":
        return _LAYOUTS[scheme.kind]
    integers = scheme.activation_bits == 8 and not scheme.float_input
    return "int-quantized" if integers else "pack-quantized"


def module_names(chosen: Sequence[PlannedWeight], everyone: Sequence[PlannedWeight]) -> list[str]:
    """Targets that match exactly the chosen weights, by checkpoint and by module name.

    Experts, of which there are thousands, are named by one regex where all of a kind are chosen.
    """
    names = {weight.name for weight in chosen}
    split = {_pattern(w.name) for w in everyone if w.expert and w.name not in names}
    targets: dict[str, None] = {}
    for weight in chosen:
        if weight.expert and _pattern(weight.name) not in split:
            targets["re:" + _pattern(weight.name)] = None
            continue
        targets[weight.name.removesuffix(".weight")] = None
        if not weight.expert:
            targets[weight.module] = None
    return list(targets)


def group_of(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """One entry of config_groups."""
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.kind == "int" else "float",
        "symmetric": scheme.symmetric,
        "strategy": _strategy(scheme),
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    if scheme.share == "block":
        weights |= {"group_size": None, "block_structure": [scheme.group_size, scheme.group_size]}
    if scheme.kind in _SCALE_DTYPES:
        weights["scale_dtype"] = _SCALE_DTYPES[scheme.kind]
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": _activations(scheme, weights),
        "output_activations": None,
        "format": layout_of(scheme),
    }


def read_groups(config: object) -> list[tuple[str, Scheme]]:
    """(target, scheme) of every config group, exact names first, then regexes, then classes."""
    if not isinstance(config, dict) or not isinstance(config.get("config_groups"), dict):
        raise CheckpointError("config.json: quantization_config has no config_groups")
    found: list[tuple[str, Scheme]] = []
    for key, group in config["config_groups"].items():
        where = f"config.json: quantization_config: {key}"
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise CheckpointError(f"{where}: there is no description of weights")
        layout = group.get("format") or config.get("format")
        scheme = _read_scheme(where, group["weights"], group.get("input_activations"), layout)
        found += [(target, scheme) for target in _read_targets(where, group.get("targets"))]
    return sorted(found, key=lambda item: (item[0] == CLASS, item[0].startswith("re:")))


def scheme_for(
    name: str, groups: Sequence[tuple[str, Scheme]], layouts: Sequence[Layout], stored: str
) -> Scheme:
    """The scheme of the group that targets the weight, of those in one of the layouts."""
    module = name.removesuffix(".weight")
    for target, scheme in groups:
        if layout_of(scheme) not in layouts:
            continue
        if target.startswith("re:"):
            if re.match(target.removeprefix("re:"), module):
                return scheme
        elif target in (module, CLASS):
            return scheme
    raise CheckpointError(f"{name}: it is stored {stored}, but no config group targets it so")


def _strategy(scheme: Scheme) -> str:
    if scheme.share != "group":
        return scheme.share
    if scheme.kind == "nvfp4":
        return "tensor_group"
    return "channel" if scheme.group_size is None else "group"


def _activations(scheme: Scheme, weights: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the input is rounded: by token, or as the weights are."""
    if scheme.activation_bits == 16:
        return None
    found = {
        "num_bits": scheme.activation_bits,
        "type": "float" if scheme.float_input else weights["type"],
        "symmetric": True,
        "strategy": "group" if scheme.share == "block" else weights["strategy"],
        "group_size": scheme.group_size,
        # Scales of nvfp4's groups are taken from each token, their divisor is not.
        "dynamic": "local" if scheme.kind == "nvfp4" else not scheme.static_input,
    }
    if scheme.kind == "int" or found["strategy"] == "channel":
        found |= {"strategy": "token", "group_size": None}
    if scheme.kind in _SCALE_DTYPES:
        found["scale_dtype"] = _SCALE_DTYPES[scheme.kind]
    return found


def _pattern(name: str) -> str:
    """A regex for the weight's module that leaves block and expert numbers open."""
    parts = name.removesuffix(".weight").split(".")
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parts) + "$"


def _read_targets(where: str, targets: object) -> list[str]:
    """The targets of a config group; regexes are checked here, once."""
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}: targets must be a list of names")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise CheckpointError(f"{where}: target {target!r} is no pattern: {error}") from error
    return targets


def _read_scheme(where: str, weights: Mapping[str, Any], activations: Any, layout: Any) -> Scheme:
    bits, strategy = weights.get("num_bits", 0), weights.get("strategy")
    group_size = weights.get("group_size")
    grouped = type(group_size) is int and group_size > 0
    if strategy is None:
        strategy = "group" if grouped else "channel"
    if weights.get("type", "int") != "int":
        return _read_floats(where, weights, activations, layout)
    # Integers that meet e4m3 numbers are packed like those that meet 16 bits.
    tokens = group_of(Scheme.parse("w4afp8_g128"), [])["input_activations"]
    floats = _words(activations) == _words(tokens)
    known = (
        type(bits) is int
        and 2 <= bits <= 8
        and (strategy == "channel" or (strategy == "group" and grouped))
        and weights.get("actorder") in (None, "weight", "static")
        and layout in ("pack-quantized", "int-quantized")
        and (activations is None or floats) == (layout == "pack-quantized")
        and (activations is None or bits == 4 or (bits, strategy, floats) == (8, "channel", False))
        and (activations is None or bool(weights.get("symmetric", True)))
    )
    if not known:
        raise CheckpointError(
            f"{where}: {layout} with {bits} bit {weights.get('type')} weights per {strategy} "
            f"(group_size {group_size}) is not read; pack-quantized with 2 to 8 bit weights per "
            "group or channel, int-quantized w8a8 per channel, symmetric w4a8, w4afp8 and floats "
            "are"
        )
    return Scheme(
        kind="int",
        bits=bits,
        group_size=group_size if strategy == "group" else None,
        symmetric=bool(weights.get("symmetric", True)),
        activation_bits=16 if activations is None else 8,
        float_input=floats,
    )


def _read_floats(where: str, weights: Mapping[str, Any], activations: Any, layout: Any) -> Scheme:
    """The float scheme that is described with the same words."""
    for name in FLOATS:
        group = group_of(Scheme.parse(name), [])
        wanted = (group["format"], _words(group["weights"]), _words(group["input_activations"]))
        if (layout, _words(weights), _words(activations)) == wanted:
            return Scheme.parse(name)
    raise CheckpointError(
        f"{where}: {layout} with {weights.get('num_bits')} bit float weights per "
        f"{weights.get('strategy')} (group_size {weights.get('group_size')}) is not read with "
        f"these input_activations; what is written of {', '.join(FLOATS)} is"
    )


def _words(described: Any) -> tuple[object, ...]:
    """What tells one description of numbers from another; () if it is none."""
    if not isinstance(described, dict):
        return ()
    keys = ("num_bits", "type", "strategy", "group_size", "block_structure", "dynamic")
    words = [described.get(key) for key in keys]
    return (*(None if word == -1 else word for word in words), described.get("symmetric", True))
