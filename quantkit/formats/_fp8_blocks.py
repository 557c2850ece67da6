"""FP8 in blocks, as DeepSeek-V3 and Qwen3 ship (transformers' "fp8"): read, not written.

Shapes: O out features, I in features, blocks of R x C weights.  For weight NAME:

    NAME             float8_e4m3fn [O, I]
    NAME_scale_inv   float [ceil(O/R), ceil(I/C)], or one number for the whole weight

value = number · scale_inv of its block.  Activations are taken as they are: what is read is meant
to be decoded, or quantized anew.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError
from quantkit.formats.format import StoredWeight
from quantkit.formats.stored import model_dtype
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

_SCALE = "_scale_inv"


class Fp8Blocks:
    """e4m3 weights with a scale per block or per weight."""

    name: ClassVar[str] = "fp8"

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """Weight name -> how it is stored, for every quantized weight of a checkpoint."""
        config = source.config.get("quantization_config")
        block = config.get("weight_block_size") if isinstance(config, dict) else None
        dtype = model_dtype(source.config)
        found = {}
        for key in source.names():
            if key.endswith(".weight" + _SCALE):
                name = key.removesuffix(_SCALE)
                found[name] = _stored(name, block, dtype, source)
        return found

    def unpack(self, weight: StoredWeight, source: Source) -> QuantizedTensor:
        """Numbers as codes, and each block's scale once per row."""
        (rows, columns), size = weight.shape, weight.scheme.group_size
        scale = source.read(weight.name + _SCALE).to(torch.float32)
        if scale.numel() == 1:
            scale_OG = scale.reshape(1, 1).expand(rows, columns // (size or columns))
        else:
            height = _block_height(source)
            scale_OG = scale.repeat_interleave(height, dim=0)[:rows]
        return QuantizedTensor(
            codes=source.read(weight.name).view(torch.uint8),
            scale=PlainScale(tensor=scale_OG.contiguous()),
            zero=None,
            scheme=weight.scheme,
            dtype=weight.dtype,
        )


def _block_height(source: Source) -> int:
    height: int = source.config["quantization_config"]["weight_block_size"][0]
    return height


def _stored(name: str, block: object, dtype: torch.dtype, source: Source) -> StoredWeight:
    """How one weight is stored.  CheckpointError if its scales do not fit the block size."""
    info, scale = source.info(name), source.info(name + _SCALE)
    if info.dtype != torch.float8_e4m3fn or len(info.shape) != 2:
        raise CheckpointError(f"{name}: {info.dtype} {list(info.shape)} is no e4m3 matrix")
    rows, columns = info.shape
    size: int | None = None
    if scale.numel != 1:
        if not (
            isinstance(block, list)
            and len(block) == 2
            and all(type(length) is int and length > 1 for length in block)
        ):
            raise CheckpointError(
                f"{name}: scales of shape {list(scale.shape)}, but weight_block_size is {block}"
            )
        height, size = block
        expected = (-(-rows // height), -(-columns // size))
        if scale.shape != expected or columns % size:
            raise CheckpointError(
                f"{name}: blocks of {block} in a weight of {list(info.shape)} need scales of "
                f"{list(expected)} and whole blocks in each row; {list(scale.shape)} is stored"
            )
    scheme = Scheme(kind="fp8", bits=8, group_size=size)
    return StoredWeight(
        name=name,
        scheme=scheme,
        shape=(rows, columns),
        dtype=dtype,
        tensors=(name, name + _SCALE),
    )
