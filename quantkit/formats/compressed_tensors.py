"""compressed-tensors: the layout of llm-compressor, read by vLLM and transformers.

Shapes: O out features, I in features, G groups per row, b bits.  For weight NAME (less ".weight"):

pack-quantized (integers of 2 to 8 bits, 16-bit activations; w4afp8)
    NAME.weight_packed      int32 [O, ceil(I*b/32)]   codes, the first in the lowest bits
    NAME.weight_scale       the model's dtype [O, G]
    NAME.weight_shape       int64 [2] = (O, I)
    NAME.weight_zero_point  int32 [ceil(O*b/32), G]   packed along O; asymmetric schemes only
int-quantized (w8a8_row, w4a8) and float-quantized (fp8a8_row, fp8a16_row, fp8a8_b128, fp8a8_tensor)
    NAME.weight             int8 [O, I] = code - 2^(b-1), or float8_e4m3fn [O, I]
    NAME.weight_scale       the model's dtype [O, G]; of blocks [ceil(O/128), I/128], of tensors [1]
    NAME.input_scale        the model's dtype [1]; fp8a8_tensor only
mxfp8-quantized (mxfp8a8, mxfp8a16)
    NAME.weight             float8_e4m3fn [O, I]
    NAME.weight_scale       uint8 [O, I/32]           the exponent of a power of two, plus 127
mxfp4-pack-quantized (mxfp4a4, mxfp4a16) and nvfp4-pack-quantized (nvfp4a4, nvfp4a16)
    NAME.weight_packed      uint8 [O, I/2]            two e2m1 codes, the first in the low nibble
    NAME.weight_scale       uint8 [O, I/32] as above, or float8_e4m3fn [O, I/16] of nvfp4:
    NAME.weight_global_scale  float32 [1]             what nvfp4's scales are divided by
    NAME.input_global_scale   float32 [1]             the same for its input; nvfp4a4 only

For the attention module NAME, where keys and values are cached in 8 bits:
    NAME.k_scale, NAME.v_scale  float32 [1], or [H, 1, 1] with a scale for each head

Codes lie without gaps, across words, as compressed-tensors 0.20 writes them.  Its older releases
left bits of each word empty at 3, 5, 6 and 7 bits; their shapes differ, and they are refused.
"""

from __future__ import annotations

import dataclasses
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.dtypes import dtype_of
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError, NumericsError
from quantkit.formats._compressed_groups import (
    CLASS,
    FLOATS,
    Layout,
    group_of,
    layout_of,
    module_names,
    read_groups,
    scheme_for,
)
from quantkit.formats.bitpack import (
    num_words,
    pack_nibbles,
    pack_rows,
    unpack_nibbles,
    unpack_rows,
)
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
from quantkit.formats.stored import (
    by_block,
    by_row,
    exponents_of,
    model_dtype,
    power_of_two,
    round_divisor,
    round_scale,
    stored_divisor,
    stored_scale,
)
from quantkit.numbers.cache import CACHE_NAMES, CacheScheme
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import DividedScale, PlainScale, QuantizedTensor, Scale

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.checkpoint.dtypes import Dtype

_PACKED, _SCALE, _SHAPE, _ZERO = "_packed", "_scale", "_shape", "_zero_point"
_GLOBAL, _INPUT, _INPUT_GLOBAL = "_global_scale", "input_scale", "input_global_scale"
_CACHE = ("k_scale", "v_scale")
_ASKED = ("num_bits", "type", "strategy", "symmetric", "dynamic")
# Layouts that keep one number per weight under the weight's own name, and its dtype.
_PLAIN: dict[Layout, str] = {
    "int-quantized": "I8",
    "float-quantized": "F8_E4M3",
    "mxfp8-quantized": "F8_E4M3",
}
# Kinds whose scales are powers of two, stored as exponents.
_MICROSCALED = ("mxfp8", "mxfp4")


