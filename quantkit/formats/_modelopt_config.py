"""What ModelOpt's configuration says of a scheme, and back.

The words are those of ModelOpt 0.47 (torch/export/quant_utils.py, convert_hf_config.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.errors import CheckpointError, SchemeError
from quantkit.numbers.cache import CacheScheme
from quantkit.numbers.scheme import Scheme

# Scheme -> what ModelOpt calls it.  TensorRT-LLM knows the one in small letters only so.
ALGORITHMS: Mapping[str, str] = {
    "fp8a8_tensor": "FP8",
    "fp8a8_row": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8a8_b128": "fp8_pb_wo",
    "mxfp8a8": "MXFP8",
    "nvfp4a4": "NVFP4",
    "nvfp4a16": "W4A16_NVFP4",
}
INTEGERS, MIXED = "W4A16_AWQ", "MIXED_PRECISION"
# ModelOpt converts the configuration of these for readers of config groups, and of no others.
_GROUPED = ("FP8", "NVFP4", "W4A16_NVFP4")
_READ = {algorithm.upper(): name for name, algorithm in ALGORITHMS.items()}


def algorithm_of(scheme: Scheme) -> str | None:
    """What ModelOpt calls the scheme; None if it is not held."""
    integers = scheme.kind == "int" and scheme.bits == 4 and scheme.activation_bits == 16
    if integers and scheme.symmetric and scheme.group_size is not None:
        return INTEGERS
    return ALGORITHMS.get(scheme.name)


def entry_of(scheme: Scheme) -> dict[str, Any]:
    """What is said of a layer of the scheme, or of all."""
    algorithm = algorithm_of(scheme)
    entry: dict[str, Any] = {"quant_algo": algorithm}
    if scheme.kind in ("int", "nvfp4", "mxfp8"):
        entry["group_size"] = scheme.group_size
    if algorithm == INTEGERS:
        entry |= {"has_zero_point": False, "pre_quant_scale": True}
    return entry


def groups_of(scheme: Scheme) -> dict[str, Any]:
    """The config groups that go with it, or nothing."""
    if algorithm_of(scheme) not in _GROUPED:
        return {}
    numbers: dict[str, Any] = {"dynamic": False, "num_bits": scheme.bits, "type": "float"}
    if scheme.group_size is not None:
        numbers["group_size"] = scheme.group_size
    group = {"weights": numbers, "targets": ["Linear"]}
    if scheme.activation_bits != 16:
        group["input_activations"] = dict(numbers)
    return {"config_groups": {"group_0": group}}


@dataclass(frozen=True, kw_only=True)
class Told:
    """A `quantization_config`, ours or another's: ModelOpt has written two forms of it.

    algorithm   of all weights, in capitals
    layers      the algorithm of each layer by name, where they are mixed
    weight_only whether the groups, if there are any, say that no input is rounded
    """

    algorithm: str
    layers: Mapping[str, str]
    weight_only: bool
    cache: CacheScheme | None

    @classmethod
    def of(cls, config: object) -> Told:
        """Raises CheckpointError for what is none, or says something unknown."""
        if not isinstance(config, Mapping):
            raise CheckpointError("config.json: there is no quantization_config")
        nested = config.get("quantization")
        inner = nested if isinstance(nested, Mapping) else config
        layers = inner.get("quantized_layers") or {}
        if not isinstance(layers, Mapping) or not all(
            isinstance(entry, Mapping) and isinstance(entry.get("quant_algo"), str)
            for entry in layers.values()
        ):
            raise CheckpointError(
                "config.json: quantization_config: quantized_layers must give each layer's "
                "quant_algo"
            )
        algorithm = inner.get("quant_algo")
        if not isinstance(algorithm, str):
            raise CheckpointError("config.json: quantization_config has no quant_algo")
        return cls(
            algorithm=algorithm.upper(),
            layers={name: entry["quant_algo"].upper() for name, entry in layers.items()},
            weight_only=_weight_only(config.get("config_groups")),
            cache=_cache(inner),
        )

    def scheme_of(
        self, name: str, shape: Sequence[int], scales: Sequence[int], has_input_scale: bool
    ) -> Scheme:
        """The scheme of a weight whose codes and scales are stored in these shapes.

        Raises CheckpointError if the configuration does not tell one that is read.
        """
        algorithm = self.algorithm
        if algorithm == MIXED:
            algorithm = self.layers.get(name.removesuffix(".weight"), "none")
        if algorithm == "NVFP4" and self.weight_only and not has_input_scale:
            algorithm = "W4A16_NVFP4"
        if algorithm in _READ:
            return Scheme.parse(_READ[algorithm])
        groups = scales[1] if len(scales) == 2 else 0
        if algorithm == INTEGERS and groups and not shape[1] % groups:
            try:
                return Scheme.parse(f"w4a16_g{shape[1] // groups}")
            except SchemeError as error:
                raise CheckpointError(f"{name}: {error}") from error
        if algorithm == INTEGERS:
            raise CheckpointError(
                f"{name}: scales of shape {list(scales)} do not divide a row of {shape[1]} codes"
            )
        known = ", ".join([*_READ, INTEGERS])
        raise CheckpointError(
            f"{name}: it has scales, but quantization_config gives it {algorithm}; read are {known}"
        )


def _weight_only(groups: object) -> bool:
    if not isinstance(groups, Mapping):
        return False
    entries = list(groups.values())
    return bool(entries) and all(
        isinstance(entry, Mapping) and entry.get("input_activations") is None for entry in entries
    )


def _cache(config: Mapping[str, Any]) -> CacheScheme | None:
    """The cache that either form tells of; CheckpointError for one that is not float8."""
    told = config.get("kv_cache_quant_algo", config.get("kv_cache_scheme"))
    if told is None:
        return None
    scheme = isinstance(told, Mapping) and (told.get("num_bits"), told.get("type")) == (8, "float")
    if scheme or (isinstance(told, str) and told.upper() == "FP8"):
        return CacheScheme(name="fp8")
    raise CheckpointError(
        f"config.json: a cache of keys and values as {told} is unknown; FP8 is read"
    )
