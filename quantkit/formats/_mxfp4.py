"""MXFP4 experts, as gpt-oss ships (transformers' "mxfp4"): read, not written.

Shapes: E experts, O out features, I in features, G = I/32 groups per row.  For the experts of one
projection, called NAME (".../mlp.experts.gate_up_proj"):

    NAME_blocks      uint8 [E, O, G, 16], two e2m1 numbers in a byte, the first in the low nibble
    NAME_scales      uint8 [E, O, G], the exponent of a power of two plus 127; 255 is NaN

value = number · 2^(scale - 127).  Each expert is a weight [O, I] of its own (`expert_name`); the
rows of gate_up_proj stay interleaved, gate first.
"""

from __future__ import annotations

from typing import ClassVar

from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError
from quantkit.formats.bitpack import unpack_nibbles
from quantkit.formats.format import StoredWeight, expert_name
from quantkit.formats.stored import model_dtype, power_of_two
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK_BYTES = 16


class Mxfp4:
    """e2m1 experts in groups of 32 with a power of two as scale."""

    name: ClassVar[str] = "mxfp4"

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """Weight name -> how it is stored, for every expert of a checkpoint."""
        dtype = model_dtype(source.config)
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
                    scheme=Scheme.parse("mxfp4a16"),
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