class CompressedTensors:
    """Integers of 2 to 8 bits, FP8, NVFP4 and MX floats, each weight under its own scheme."""

    name: ClassVar[str] = "compressed-tensors"
    holds_permuted: ClassVar[bool] = False

    def supports(self, scheme: Scheme) -> str | None:
        """None if the scheme is an integer, or one of `FLOATS`."""
        if scheme.kind == "int" or scheme.name in FLOATS:
            return None
        return f"it holds integers and {', '.join(FLOATS)}, not {scheme.name}"

    def supports_shape(self, weight: PlannedWeight) -> str | None:
        """None: rows of any length are padded; only the name must be that of a 2-D weight."""
        scheme = _scheme(weight)
        if weight.transposed and layout_of(scheme) in _PLAIN and not _per_row(scheme):
            return f"Conv1D weights are held with a scale per row, not under {scheme.name}"
        return named_as_weight(weight)

    def supports_together(self, weights: Sequence[PlannedWeight]) -> str | None:
        """None: each weight may have its own scheme."""
        return None

    def readers(
        self, weights: Sequence[PlannedWeight], model_type: str
    ) -> Mapping[str, str | None]:
        """Runtime -> None if it reads the checkpoint, else why not; see formats/readers.py."""
        return compressed_tensors_readers(weights, model_type)

    def layout(self, weight: PlannedWeight, dtype: Dtype) -> tuple[TensorInfo, ...]:
        """Exactly the tensors `pack` returns, for a weight of this dtype in the source."""
        scheme, (rows, columns) = _scheme(weight), weight.shape
        scales = _scale_infos(weight, dtype)
        if (layout := layout_of(scheme)) in _PLAIN:
            shape = (columns, rows) if weight.transposed else (rows, columns)
            return TensorInfo(name=weight.name, dtype=_PLAIN[layout], shape=shape), *scales
        if scheme.kind != "int":
            return (
                TensorInfo(name=weight.name + _PACKED, dtype="U8", shape=(rows, columns // 2)),
                *scales,
            )
        infos = (
            TensorInfo(
                name=weight.name + _PACKED,
                dtype="I32",
                shape=(rows, num_words(columns, scheme.bits)),
            ),
            *scales,
            TensorInfo(name=weight.name + _SHAPE, dtype="I64", shape=(2,)),
        )
        if scheme.symmetric:
            return infos
        zeros = (num_words(rows, scheme.bits), scales[0].shape[1])
        return (*infos, TensorInfo(name=weight.name + _ZERO, dtype="I32", shape=zeros))

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The model's own."""
        return dtype

    def represent(self, tensor: QuantizedTensor) -> tuple[QuantizedTensor, str | None]:
        """The tensor with scales in the weight's dtype, and what was rounded for that, or None."""
        if tensor.scheme.kind in _MICROSCALED:
            return tensor, None
        if tensor.scheme.kind == "nvfp4":
            return round_divisor(tensor, inverted=False)
        return round_scale(tensor, self.scale_dtype(tensor.dtype))

    def pack(self, weight: PlannedWeight, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Checkpoint name -> contiguous CPU tensor.  NumericsError if a scale is not exact."""
        scheme = tensor.scheme
        assert scheme == weight.scheme and tensor.columns is None
        codes = tensor.codes
        scales = _stored_scales(weight, tensor)
        if (layout := layout_of(scheme)) in _PLAIN:
            # A Conv1D reader (vLLM's gpt2) transposes every tensor called "weight".
            if scheme.kind == "int":
                # Wraps around below the middle, as int8 does.
                codes = codes - 2 ** (scheme.bits - 1)
            numbers = codes.cpu().view(dtype_of(_PLAIN[layout]))
            stored = numbers.T.contiguous() if weight.transposed else numbers.contiguous()
            return {weight.name: stored, **scales}
        if scheme.kind != "int":
            return {weight.name + _PACKED: pack_nibbles(codes).cpu(), **scales}
        tensors = {
            # Packed where they are: a GPU's host gets a part of the bytes.
            weight.name + _PACKED: pack_rows(codes, scheme.bits).cpu(),
            **scales,
            weight.name + _SHAPE: torch.tensor(tensor.shape, dtype=torch.int64),
        }
        if tensor.zero is not None:
            zero_GO = tensor.zero.to(torch.uint8).T
            tensors[weight.name + _ZERO] = pack_rows(zero_GO, scheme.bits).cpu().T.contiguous()
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
                targets = [CLASS, *module_names(named, weights)]
            else:
                targets = module_names(members, weights)
            groups[f"group_{len(groups)}"] = group_of(scheme, targets)
        kept = module_names([weight for weight in weights if weight.scheme is None], weights)
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

    def cache_layout(self, module: str, scheme: CacheScheme, heads: int) -> tuple[TensorInfo, ...]:
        """The tensors that hold the scales of an attention module's keys, and of its values."""
        shape = scheme.scale_shape(heads)
        return tuple(
            TensorInfo(name=f"{module}.{leaf}", dtype="F32", shape=shape) for leaf in _CACHE
        )

    def cache_config(self, scheme: CacheScheme) -> dict[str, Any]:
        """What the `quantization_config` says of it besides."""
        return {
            "kv_cache_scheme": {
                "num_bits": 8,
                "type": "float",
                "strategy": "attn_head" if scheme.per_head else "tensor",
                "symmetric": True,
                "dynamic": False,
                "group_size": None,
                "block_structure": None,
            }
        }

    def cache_scheme(self, config: Mapping[str, Any]) -> CacheScheme | None:
        """The scheme that a `quantization_config` tells of, as llm-compressor writes it too."""
        told = config.get("kv_cache_scheme")
        if told is None:
            return None
        for name in CACHE_NAMES:
            wanted = self.cache_config(CacheScheme(name=name))["kv_cache_scheme"]
            if isinstance(told, Mapping) and all(told.get(key) == wanted[key] for key in _ASKED):
                return CacheScheme(name=name)
        raise CheckpointError(
            f"config.json: kv_cache_scheme {told} is unknown; a symmetric static float of 8 bits "
            "for each tensor or head (attn_head) is read"
        )

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """Weight name -> how it is stored, for every quantized weight of a checkpoint."""
        groups = read_groups(source.config.get("quantization_config"))
        names = set(source.names())
        found: dict[str, StoredWeight] = {}
        for name in sorted(names):
            if name.endswith(".weight" + _PACKED):
                stored = _packed_weight(name.removesuffix(_PACKED), groups, source, names)
                found[stored.name] = stored
        for label in dict.fromkeys(_PLAIN.values()):
            found.update(_plain_weights(source, names, groups, label))
        # Scales of other dtypes than the model's do not tell what a weight was.
        coded = [name for name, w in found.items() if w.scheme.kind in (*_MICROSCALED, "nvfp4")]
        dtype = model_dtype(source) if coded else ""
        return {**found, **{n: dataclasses.replace(found[n], label=dtype) for n in coded}}

    def unpack(self, weight: StoredWeight, source: Source) -> QuantizedTensor:
        """The inverse of `pack`: same codes, scale and zero."""
        scheme, (rows, columns) = weight.scheme, weight.shape
        zero: Tensor | None = None
        if layout_of(scheme) in _PLAIN:
            stored = source.read(weight.name)
            numbers = stored.T.contiguous() if weight.transposed else stored
            codes = numbers.view(torch.uint8)
            if scheme.kind == "int":
                codes = codes + 2 ** (scheme.bits - 1)
        elif scheme.kind != "int":
            codes = unpack_nibbles(source.read(weight.name + _PACKED))
        else:
            codes = unpack_rows(source.read(weight.name + _PACKED), scheme.bits, columns)
        if not scheme.symmetric:
            packed = source.read(weight.name + _ZERO)
            zero = unpack_rows(packed.T.contiguous(), scheme.bits, rows).T.contiguous()
        tensor = QuantizedTensor(
            codes=codes,
            scale=_read_scale(weight, source),
            zero=zero,
            scheme=scheme,
            dtype=weight.dtype,
            input_scale=_read_input_scale(weight, source),
        )
        if scheme.kind != "int" or layout_of(scheme) in _PLAIN:
            # A byte holds more than fewer bits mean.
            tensor.check(weight.name)
        return tensor


def _scheme(weight: PlannedWeight) -> Scheme:
    assert weight.scheme is not None, weight.name
    return weight.scheme


def _per_row(scheme: Scheme) -> bool:
    """True if each row has one scale of its own."""
    return scheme.group_size is None and scheme.share == "group"


def _input_name(name: str, scheme: Scheme) -> str:
    """The tensor that holds the input's scale of a scheme with `static_input`."""
    leaf = _INPUT_GLOBAL if scheme.kind == "nvfp4" else _INPUT
    return name.removesuffix("weight") + leaf


def _scale_infos(weight: PlannedWeight, dtype: Dtype) -> tuple[TensorInfo, ...]:
    """The tensors that hold a weight's scales."""
    scheme, rows = _scheme(weight), weight.shape[0]
    groups = scheme.num_groups(weight.shape) // rows
    shape: tuple[int, ...] = (rows, groups)
    if scheme.share == "block":
        shape = (-(-rows // (scheme.group_size or rows)), groups)
    elif scheme.share == "tensor":
        shape = (1,)
    if scheme.kind in _MICROSCALED:
        dtype = "U8"
    elif scheme.kind == "nvfp4":
        dtype = "F8_E4M3"
    infos = [TensorInfo(name=weight.name + _SCALE, dtype=dtype, shape=shape)]
    alone: Dtype = "F32" if scheme.kind == "nvfp4" else dtype
    if scheme.kind == "nvfp4":
        infos.append(TensorInfo(name=weight.name + _GLOBAL, dtype=alone, shape=(1,)))
    if scheme.static_input:
        name = _input_name(weight.name, scheme)
        infos.append(TensorInfo(name=name, dtype=alone, shape=(1,)))
    return tuple(infos)


def _stored_scales(weight: PlannedWeight, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of `_scale_infos`.  NumericsError if a scale is not exact in them."""
    scheme, name = tensor.scheme, weight.name + _SCALE
    found: dict[str, Tensor] = {}
    if scheme.kind == "nvfp4":
        divided = stored_divisor(weight.name, tensor, inverted=False)
        found[name] = divided.tensor.cpu().contiguous()
        found[weight.name + _GLOBAL] = divided.divisor.cpu().reshape(1)
    elif scheme.kind in _MICROSCALED:
        found[name] = exponents_of(weight.name, tensor)
    else:
        scale = stored_scale(weight.name, tensor, tensor.dtype)
        found[name] = by_block(weight.name, scale, scheme)
    if tensor.input_scale is not None:
        alone = torch.float32 if scheme.kind == "nvfp4" else tensor.dtype
        stored = tensor.input_scale.cpu().reshape(1).to(alone)
        if float(stored) != float(tensor.input_scale):
            raise NumericsError(f"{weight.name}: the input's scale is not exact in {alone}")
        found[_input_name(weight.name, scheme)] = stored
    return found


def _read_scale(weight: StoredWeight, source: Source) -> Scale:
    """The scales that `_stored_scales` wrote."""
    stored = source.read(weight.name + _SCALE)
    if weight.scheme.kind == "nvfp4":
        divisor = source.read(weight.name + _GLOBAL).reshape(())
        if not 0 < float(divisor) < float("inf"):
            raise NumericsError(
                f"{weight.name + _GLOBAL}: it is {float(divisor)}, but scales are divided by a "
                "positive number; the checkpoint is damaged, get it anew"
            )
        return DividedScale(tensor=stored, divisor=divisor)
    if weight.scheme.kind in _MICROSCALED:
        return PlainScale(tensor=power_of_two(weight.name + _SCALE, stored))
    return PlainScale(tensor=by_row(stored, weight.scheme, weight.shape[0]))


def _read_input_scale(weight: StoredWeight, source: Source) -> Tensor | None:
    if not weight.scheme.static_input:
        return None
    return source.read(_input_name(weight.name, weight.scheme)).reshape(()).float()


def _packed_weight(
    name: str, groups: Sequence[tuple[str, Scheme]], source: Source, names: set[str]
) -> StoredWeight:
    packed = source.info(name + _PACKED)
    if name + _SCALE not in names:
        raise CheckpointError(f"{name}: {name + _SCALE} is missing")
    if packed.label == "U8":
        layouts: tuple[Layout, ...] = ("mxfp4-pack-quantized", "nvfp4-pack-quantized")
        scheme = scheme_for(name, groups, layouts, "in nibbles")
        if len(packed.shape) != 2:
            raise CheckpointError(f"{name + _PACKED}: shape {list(packed.shape)} is no matrix's")
        return _found(name, scheme, (packed.shape[0], 2 * packed.shape[1]), source)
    scheme = scheme_for(name, groups, ("pack-quantized",), "pack-quantized")
    if name + "_g_idx" in names:
        raise CheckpointError(
            f"{name}: its columns are permuted (weight_g_idx), which is not read; "
            "use a checkpoint with static activation ordering"
        )
    if name + _SHAPE not in names:
        raise CheckpointError(f"{name}: {name + _SHAPE} is missing")
    described = source.info(name + _SHAPE)
    if described.label != "I64" or described.shape != (2,):
        raise CheckpointError(
            f"{name + _SHAPE}: {described.dtype} {list(described.shape)} is no shape of a matrix; "
            "two int64 numbers are"
        )
    shape = struct.unpack("<2q", source.read_bytes(name + _SHAPE))
    found = _found(name, scheme, (shape[0], shape[1]), source)
    if scheme.symmetric and name + _ZERO in names:
        raise CheckpointError(f"{name}: its config group is symmetric, but it has zero points")
    return found


def _found(
    name: str, scheme: Scheme, shape: tuple[int, int], source: Source, *, transposed: bool = False
) -> StoredWeight:
    """The stored weight, once all its tensors are what `layout` says."""
    planned = PlannedWeight(name=name, module="", shape=shape, scheme=scheme, transposed=transposed)
    check_divides(name, shape, scheme)
    scale = source.info(name + _SCALE).label
    infos = CompressedTensors().layout(planned, scale)
    check_stored(infos, source, "quantization_config")
    return StoredWeight.of(planned, scale, infos)


def _plain_weights(
    source: Source, names: set[str], groups: Sequence[tuple[str, Scheme]], label: str
) -> dict[str, StoredWeight]:
    """All weights that keep numbers of this dtype under their own names.

    Conv1D models store [O, I] of weights with a scale per row as [I, O], which square ones do not
    show: those follow the other weights inside blocks.
    """
    layouts = [layout for layout, numbers in _PLAIN.items() if numbers == label]
    found: dict[str, StoredWeight] = {}
    seen: dict[str, tuple[Scheme, int, int, bool | None]] = {}
    for name in sorted(names):
        if not name.endswith(".weight") or name + _SCALE not in names:
            continue
        info = source.info(name)
        if info.label != label:
            continue
        scheme = scheme_for(name, groups, layouts, " or ".join(layouts))
        shape = info.shape
        if len(shape) != 2:
            raise CheckpointError(f"{name}: shape {list(shape)} is no matrix's")
        if not _per_row(scheme):
            found[name] = _found(name, scheme, (shape[0], shape[1]), source)
            continue
        scales = source.info(name + _SCALE).shape
        if not scales or scales[0] not in shape:
            raise CheckpointError(f"{name}: shape {list(shape)} does not fit scales {list(scales)}")
        square = shape[0] == shape[1]
        seen[name] = (scheme, shape[0], shape[1], None if square else shape[0] != scales[0])
    conv1d = any(flag for _, _, _, flag in seen.values())
    for name, (scheme, first, second, flag) in seen.items():
        numbered = any(part.isdigit() for part in name.split("."))
        transposed = conv1d and numbered if flag is None else flag
        shape2 = (second, first) if transposed else (first, second)
        found[name] = _found(name, scheme, shape2, source, transposed=transposed)
    return found
