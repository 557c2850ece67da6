"""compressed-tensors: the layout of llm-compressor, read by vLLM and transformers.

Shapes: O out features, I in features, G groups per row, b bits.  For weight NAME (less ".weight"):

pack-quantized (integers of 2 to 8 bits, 16-bit activations)
    NAME.weight_packed      int32 [O, ceil(I*b/32)]   codes, the first in the lowest bits
    NAME.weight_scale       the model's dtype [O, G]
    NAME.weight_shape       int64 [2] = (O, I)
    NAME.weight_zero_point  int32 [ceil(O*b/32), G]   packed along O; asymmetric schemes only
int-quantized (w8a8_row) and float-quantized (fp8a8_row, fp8a16_row)
    NAME.weight             int8 [O, I] = code - 128, or float8_e4m3fn [O, I]
    NAME.weight_scale       the model's dtype [O, 1]

Codes lie without gaps, across words, as compressed-tensors 0.20 writes them.  Its older releases
left bits of each word empty at 3, 5, 6 and 7 bits; their shapes differ, and they are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError
from quantkit.formats.bitpack import num_words, pack_rows, unpack_rows
from quantkit.formats.format import (
    PlannedWeight,
    StoredWeight,
    check_divides,
    check_stored,
    named_as_weight,
)
from quantkit.formats.readers import (
    compressed_tensors_readers,
    decompresses_at_load,
    outside_blocks,
)
from quantkit.formats.stored import round_scale, stored_scale
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

_PACKED, _SCALE, _SHAPE, _ZERO = "_packed", "_scale", "_shape", "_zero_point"
# The module class that a config group names to mean all weights not named otherwise.
_CLASS = "Linear"
Layout = Literal["pack-quantized", "int-quantized", "float-quantized"]
# Layouts that keep one number per weight under the weight's own name, and its dtype.
_PLAIN: dict[Layout, torch.dtype] = {
    "int-quantized": torch.int8,
    "float-quantized": torch.float8_e4m3fn,
}


class CompressedTensors:
    """Integers of 2 to 8 bits and FP8, each weight under its own scheme (vLLM, transformers)."""

    name: ClassVar[str] = "compressed-tensors"
    holds_permuted: ClassVar[bool] = False

    def supports(self, scheme: Scheme) -> str | None:
        """None if the scheme is an integer, or fp8."""
        if scheme.kind == "fp8":
            return None if scheme.group_size is None else "it holds fp8 with a scale per row"
        return None if scheme.kind == "int" else f"it holds integers and fp8, not {scheme.kind}"

    def supports_shape(self, weight: PlannedWeight) -> str | None:
        """None: rows of any length are padded; only the name must be that of a 2-D weight."""
        return named_as_weight(weight)

    def supports_together(self, weights: Sequence[PlannedWeight]) -> str | None:
        """None: each weight may have its own scheme."""
        return None

    def readers(
        self, weights: Sequence[PlannedWeight], model_type: str
    ) -> Mapping[str, str | None]:
        """Runtime -> None if it reads the checkpoint, else why not; see formats/readers.py."""
        return compressed_tensors_readers(weights, model_type)

    def layout(self, weight: PlannedWeight, dtype: torch.dtype) -> tuple[TensorInfo, ...]:
        """Exactly the tensors `pack` returns, for a weight of this dtype in the source."""
        scheme, (rows, columns) = _scheme(weight), weight.shape
        groups = scheme.num_groups(weight.shape) // rows
        scale = TensorInfo(
            name=weight.name + _SCALE, dtype=self.scale_dtype(dtype), shape=(rows, groups)
        )
        if (layout := _layout_of(scheme)) in _PLAIN:
            shape = (columns, rows) if weight.transposed else (rows, columns)
            return TensorInfo(name=weight.name, dtype=_PLAIN[layout], shape=shape), scale
        packed = (rows, num_words(columns, scheme.bits))
        infos = (
            TensorInfo(name=weight.name + _PACKED, dtype=torch.int32, shape=packed),
            scale,
            TensorInfo(name=weight.name + _SHAPE, dtype=torch.int64, shape=(2,)),
        )
        if scheme.symmetric:
            return infos
        zeros = (num_words(rows, scheme.bits), groups)
        return (*infos, TensorInfo(name=weight.name + _ZERO, dtype=torch.int32, shape=zeros))

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The model's own."""
        return dtype

    def represent(self, tensor: QuantizedTensor) -> tuple[QuantizedTensor, str | None]:
        """The tensor with scales in the weight's dtype, and what was rounded for that, or None."""
        return round_scale(tensor, self.scale_dtype(tensor.dtype))

    def pack(self, weight: PlannedWeight, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Checkpoint name -> contiguous CPU tensor.  NumericsError if a scale is not exact."""
        scheme = tensor.scheme
        assert scheme == weight.scheme and tensor.columns is None
        scale = stored_scale(weight.name, tensor, self.scale_dtype(tensor.dtype))
        codes = tensor.codes.cpu()
        if (layout := _layout_of(scheme)) in _PLAIN:
            # A Conv1D reader (vLLM's gpt2) transposes every tensor called "weight".
            numbers = (codes ^ 128 if scheme.kind == "int" else codes).view(_PLAIN[layout])
            stored = numbers.T.contiguous() if weight.transposed else numbers.contiguous()
            return {weight.name: stored, weight.name + _SCALE: scale}
        tensors = {
            weight.name + _PACKED: pack_rows(codes, scheme.bits),
            weight.name + _SCALE: scale,
            weight.name + _SHAPE: torch.tensor(tensor.shape, dtype=torch.int64),
        }
        if tensor.zero is not None:
            zero_GO = tensor.zero.cpu().to(torch.uint8).T
            tensors[weight.name + _ZERO] = pack_rows(zero_GO, scheme.bits).T.contiguous()
        return tensors

    def config(
        self,
        weights: Sequence[PlannedWeight],
        *,
        model_type: str,
        dtype: torch.dtype,
        others: Sequence[TensorInfo] = (),
    ) -> dict[str, Any]:
        """The `quantization_config`; `others` are the model's remaining tensors, all kept.

        The commonest scheme targets "Linear", any other names its modules; all else is ignored by
        its checkpoint name and, where transformers calls it otherwise, by its module name.
        """
        counts = Counter(weight.scheme for weight in weights if weight.scheme is not None)
        groups: dict[str, Any] = {}
        for scheme, _ in counts.most_common():
            members = [weight for weight in weights if weight.scheme == scheme]
            if not groups:
                # vLLM's head is no "Linear"; it wants its name.
                named = [weight for weight in members if outside_blocks(weight)]
                targets = [_CLASS, *_module_names(named, weights)]
            else:
                targets = _module_names(members, weights)
            groups[f"group_{len(groups)}"] = _group(scheme, targets)
        kept = _module_names([weight for weight in weights if weight.scheme is None], weights)
        known = {weight.name for weight in weights}
        kept += [
            info.name.removesuffix(".weight")
            for info in others
            if len(info.shape) == 2 and info.name.endswith(".weight") and info.name not in known
        ]
        layouts = {group["format"] for group in groups.values()}
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(dict.fromkeys(kept)),
            "kv_cache_scheme": None,
        }
        if decompresses_at_load(weights, model_type):
            config["dequantize"] = True
        return config

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """Weight name -> how it is stored, for every quantized weight of a checkpoint."""
        groups = _read_groups(source.config.get("quantization_config"))
        names = set(source.names())
        found: dict[str, StoredWeight] = {}
        for name in sorted(names):
            if name.endswith(".weight" + _PACKED):
                stored = _packed_weight(name.removesuffix(_PACKED), groups, source, names)
                found[stored.name] = stored
        for layout, dtype in _PLAIN.items():
            found.update(_plain_weights(source, names, groups, layout, dtype))
        return found

    def unpack(self, weight: StoredWeight, source: Source) -> QuantizedTensor:
        """The inverse of `pack`: same codes, scale and zero."""
        scheme, (rows, columns) = weight.scheme, weight.shape
        scale = source.read(weight.name + _SCALE)
        zero: Tensor | None = None
        if _layout_of(scheme) in _PLAIN:
            stored = source.read(weight.name)
            numbers = stored.T.contiguous() if weight.transposed else stored
            codes = numbers.view(torch.uint8)
            codes = codes ^ 128 if scheme.kind == "int" else codes
        else:
            codes = unpack_rows(source.read(weight.name + _PACKED), scheme.bits, columns)
        if not scheme.symmetric:
            packed = source.read(weight.name + _ZERO)
            zero = unpack_rows(packed.T.contiguous(), scheme.bits, rows).T.contiguous()
        return QuantizedTensor(
            codes=codes,
            scale=PlainScale(tensor=scale),
            zero=zero,
            scheme=scheme,
            dtype=weight.dtype,
        )


def _scheme(weight: PlannedWeight) -> Scheme:
    assert weight.scheme is not None, weight.name
    return weight.scheme


def _layout_of(scheme: Scheme) -> Layout:
    if scheme.kind == "fp8":
        return "float-quantized"
    return "int-quantized" if scheme.activation_bits == 8 else "pack-quantized"


def _module_names(chosen: Sequence[PlannedWeight], everyone: Sequence[PlannedWeight]) -> list[str]:
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


def _pattern(name: str) -> str:
    """A regex for the weight's module that leaves block and expert numbers open."""
    parts = name.removesuffix(".weight").split(".")
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parts) + "$"


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """One entry of config_groups."""
    grouped = scheme.group_size is not None
    weights = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.kind == "int" else "float",
        "symmetric": scheme.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    activations = None
    if scheme.activation_bits == 8:
        activations = {
            "num_bits": 8,
            "type": weights["type"],
            "symmetric": True,
            "strategy": "token",
            "group_size": None,
            "dynamic": True,
        }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": _layout_of(scheme),
    }


