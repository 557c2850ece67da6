"""bitsandbytes: the bytes of bitsandbytes 0.50, which transformers reads.

4 bit: blocks run along the flattened weight (n = O*I elements, N = ceil(n/block)).  For NAME:

    NAME                    uint8 [ceil(n/2), 1]   two codes a byte, the first in the high nibble
    NAME.absmax             float32 [N]; with double quantization uint8 [N]
    NAME.quant_map          float32 [16]           value of each code
    NAME.nested_absmax      float32 [ceil(N/256)]  double quantization only
    NAME.nested_quant_map   float32 [256]          double quantization only
    NAME.quant_state.bitsandbytes__nf4 (or __fp4)  JSON as uint8: block sizes, dtype, shape, offset

8 bit (w8a8_row); here the names are those of the module, MODULE = NAME less ".weight":

    MODULE.weight           int8 [O, I] = code - 128
    MODULE.SCB              float32 [O]            127 times the scale: the row's largest magnitude
    MODULE.weight_format    uint8 scalar           0: rows
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit_kernels.lazy import torch
from quantkit_kernels.ops.codebook import NF4

from quantkit.checkpoint.dtypes import label_of, name_of
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError, NumericsError
from quantkit.formats._skipped import kept_apart, skipped_together
from quantkit.formats.format import PlannedWeight, StoredWeight, check_stored, named_as_weight
from quantkit.formats.readers import bitsandbytes_readers
from quantkit.formats.stored import model_dtype
from quantkit.numbers.grid import FP4_VALUES, grid_of
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import NestedScale, PlainScale, QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.checkpoint.dtypes import Dtype

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK = 256
# Longest repr of a float: sign, 17 digits, point, exponent "e-308".
_OFFSET_WIDTH = 24
_SCB, _WEIGHT_FORMAT = "SCB", "weight_format"
_STATE = ".quant_state.bitsandbytes__"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Bitsandbytes:
    """NF4 and FP4, with and without double quantization; int8 rows (LLM.int8())."""

    name: ClassVar[str] = "bitsandbytes"
    holds_permuted: ClassVar[bool] = False

    def supports(self, scheme: Scheme) -> str | None:
        """None if the scheme is w8a8_row, or nf4 or fp4 in blocks that bitsandbytes allows."""
        if scheme.centered:
            return None
        if not scheme.flat:
            return f"it holds nf4, fp4 and w8a8_row, not {scheme.name}"
        if scheme.group_size not in BLOCK_SIZES:
            allowed = ", ".join(str(size) for size in BLOCK_SIZES)
            return f"blocks of {scheme.group_size} are not allowed, only of {allowed}"
        return None

    def supports_shape(self, weight: PlannedWeight) -> str | None:
        """None: flat blocks fit every shape; only the name must be that of a 2-D weight."""
        return named_as_weight(weight)

    def supports_together(self, weights: Sequence[PlannedWeight]) -> str | None:
        """None if all have 4 bits or all have 8, and transformers, asked to skip a kept module,
        would not skip a quantized one too."""
        widths = {w.scheme.bits: w for w in weights if w.scheme is not None}
        if len(widths) > 1:
            return (
                f"{widths[8].name} has 8 bits and {widths[4].name} has 4; a checkpoint has one "
                "width"
            )
        return skipped_together(weights)

    def readers(
        self, weights: Sequence[PlannedWeight], model_type: str
    ) -> Mapping[str, str | None]:
        """Runtime -> None if it reads the checkpoint, else why not; see formats/readers.py."""
        return bitsandbytes_readers(weights, model_type)

    def layout(self, weight: PlannedWeight, dtype: Dtype) -> tuple[TensorInfo, ...]:
        """Exactly the tensors `pack` returns, for a weight of this dtype in the source."""
        scheme, shape = weight.scheme, weight.shape
        assert scheme is not None, weight.name
        if not scheme.flat:
            stem = weight.name.removesuffix("weight")
            return (
                TensorInfo(name=weight.name, dtype="I8", shape=shape),
                TensorInfo(name=stem + _SCB, dtype="F32", shape=shape[:1]),
                TensorInfo(name=stem + _WEIGHT_FORMAT, dtype="U8", shape=()),
            )
        blocks = scheme.num_groups(shape)
        name, nested = weight.name, scheme.double_quant
        state = len(_state(scheme, dtype, shape, 0.0 if nested else None))
        planned: list[tuple[str, str, tuple[int, ...]]] = [
            (name, "U8", (-(-shape[0] * shape[1] // 2), 1)),
            (f"{name}.absmax", "U8" if nested else "F32", (blocks,)),
            (f"{name}.quant_map", "F32", (16,)),
        ]
        if nested:
            outer = -(-blocks // _NESTED_BLOCK)
            planned.append((f"{name}.nested_absmax", "F32", (outer,)))
            planned.append((f"{name}.nested_quant_map", "F32", (256,)))
        planned.append((name + _STATE + scheme.kind, "U8", (state,)))
        return tuple(TensorInfo(name=n, dtype=d, shape=s) for n, d, s in planned)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32: block scales, and 127 times those of rows."""
        return torch.float32

    def represent(self, tensor: QuantizedTensor) -> tuple[QuantizedTensor, str | None]:
        """The tensor itself and None, as block scales are stored as they are; of int8 rows one
        whose scales are 1/127 of a float32 number."""
        if tensor.scheme.flat:
            return tensor, None
        assert isinstance(tensor.scale, PlainScale)
        scale = tensor.scale.values()
        held = scale.mul(127).div_(127)
        changed = int((held != scale).sum())
        if not changed:
            return tensor, None
        told = f"{changed} of {scale.numel()} scales rounded to a 127th"
        return dataclasses.replace(tensor, scale=PlainScale(tensor=held)), told

    def pack(self, weight: PlannedWeight, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Checkpoint name -> contiguous CPU tensor."""
        scheme, scale, name = tensor.scheme, tensor.scale, weight.name
        assert scheme == weight.scheme and scheme.double_quant == isinstance(scale, NestedScale)
        if not scheme.flat:
            return _pack_rows(weight, tensor)
        tensors = {name: _pack_codes(tensor.codes.cpu(), scheme)}
        quant_map = _quant_map(scheme)
        offset: float | None = None
        if isinstance(scale, NestedScale):
            assert scale.block == _NESTED_BLOCK
            offset = float(scale.offset)
            tensors[f"{name}.absmax"] = scale.codes.cpu().reshape(-1).contiguous()
            tensors[f"{name}.quant_map"] = quant_map
            tensors[f"{name}.nested_absmax"] = scale.absmax.cpu().float().contiguous()
            tensors[f"{name}.nested_quant_map"] = scale.table.cpu().float().contiguous()
        else:
            tensors[f"{name}.absmax"] = scale.values().cpu().reshape(-1).contiguous()
            tensors[f"{name}.quant_map"] = quant_map
        state = _state(scheme, tensor.dtype, tensor.shape, offset)
        tensors[name + _STATE + scheme.kind] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        return tensors

    def config(
        self,
        weights: Sequence[PlannedWeight],
        *,
        model_type: str,
        dtype: torch.dtype,
        others: Sequence[TensorInfo] = (),
    ) -> dict[str, Any]:
        """The `quantization_config` as transformers writes it; `others` are all kept.

        Raises FormatError if a kept module's name would make transformers skip a quantized one.
        """
        skipped = kept_apart(weights, others)
        scheme = next(weight.scheme for weight in weights if weight.scheme is not None)
        assert scheme is not None
        if not scheme.flat:
            return {
                "quant_method": "bitsandbytes",
                "load_in_4bit": False,
                "load_in_8bit": True,
                "_load_in_4bit": False,
                "_load_in_8bit": True,
                "llm_int8_enable_fp32_cpu_offload": False,
                "llm_int8_has_fp16_weight": False,
                "llm_int8_skip_modules": skipped,
                "llm_int8_threshold": 6.0,
            }
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_quant_type": scheme.kind,
            "bnb_4bit_use_double_quant": scheme.double_quant,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": skipped,
            "llm_int8_threshold": 6.0,
        }

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """Weight name -> how it is stored, for every quantized weight of a checkpoint."""
        found: dict[str, StoredWeight] = {}
        dtype = model_dtype(source)
        for key in source.names():
            if key.endswith("." + _SCB):
                name = key.removesuffix(_SCB) + "weight"
                found[name] = _stored_rows(self, name, dtype, source)
                continue
            name, separator, _ = key.partition(_STATE)
            if not separator:
                continue
            state = _read_state(key, source)
            scheme, shape, dtype = _described(key, state)
            planned = PlannedWeight(name=name, module="", shape=shape, scheme=scheme)
            infos = self.layout(planned, dtype)
            # bitsandbytes itself does not pad its description.
            check_stored([info for info in infos if info.name != key], source, key)
            found[name] = StoredWeight.of(planned, dtype, infos)
        return found

    def unpack(self, weight: StoredWeight, source: Source) -> QuantizedTensor:
        """The inverse of `pack`.  CheckpointError if the stored code values are not the kind's."""
        scheme, name, shape = weight.scheme, weight.name, weight.shape
        if not scheme.flat:
            return _unpack_rows(weight, source)
        if not torch.equal(source.read(f"{name}.quant_map"), _quant_map(scheme)):
            raise CheckpointError(f"{name}.quant_map: these are not the values of {scheme.kind}")
        packed = source.read(name).reshape(-1)
        codes = torch.empty(2 * packed.numel(), dtype=torch.uint8)
        codes[::2] = packed >> 4
        codes[1::2] = packed & 15
        absmax = source.read(f"{name}.absmax")
        block = scheme.group_size or 0
        straddles = shape[1] % block != 0
        scale_shape = (absmax.numel(),) if straddles else (shape[0], shape[1] // block)
        scale: PlainScale | NestedScale
        if scheme.double_quant:
            state = _read_state(name + _STATE + scheme.kind, source)
            scale = NestedScale(
                codes=absmax,
                table=source.read(f"{name}.nested_quant_map"),
                absmax=source.read(f"{name}.nested_absmax"),
                offset=torch.tensor(float(state["nested_offset"]), dtype=torch.float32),
                shape=scale_shape,
            )
        else:
            scale = PlainScale(tensor=absmax.view(scale_shape))
        return QuantizedTensor(
            codes=codes[: shape[0] * shape[1]].view(shape),
            scale=scale,
            zero=None,
            scheme=scheme,
            dtype=weight.dtype,
        )


def _pack_rows(weight: PlannedWeight, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of int8 rows.  NumericsError if a scale is not 1/127 of a float32 number."""
    scale = tensor.scale.values().cpu().reshape(-1)
    absmax = scale * 127
    if not torch.equal(absmax / 127, scale):
        raise NumericsError(
            f"{weight.name}: a scale is not exact as SCB / 127; scales are rounded with "
            "store_scale first"
        )
    stem = weight.name.removesuffix("weight")
    return {
        weight.name: (tensor.codes.cpu() ^ 128).view(torch.int8).contiguous(),
        stem + _SCB: absmax,
        stem + _WEIGHT_FORMAT: torch.tensor(0, dtype=torch.uint8),
    }


def _stored_rows(fmt: Bitsandbytes, name: str, dtype: str, source: Source) -> StoredWeight:
    """How a weight of int8 rows is stored.  CheckpointError for another layout than rows."""
    shape = source.info(name).shape
    if len(shape) != 2:
        raise CheckpointError(f"{name}: shape {list(shape)} is not that of a matrix")
    scheme = Scheme(kind="int", bits=8, group_size=None, activation_bits=8)
    planned = PlannedWeight(name=name, module="", shape=(shape[0], shape[1]), scheme=scheme)
    infos = fmt.layout(planned, dtype)
    key = name.removesuffix("weight") + _WEIGHT_FORMAT
    # Older versions did not write it; rows were the default then.
    infos = infos if key in source.names() else infos[:-1]
    check_stored(infos, source, "quantization_config")
    if len(infos) == 3 and (number := source.read_bytes(key)[0]) != 0:
        raise CheckpointError(f"{key}: {number} is not read; 0 (rows) is")
    return StoredWeight.of(planned, dtype, infos)


def _unpack_rows(weight: StoredWeight, source: Source) -> QuantizedTensor:
    absmax = source.read(weight.name.removesuffix("weight") + _SCB)
    return QuantizedTensor(
        codes=source.read(weight.name).view(torch.uint8) ^ 128,
        scale=PlainScale(tensor=absmax.div(127).view(-1, 1)),
        zero=None,
        scheme=weight.scheme,
        dtype=weight.dtype,
    )


def _quant_map(scheme: Scheme) -> Tensor:
    # Adding zero makes FP4's second zero positive, as bitsandbytes has it.
    values = NF4 if scheme.kind == "nf4" else FP4_VALUES
    return torch.tensor(values, dtype=torch.float32) + 0.0


def _pack_codes(codes_OI: Tensor, scheme: Scheme) -> Tensor:
    flat = codes_OI.reshape(-1)
    packed = torch.empty(-(-flat.numel() // 2), 1, dtype=torch.uint8)
    even = packed[: flat.numel() // 2, 0]
    torch.bitwise_left_shift(flat[: 2 * even.numel() : 2], 4, out=even)
    even |= flat[1::2]
    if flat.numel() % 2:
        # bitsandbytes pads the values, not the codes, with zero.
        zero = grid_of(scheme).encode(torch.zeros(1), torch.ones(1), None)
        packed[-1, 0] = (flat[-1] << 4) | zero.to(torch.uint8)[0]
    return packed


def _state(
    scheme: Scheme, dtype: Dtype, shape: tuple[int, int], nested_offset: float | None
) -> bytes:
    """The quant_state JSON; spaces at its end make its length independent of the offset."""
    record: dict[str, Any] = {
        "quant_type": scheme.kind,
        "blocksize": scheme.group_size,
        "dtype": name_of(label_of(dtype)),
        "shape": list(shape),
    }
    if nested_offset is None:
        return json.dumps(record).encode()
    record["nested_blocksize"] = _NESTED_BLOCK
    record["nested_dtype"] = "float32"
    record["nested_offset"] = nested_offset
    padding = _OFFSET_WIDTH - len(json.dumps(nested_offset))
    return json.dumps(record).encode() + b" " * padding


def _read_state(key: str, source: Source) -> dict[str, Any]:
    info = source.info(key)
    try:
        if info.label != "U8" or info.numel > 4096:
            raise ValueError("no bytes, or too many")
        state = json.loads(source.read_bytes(key))
        if not isinstance(state, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{key}: the description cannot be read: {error}") from error
    return state


def _described(key: str, state: Mapping[str, Any]) -> tuple[Scheme, tuple[int, int], str]:
    """Scheme, shape and dtype that a quant_state gives.  Raises CheckpointError."""
    shape, dtype = state.get("shape"), _DTYPES.get(str(state.get("dtype")))
    kind, block = state.get("quant_type"), state.get("blocksize")
    nested = state.get("nested_blocksize")
    if kind != key.partition(_STATE)[2] or kind not in ("nf4", "fp4"):
        raise CheckpointError(f"{key}: quant_type {kind!r} does not fit the tensor's name")
    if block not in BLOCK_SIZES or nested not in (None, _NESTED_BLOCK) or dtype is None:
        raise CheckpointError(
            f"{key}: blocksize {block}, nested_blocksize {nested}, dtype {state.get('dtype')} are "
            f"not read; allowed: {BLOCK_SIZES}, {_NESTED_BLOCK} or none, {', '.join(_DTYPES)}"
        )
    if nested and not isinstance(state.get("nested_offset"), float):
        raise CheckpointError(f"{key}: nested_offset {state.get('nested_offset')!r} is no number")
    if not (
        isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    ):
        raise CheckpointError(f"{key}: shape {shape} is not that of a matrix")
    scheme = Scheme(kind=kind, bits=4, group_size=block, double_quant=nested is not None)
    return scheme, (shape[0], shape[1]), dtype
