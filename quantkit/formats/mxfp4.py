"""MXFP4 experts, as gpt-oss ships (transformers' "mxfp4").

Shapes: E experts, O out features, I in features, G = I/32 groups per row.  For the experts of one
projection, called NAME (".../mlp.experts.gate_up_proj"):

    NAME_blocks      uint8 [E, O, G, 16], two e2m1 numbers in a byte, the first in the low nibble
    NAME_scales      uint8 [E, O, G], the exponent of a power of two plus 127; 255 is NaN

value = number · 2^(scale - 127).  Each expert is a weight [O, I] of its own (`expert_name`) and is
written as one slice of both; the rows of gate_up_proj stay interleaved, gate first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError
from quantkit.formats._skipped import kept_modules
from quantkit.formats.bitpack import pack_nibbles, unpack_nibbles
from quantkit.formats.format import PlannedWeight, StoredWeight, expert_name, fused_name
from quantkit.formats.readers import mxfp4_readers
from quantkit.formats.stored import exponents_of, model_dtype, power_of_two
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.checkpoint.dtypes import Dtype

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK_BYTES = 16
_WRITTEN = Scheme.parse("mxfp4a16")


class Mxfp4:
    """e2m1 experts in groups of 32 with a power of two as scale; all else stays as it is."""

    name: ClassVar[str] = "mxfp4"
    holds_permuted: ClassVar[bool] = False

    def supports(self, scheme: Scheme) -> str | None:
        """None for mxfp4a16."""
        return None if scheme == _WRITTEN else f"it holds {_WRITTEN.name}, not {scheme.name}"

    def leaves(self, weight: PlannedWeight) -> str | None:
        """Why a weight stays as it is, whatever the recipe's scheme; None for experts."""
        return None if weight.expert else "the format holds experts only"

    def supports_shape(self, weight: PlannedWeight) -> str | None:
        """None for an expert of a model that keeps those of a layer in one tensor."""
        if weight.expert and weight.split and fused_name(weight.name) is not None:
            return None
        return "it holds experts only, of models that keep all experts of a layer in one tensor"

    def supports_together(self, weights: Sequence[PlannedWeight]) -> str | None:
        """None if all experts are quantized, which readers take for granted."""
        kept = next((w.name for w in weights if w.expert and w.scheme is None), None)
        return None if kept is None else f"{kept}: it holds all experts of a model or none"

    def readers(
        self, weights: Sequence[PlannedWeight], model_type: str
    ) -> Mapping[str, str | None]:
        """Runtime -> None if it reads the checkpoint, else why not; see formats/readers.py."""
        return mxfp4_readers(model_type)

    def layout(self, weight: PlannedWeight, dtype: Dtype) -> tuple[TensorInfo, ...]:
        """Exactly the tensors `pack` returns: slices of those for all experts."""
        fused = fused_name(weight.name)
        assert fused is not None, weight.name
        (stem, expert), (rows, columns) = fused, weight.shape
        groups = (rows, columns // (2 * _BLOCK_BYTES))
        return tuple(
            TensorInfo(name=weight.name + end, dtype="U8", shape=shape, whole=(stem + end, expert))
            for end, shape in ((_BLOCKS, (*groups, _BLOCK_BYTES)), (_SCALES, groups))
        )

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32, which holds every power of two that a byte does."""
        return torch.float32

    def represent(self, tensor: QuantizedTensor) -> tuple[QuantizedTensor, str | None]:
        """The tensor itself: the scheme has powers of two only."""
        return tensor, None

    def pack(self, weight: PlannedWeight, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Slice -> contiguous CPU tensor.  NumericsError if a scale is no power of two."""
        blocks, scales = self.layout(weight, tensor.dtype)
        return {
            blocks.name: pack_nibbles(tensor.codes.cpu()).view(blocks.shape).contiguous(),
            scales.name: exponents_of(weight.name, tensor).contiguous(),
        }

    def config(
        self,
        weights: Sequence[PlannedWeight],
        *,
        model_type: str,
        dtype: torch.dtype,
        others: Sequence[TensorInfo] = (),
    ) -> dict[str, Any]:
        """The `quantization_config`; `others` are the model's remaining tensors, all kept."""
        return {
            "quant_method": self.name,
            "modules_to_not_convert": kept_modules(weights, others),
        }

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """Weight name -> how it is stored, for every expert of a checkpoint."""
        dtype = model_dtype(source)
        found = {}
        stems = [
            n.removesuffix(end)
            for n in source.names()
            for end in (_BLOCKS, _SCALES)
            if n.endswith(end)
        ]
        for stem in dict.fromkeys(stems):
            num_experts, rows, columns = _shape(stem, source)
            for expert in range(num_experts):
                name = expert_name(stem, expert)
                found[name] = StoredWeight(
                    name=name,
                    scheme=_WRITTEN,
                    shape=(rows, columns),
                    label=dtype,
                    tensors=(stem + _BLOCKS, stem + _SCALES),
                    expert=expert,
                )
        return found

    def unpack(self, weight: StoredWeight, source: Source) -> QuantizedTensor:
        """One expert's codes and scales.  NumericsError if a scale is NaN."""
        blocks_name, scales_name = weight.tensors
        expert = weight.expert
        assert expert is not None
        exponent = source.read_rows(scales_name, expert, expert + 1)[0]
        packed = source.read_rows(blocks_name, expert, expert + 1)[0]
        return QuantizedTensor(
            codes=unpack_nibbles(packed.flatten(1)),
            scale=PlainScale(tensor=power_of_two(f"{scales_name}: expert {expert}", exponent)),
            zero=None,
            scheme=weight.scheme,
            dtype=weight.dtype,
        )


def _shape(stem: str, source: Source) -> tuple[int, int, int]:
    """(E, O, I) of a projection.  CheckpointError if its two tensors do not fit each other."""
    # `info` raises CheckpointError itself if one of the two is missing.
    blocks, scales = source.info(stem + _BLOCKS), source.info(stem + _SCALES)
    shape = blocks.shape
    if blocks.label != "U8" or len(shape) != 4 or shape[-1] != _BLOCK_BYTES:
        raise CheckpointError(
            f"{blocks.name}: {blocks.dtype} {list(shape)} is stored, but mxfp4 demands torch.uint8 "
            f"[experts, rows, groups, {_BLOCK_BYTES}]"
        )
    allowed = ("U8", "F8_E8M0")
    if scales.label not in allowed or scales.shape != shape[:-1] or min(shape) < 1:
        raise CheckpointError(
            f"{scales.name}: {scales.dtype} {list(scales.shape)} is stored, but blocks of "
            f"{list(shape)} need torch.uint8 {list(shape[:-1])}"
        )
    return shape[0], shape[1], shape[2] * 2 * _BLOCK_BYTES