def _read_groups(config: object) -> list[tuple[str, Scheme]]:
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
    return sorted(found, key=lambda item: (item[0] == _CLASS, item[0].startswith("re:")))


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
    if layout == "float-quantized":
        return _read_fp8(where, weights, activations, strategy)
    known = (
        weights.get("type", "int") == "int"
        and type(bits) is int
        and 2 <= bits <= 8
        and (strategy == "channel" or (strategy == "group" and grouped))
        and weights.get("actorder") in (None, "weight", "static")
        and layout in ("pack-quantized", "int-quantized")
        and (activations is None) == (layout == "pack-quantized")
    )
    if not known:
        raise CheckpointError(
            f"{where}: {layout} with {bits} bit {weights.get('type')} weights per {strategy} "
            f"(group_size {group_size}) is not read; pack-quantized with 2 to 8 bit weights per "
            "group or channel, int-quantized w8a8 and float-quantized fp8 per channel are"
        )
    return Scheme(
        kind="int",
        bits=bits,
        group_size=group_size if strategy == "group" else None,
        symmetric=bool(weights.get("symmetric", True)),
        activation_bits=16 if activations is None else 8,
    )


def _read_fp8(where: str, weights: Mapping[str, Any], activations: Any, strategy: str) -> Scheme:
    dynamic = isinstance(activations, dict) and (
        activations.get("dynamic") is True
        and activations.get("strategy") == "token"
        and (activations.get("type"), activations.get("num_bits")) == ("float", 8)
    )
    described = (weights.get("type"), weights.get("num_bits"), strategy)
    if described != ("float", 8, "channel") or not (activations is None or dynamic):
        raise CheckpointError(
            f"{where}: float-quantized weights of {weights.get('num_bits')} bit per {strategy} are "
            "not read with these input_activations; 8 bit per channel with none, or with dynamic "
            "ones per token, is"
        )
    return Scheme(
        kind="fp8", bits=8, group_size=None, activation_bits=16 if activations is None else 8
    )


