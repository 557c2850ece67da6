"""ModelOpt's layout, NVIDIA's own: read by vLLM, SGLang and TensorRT-LLM.

Shapes: O out features, I in features, G groups per row.  For weight NAME (less ".weight"):

FP8 (fp8a8_tensor)
    NAME.weight          float8_e4m3fn [O, I]
    NAME.weight_scale    float32 []
    NAME.input_scale     float32 []
FP8_PER_CHANNEL_PER_TOKEN (fp8a8_row), fp8_pb_wo (fp8a8_b128) and MXFP8 (mxfp8a8)
    NAME.weight          float8_e4m3fn [O, I]
    NAME.weight_scale    float32 [O]; float32 [ceil(O/128), 1, I/128, 1]; uint8 [O, I/32], the
                         exponent of a power of two, plus 127
NVFP4 (nvfp4a4) and W4A16_NVFP4 (nvfp4a16)
    NAME.weight          uint8 [O, I/2]       two e2m1 codes, the first in the low nibble
    NAME.weight_scale    float8_e4m3fn [O, I/16]
    NAME.weight_scale_2  float32 []           what these are multiplied by
    NAME.input_scale     float32 []           the same for its input; nvfp4a4 only
W4A16_AWQ (w4a16_gN, symmetric)
    NAME.weight          uint8 [O/2, I]       int4 codes of two rows, the first in the low nibble
    NAME.weight_scale    float32 [O, G]
    NAME.pre_quant_scale the model's dtype [I]  what inputs are multiplied by: ones, if there

For the attention module NAME, where keys and values are cached in float8:
    NAME.k_proj.k_scale, NAME.v_proj.v_scale  float32 [1]

Words and tensors are those of ModelOpt 0.47 (torch/export/quant_utils.py, convert_hf_config.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source
from quantkit.checkpoint.version import __version__
from quantkit.errors import CheckpointError, FormatError, NumericsError
from quantkit.formats._modelopt_config import ALGORITHMS, Told, algorithm_of, entry_of, groups_of
from quantkit.formats._skipped import kept_apart, skipped_together
from quantkit.formats.bitpack import pack_nibbles, unpack_nibbles
from quantkit.formats.format import (
    PlannedWeight,
    StoredWeight,
    check_divides,
    check_stored,
    named_as_weight,
)
from quantkit.formats.readers import modelopt_readers
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
from quantkit.numbers.cache import CacheScheme
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import DividedScale, PlainScale, QuantizedTensor, Scale

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.checkpoint.dtypes import Dtype

_SCALE, _OUTER = "_scale", "_scale_2"
_INPUT, _SMOOTHED = "input_scale", "pre_quant_scale"
# int4's code 8 means 0 here, and its bits are those of two's complement with the first turned.
_SIGN = 8


class Modelopt:
    """FP8, NVFP4, MXFP8 and symmetric integers of 4 bits, each weight under its own scheme."""

    name: ClassVar[str] = "modelopt"
    holds_permuted: ClassVar[bool] = False

    def supports(self, scheme: Scheme) -> str | None:
        """None for the schemes of `ALGORITHMS`, and for symmetric integers of 4 bits in groups."""
        if algorithm_of(scheme) is not None:
            return None
        return f"it holds w4a16_g<size> and {', '.join(ALGORITHMS)}, not {scheme.name}"

    def supports_shape(self, weight: PlannedWeight) -> str | None:
        """None unless it is a Conv1D weight, is not named as a weight, or rows make no pairs."""
        if weight.transposed:
            return "Conv1D weights are not held"
        if weight.scheme is not None and weight.scheme.kind == "int" and weight.shape[0] % 2:
            return f"int4 codes of two rows share a byte, and {weight.shape[0]} rows are odd"
        return named_as_weight(weight)

    def supports_together(self, weights: Sequence[PlannedWeight]) -> str | None:
        """None if readers, asked to skip a kept module, would not skip a quantized one too."""
        return skipped_together(weights, substrings=True)

    def readers(
        self, weights: Sequence[PlannedWeight], model_type: str
    ) -> Mapping[str, str | None]:
        """Runtime -> None if it reads the checkpoint, else why not; see formats/readers.py."""
        return modelopt_readers(weights, model_type)

    def layout(self, weight: PlannedWeight, dtype: Dtype) -> tuple[TensorInfo, ...]:
        """Exactly the tensors `pack` returns, for a weight of this dtype in the source."""
        scheme, (rows, columns) = _scheme(weight), weight.shape
        groups = columns // (scheme.group_size or columns)
        shape, label = (rows, columns), "F8_E4M3"
        scales: tuple[tuple[str, Dtype, tuple[int, ...]], ...]
        if scheme.kind == "int":
            shape, label = (rows // 2, columns), "U8"
            scales = ((_SCALE, "F32", (rows, groups)),)
        elif scheme.kind == "nvfp4":
            shape, label = (rows, columns // 2), "U8"
            scales = ((_SCALE, "F8_E4M3", (rows, groups)), (_OUTER, "F32", ()))
        elif scheme.kind == "mxfp8":
            scales = ((_SCALE, "U8", (rows, groups)),)
        elif scheme.share == "block":
            scales = ((_SCALE, "F32", (-(-rows // (scheme.group_size or rows)), 1, groups, 1)),)
        else:
            scales = ((_SCALE, "F32", () if scheme.share == "tensor" else (rows,)),)
        infos = [TensorInfo(name=weight.name, dtype=label, shape=shape)]
        infos += [TensorInfo(name=weight.name + end, dtype=d, shape=s) for end, d, s in scales]
        if scheme.static_input:
            infos.append(TensorInfo(name=_beside(weight.name, _INPUT), dtype="F32", shape=()))
        if scheme.kind == "int":
            name = _beside(weight.name, _SMOOTHED)
            infos.append(TensorInfo(name=name, dtype=dtype, shape=(columns,)))
        return tuple(infos)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32."""
        return torch.float32

    def represent(self, tensor: QuantizedTensor) -> tuple[QuantizedTensor, str | None]:
        """The tensor itself, unless reciprocals of NVFP4's divisors are not exact."""
        if tensor.scheme.kind == "mxfp8":
            return tensor, None
        if tensor.scheme.kind == "nvfp4":
            return round_divisor(tensor, inverted=True)
        return round_scale(tensor, self.scale_dtype(tensor.dtype))

    def pack(self, weight: PlannedWeight, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Checkpoint name -> contiguous CPU tensor.  NumericsError if a scale is not exact."""
        scheme, name = tensor.scheme, weight.name
        assert scheme == weight.scheme and tensor.columns is None
        codes = tensor.codes
        if scheme.kind == "int":
            pairs = (codes ^ _SIGN).view(len(codes) // 2, 2, -1)
            stored = (pairs[:, 0] | (pairs[:, 1] << 4)).cpu().contiguous()
        elif scheme.kind == "nvfp4":
            stored = pack_nibbles(codes).cpu()
        else:
            stored = codes.cpu().view(torch.float8_e4m3fn).contiguous()
        found = {name: stored, **_stored_scales(name, tensor)}
        if tensor.input_scale is not None:
            given = tensor.input_scale.cpu().reshape(())
            found[_beside(name, _INPUT)] = 1 / given if scheme.kind == "nvfp4" else given.clone()
        if scheme.kind == "int":
            # TensorRT-LLM demands it of what it fuses with nothing, as an attention's output.
            found[_beside(name, _SMOOTHED)] = torch.ones(tensor.shape[1], dtype=tensor.dtype)
        return found

    def config(
        self,
        weights: Sequence[PlannedWeight],
        *,
        model_type: str,
        dtype: torch.dtype,
        others: Sequence[TensorInfo] = (),
    ) -> dict[str, Any]:
        """The `quantization_config`; `others` are the model's remaining tensors, all kept.

        Raises FormatError if a kept module's name would make readers skip a quantized one.
        """
        quantized = [weight for weight in weights if weight.scheme is not None]
        kept = kept_apart(weights, others, substrings=True)
        config: dict[str, Any] = {
            "quant_method": self.name,
            "producer": {"name": "quantkit", "version": __version__},
            "ignore": kept,
        }
        schemes = Counter(weight.scheme for weight in quantized if weight.scheme is not None)
        if len(schemes) == 1:
            (scheme,) = schemes
            return config | entry_of(scheme) | groups_of(scheme)
        layers = {w.name.removesuffix(".weight"): entry_of(_scheme(w)) for w in quantized}
        return config | {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}

    def side_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """hf_quant_config.json, which TensorRT-LLM and SGLang read: the same in other words."""
        told = dict(config)
        for key in ("quant_method", "producer", "config_groups"):
            told.pop(key, None)
        cached = told.pop("kv_cache_scheme", None) is not None
        return {
            "hf_quant_config.json": {
                "producer": config["producer"],
                "quant_method": config["quant_method"],
                "quantization": {
                    "exclude_modules": told.pop("ignore"),
                    "kv_cache_quant_algo": "FP8" if cached else None,
                    **told,
                },
            }
        }

    def cache_layout(self, module: str, scheme: CacheScheme, heads: int) -> tuple[TensorInfo, ...]:
        """The tensors that hold the scales of an attention module's keys, and of its values."""
        if scheme.per_head:
            raise FormatError(
                f"--kv {scheme.name}: {self.name} has one scale for the keys of a layer and one "
                "for its values; use --kv fp8, or --format compressed-tensors"
            )
        # vLLM looks for others under the attention's own name (maybe_remap_kv_scale_name).
        projected = module.endswith((".self_attn", ".mixer"))
        ends = ("k_proj.k_scale", "v_proj.v_scale") if projected else ("k_scale", "v_scale")
        shape = scheme.scale_shape(heads)
        return tuple(TensorInfo(name=f"{module}.{end}", dtype="F32", shape=shape) for end in ends)

    def cache_config(self, scheme: CacheScheme) -> dict[str, Any]:
        """What the `quantization_config` says of it besides."""
        return {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}

    def cache_scheme(self, config: Mapping[str, Any]) -> CacheScheme | None:
        """The scheme that a `quantization_config` tells of; None if there is none."""
        return Told.of(config).cache

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """Weight name -> how it is stored, for every quantized weight of a checkpoint."""
        told = Told.of(source.config.get("quantization_config"))
        names = set(source.names())
        ends = [name.removesuffix(_SCALE) for name in names if name.endswith(".weight" + _SCALE)]
        return {name: self._found(name, told, source, names) for name in sorted(ends)}

    def unpack(self, weight: StoredWeight, source: Source) -> QuantizedTensor:
        """The inverse of `pack`: same codes and scales."""
        scheme, stored = weight.scheme, source.read(weight.name)
        if scheme.kind == "int":
            codes = torch.stack([stored & 15, stored >> 4], dim=1).view(weight.shape) ^ _SIGN
        elif scheme.kind == "nvfp4":
            codes = unpack_nibbles(stored)
        else:
            codes = stored.view(torch.uint8)
        given: Tensor | None = None
        if scheme.static_input:
            given = source.read(_beside(weight.name, _INPUT)).reshape(())
            given = 1 / given if scheme.kind == "nvfp4" else given
        _refuse_smoothed(weight, source)
        tensor = QuantizedTensor(
            codes=codes,
            scale=_read_scale(weight, source),
            zero=None,
            scheme=scheme,
            dtype=weight.dtype,
            input_scale=given,
        )
        tensor.check(weight.name)
        return tensor

    def _found(self, name: str, told: Told, source: Source, names: set[str]) -> StoredWeight:
        """The stored weight, once all its tensors are what `layout` says."""
        info, scale = source.info(name), source.info(name + _SCALE)
        if len(info.shape) != 2:
            raise CheckpointError(f"{name}: shape {list(info.shape)} is no matrix's")
        scheme = told.scheme_of(name, info.shape, scale.shape, _beside(name, _INPUT) in names)
        rows, columns = info.shape
        if scheme.kind == "int":
            rows *= 2
        elif scheme.kind == "nvfp4":
            columns *= 2
        planned = PlannedWeight(name=name, module="", shape=(rows, columns), scheme=scheme)
        check_divides(name, planned.shape, scheme)
        dtype = model_dtype(source)
        smoothed = _beside(name, _SMOOTHED)
        infos = [i for i in self.layout(planned, dtype) if i.name != smoothed]
        # ModelOpt has had numbers alone in vectors of one.
        ones = {i.name for i in infos if not i.shape and source.info(i.name).shape == (1,)}
        wanted = [
            TensorInfo(name=i.name, dtype=i.label, shape=(1,)) if i.name in ones else i
            for i in infos
        ]
        if smoothed in names:
            stored = source.info(smoothed)
            wanted.append(TensorInfo(name=smoothed, dtype=stored.label, shape=(columns,)))
        check_stored(wanted, source, "quantization_config")
        return StoredWeight.of(planned, dtype, wanted)


def _scheme(weight: PlannedWeight) -> Scheme:
    assert weight.scheme is not None, weight.name
    return weight.scheme


def _beside(name: str, leaf: str) -> str:
    return name.removesuffix("weight") + leaf


def _stored_scales(name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The scales' tensors.  NumericsError if one is not exact in them."""
    scheme = tensor.scheme
    if scheme.kind == "nvfp4":
        scale = stored_divisor(name, tensor, inverted=True)
        return {
            name + _SCALE: scale.tensor.cpu().contiguous(),
            name + _OUTER: scale.divisor.cpu().reshape(()),
        }
    if scheme.kind == "mxfp8":
        return {name + _SCALE: exponents_of(name, tensor)}
    stored = by_block(name, stored_scale(name, tensor, torch.float32), scheme)
    if scheme.share == "block":
        stored = stored[:, None, :, None].contiguous()
    elif scheme.share == "tensor":
        stored = stored.reshape(())
    elif scheme.kind == "fp8":
        stored = stored.reshape(-1)
    return {name + _SCALE: stored}


def _read_scale(weight: StoredWeight, source: Source) -> Scale:
    """The scales that `_stored_scales` wrote."""
    scheme, rows, name = weight.scheme, weight.shape[0], weight.name + _SCALE
    stored = source.read(name)
    if scheme.kind == "nvfp4":
        outer = source.read(weight.name + _OUTER).reshape(())
        if not 0 < float(outer) < float("inf"):
            raise NumericsError(
                f"{weight.name + _OUTER}: it is {float(outer)}, but scales are multiplied by a "
                "positive number; the checkpoint is damaged, get it anew"
            )
        return DividedScale(tensor=stored, divisor=outer, inverted=True)
    if scheme.kind == "mxfp8":
        return PlainScale(tensor=power_of_two(name, stored))
    if scheme.share == "block":
        stored = stored.reshape(stored.shape[0], stored.shape[2])
    return PlainScale(tensor=by_row(stored, scheme, rows).reshape(rows, -1))


def _refuse_smoothed(weight: StoredWeight, source: Source) -> None:
    """Nothing if the weight's inputs are multiplied by ones, or nothing; else CheckpointError."""
    name = _beside(weight.name, _SMOOTHED)
    if name in weight.tensors and not bool((source.read(name).float() == 1).all()):
        raise CheckpointError(
            f"{name}: inputs are multiplied by numbers of their own before the product "
            "(AWQ that is not folded into the model), which is not read; quantize the original"
        )
