"""AWQ "gemm": the layout of AutoAWQ, which vLLM and transformers read.

Shapes: O out features, I in features, G groups per row.  For weight NAME (less ".weight"):

    NAME.qweight  int32 [I, O/8]   eight 4-bit codes along O, in the order 0 2 4 6 1 3 5 7
    NAME.qzeros   int32 [G, O/8]   zeros, packed alike; of symmetric schemes 8
    NAME.scales   float16 [G, O]

A file holds one group size.  It does not say whether a scheme is symmetric: weights whose zeros are
all 8 are read as symmetric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError
from quantkit.formats._skipped import skipped_too
from quantkit.formats.bitpack import pack_rows, unpack_rows
from quantkit.formats.format import (
    PlannedWeight,
    StoredWeight,
    check_divides,
    check_stored,
    named_as_weight,
)
from quantkit.formats.readers import awq_readers, outside_blocks
from quantkit.formats.stored import model_dtype, round_scale, stored_scale
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.checkpoint.dtypes import Dtype

# Nibble k of a word holds code _ORDER[k] of its eight.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SYMMETRIC_ZERO = 8


class Awq:
    """Weight-only integers of 4 bits in groups (AutoAWQ, vLLM)."""

    name: ClassVar[str] = "awq"
    holds_permuted: ClassVar[bool] = False

    def supports(self, scheme: Scheme) -> str | None:
        """None if the scheme is weight-only with 4 bits."""
        if scheme.kind != "int":
            return f"it holds integers, not {scheme.kind}"
        if scheme.activation_bits != 16:
            return "it is for 16-bit activations"
        if scheme.bits != 4:
            return "it holds 4 bit"
        return None

    def supports_shape(self, weight: PlannedWeight) -> str | None:
        """None if rows fill whole words."""
        if (reason := named_as_weight(weight)) is not None:
            return reason
        if weight.shape[0] % 8:
            return "it needs rows divisible by 8; keep this weight with --skip"
        return None

    def supports_together(self, weights: Sequence[PlannedWeight]) -> str | None:
        """None if all have one group size and readers, asked to skip what is kept, skip no more."""
        quantized = [weight for weight in weights if weight.scheme is not None]
        sizes = {weight.scheme.group_size: weight for weight in quantized if weight.scheme}
        if len(sizes) > 1:
            (_, first), (_, second), *_ = sizes.items()
            assert first.scheme is not None and second.scheme is not None
            return (
                f"{second.name} ({second.scheme.name}) and {first.name} ({first.scheme.name}): a "
                "checkpoint has one group size; use compressed-tensors, or give both the same"
            )
        return skipped_too(_kept(weights), quantized, substrings=True)

    def readers(
        self, weights: Sequence[PlannedWeight], model_type: str
    ) -> Mapping[str, str | None]:
        """Runtime -> None if it reads the checkpoint, else why not; see formats/readers.py."""
        return awq_readers(weights, model_type)

    def layout(self, weight: PlannedWeight, dtype: Dtype) -> tuple[TensorInfo, ...]:
        """Exactly the tensors `pack` returns, whatever the dtype of the weight in the source."""
        scheme, (rows, columns) = weight.scheme, weight.shape
        assert scheme is not None, weight.name
        groups = columns // (scheme.group_size or columns)
        stem = weight.name.removesuffix("weight")
        return (
            TensorInfo(name=stem + "qweight", dtype="I32", shape=(columns, rows // 8)),
            TensorInfo(name=stem + "qzeros", dtype="I32", shape=(groups, rows // 8)),
            TensorInfo(name=stem + "scales", dtype="F16", shape=(groups, rows)),
        )

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float16, whatever the model's."""
        return torch.float16

    def represent(self, tensor: QuantizedTensor) -> tuple[QuantizedTensor, str | None]:
        """The tensor with float16 scales, and what was rounded for that, or None."""
        return round_scale(tensor, torch.float16)

    def pack(self, weight: PlannedWeight, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Checkpoint name -> contiguous CPU tensor.  NumericsError if a scale is not exact."""
        assert tensor.scheme == weight.scheme and tensor.columns is None
        scales = stored_scale(weight.name, tensor, torch.float16).T.contiguous()
        if tensor.zero is None:
            zero_GO = torch.full(scales.shape, _SYMMETRIC_ZERO, dtype=torch.uint8)
        else:
            zero_GO = tensor.zero.cpu().T
        stem = weight.name.removesuffix("weight")
        return {
            stem + "qweight": _pack(tensor.codes.cpu().T),
            stem + "qzeros": _pack(zero_GO),
            stem + "scales": scales,
        }

    def config(
        self,
        weights: Sequence[PlannedWeight],
        *,
        model_type: str,
        dtype: torch.dtype,
        others: Sequence[TensorInfo] = (),
    ) -> dict[str, Any]:
        """The `quantization_config` as AutoAWQ writes it; `others` need no mention."""
        quantized = [weight for weight in weights if weight.scheme is not None]
        scheme = quantized[0].scheme
        assert scheme is not None
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": scheme.group_size or -1,
            "zero_point": True,
            "lm_head": any(outside_blocks(weight) for weight in quantized),
            "modules_to_not_convert": _kept(weights),
        }

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """Weight name -> how it is stored; reads all zeros, which tell what is symmetric."""
        config = source.config.get("quantization_config")
        if not isinstance(config, dict) or config.get("quant_method") != "awq":
            raise CheckpointError("config.json: quantization_config is not that of AWQ")
        group_size = _group_size(config)
        dtype = model_dtype(source)
        found: dict[str, StoredWeight] = {}
        for key in sorted(source.names()):
            if not key.endswith(".qweight"):
                continue
            name = key.removesuffix("qweight") + "weight"
            shape = source.info(key).shape
            if len(shape) != 2:
                raise CheckpointError(f"{key}: {list(shape)} is not the shape of a matrix")
            size = (shape[1] * 8, shape[0])
            scheme = Scheme(kind="int", bits=4, group_size=group_size, symmetric=False)
            check_divides(name, size, scheme)
            planned = PlannedWeight(name=name, module="", shape=size, scheme=scheme)
            infos = self.layout(planned, dtype)
            check_stored(infos, source, "quantization_config")
            centered = _all_symmetric(source.read_bytes(name.removesuffix("weight") + "qzeros"))
            if centered:
                scheme = Scheme(kind="int", bits=4, group_size=group_size)
                planned = PlannedWeight(name=name, module="", shape=size, scheme=scheme)
            found[name] = StoredWeight.of(planned, dtype, infos, centered=centered)
        return found

    def unpack(self, weight: StoredWeight, source: Source) -> QuantizedTensor:
        """The inverse of `pack`: same codes, scale and zero."""
        stem = weight.name.removesuffix("weight")
        zero: Tensor | None = None
        if not weight.scheme.symmetric:
            zero = _unpack(source.read(stem + "qzeros")).T.contiguous()
        return QuantizedTensor(
            codes=_unpack(source.read(stem + "qweight")).T.contiguous(),
            scale=PlainScale(tensor=source.read(stem + "scales").T.contiguous()),
            zero=zero,
            scheme=weight.scheme,
            dtype=weight.dtype,
        )


def _pack(codes_RC: Tensor) -> Tensor:
    """int32 [R, C/8] of 4-bit codes in AWQ's order."""
    rows, columns = codes_RC.shape
    eights = codes_RC.to(torch.uint8).reshape(rows, columns // 8, 8)
    return pack_rows(eights[..., _ORDER].reshape(rows, columns), 4)


def _unpack(words: Tensor) -> Tensor:
    """uint8 codes [R, C]: the inverse of `_pack`."""
    rows, columns = words.shape[0], words.shape[1] * 8
    halves = unpack_rows(words, 4, columns).view(rows, -1, 2, 4)
    # The even codes of each eight lie before the odd ones.
    return halves.transpose(-1, -2).reshape(rows, columns)


def _all_symmetric(qzeros: bytes) -> bool:
    return qzeros.count(_SYMMETRIC_ZERO * 0x11) == len(qzeros)


def _kept(weights: Sequence[PlannedWeight]) -> list[str]:
    """Modules that readers must leave alone."""
    return list(dict.fromkeys(w.module for w in weights if w.scheme is None and not w.expert))


def _group_size(config: Mapping[str, Any]) -> int | None:
    """The group size of a file, None for whole rows.  CheckpointError for what is not read."""
    bits = config.get("bits", config.get("w_bit"))
    size = config.get("group_size", config.get("q_group_size"))
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if bits != 4 or version != "gemm" or type(size) is not int or (size < 2 and size != -1):
        raise CheckpointError(
            f"config.json: quantization_config: AWQ {version} with {bits} bit in groups of {size} "
            "is not read; 4 bit gemm in groups of 2 or more, or -1, is"
        )
    return None if size == -1 else size