def _scheme_for(name: str, groups: Sequence[tuple[str, Scheme]], layout: Layout) -> Scheme:
    module = name.removesuffix(".weight")
    for target, scheme in groups:
        if _layout_of(scheme) != layout:
            continue
        if target.startswith("re:"):
            if re.match(target.removeprefix("re:"), module):
                return scheme
        elif target in (module, _CLASS):
            return scheme
    raise CheckpointError(f"{name}: it is stored {layout}, but no config group targets it so")


def _packed_weight(
    name: str, groups: Sequence[tuple[str, Scheme]], source: Source, names: set[str]
) -> StoredWeight:
    scheme = _scheme_for(name, groups, "pack-quantized")
    if name + "_g_idx" in names:
        raise CheckpointError(
            f"{name}: its columns are permuted (weight_g_idx), which is not read; "
            "use a checkpoint with static activation ordering"
        )
    for suffix in (_SCALE, _SHAPE):
        if name + suffix not in names:
            raise CheckpointError(f"{name}: {name + suffix} is missing")
    described = source.info(name + _SHAPE)
    if described.dtype != torch.int64 or described.shape != (2,):
        raise CheckpointError(
            f"{name + _SHAPE}: {described.dtype} {list(described.shape)} is no shape of a matrix; "
            "two int64 numbers are"
        )
    shape = source.read(name + _SHAPE).tolist()
    rows, columns = int(shape[0]), int(shape[1])
    planned = PlannedWeight(name=name, module="", shape=(rows, columns), scheme=scheme)
    check_divides(name, (rows, columns), scheme)
    dtype = source.info(name + _SCALE).dtype
    infos = CompressedTensors().layout(planned, dtype)
    check_stored(infos, source, "quantization_config")
    if scheme.symmetric and name + _ZERO in names:
        raise CheckpointError(f"{name}: its config group is symmetric, but it has zero points")
    return StoredWeight.of(planned, dtype, infos)


def _plain_weights(
    source: Source,
    names: set[str],
    groups: Sequence[tuple[str, Scheme]],
    layout: Layout,
    dtype: torch.dtype,
) -> dict[str, StoredWeight]:
    """All weights of a layout in `_PLAIN`.  Conv1D models store [I, O], which square weights do
    not show: those follow the other weights inside blocks."""
    plain = [
        name
        for name in sorted(names)
        if name.endswith(".weight") and name + _SCALE in names and source.info(name).dtype == dtype
    ]
    seen: dict[str, tuple[int, int, bool | None]] = {}
    for name in plain:
        shape, rows = source.info(name).shape, source.info(name + _SCALE).shape[0]
        if len(shape) != 2 or rows not in shape:
            raise CheckpointError(f"{name}: shape {shape} does not fit {rows} scales")
        square = shape[0] == shape[1]
        seen[name] = (shape[0], shape[1], None if square else shape[0] != rows)
    conv1d = any(flag for _, _, flag in seen.values())
    found: dict[str, StoredWeight] = {}
    for name, (first, second, flag) in seen.items():
        scheme = _scheme_for(name, groups, layout)
        numbered = any(part.isdigit() for part in name.split("."))
        transposed = conv1d and numbered if flag is None else flag
        shape2 = (second, first) if transposed else (first, second)
        planned = PlannedWeight(
            name=name, module="", shape=shape2, scheme=scheme, transposed=transposed
        )
        scale_dtype = source.info(name + _SCALE).dtype
        infos = CompressedTensors().layout(planned, scale_dtype)
        check_stored(infos, source, "quantization_config")
        found[name] = StoredWeight.of(planned, scale_dtype, infos)
    return found
