"""FP8 in blocks, as DeepSeek-V3 and Qwen3 ship (transformers' "fp8").

Shapes: O out features, I in features, blocks of R x C weights; written are 128 x 128.  For weight
NAME:

    NAME             float8_e4m3fn [O, I]
    NAME_scale_inv   float [ceil(O/R), ceil(I/C)] (written in float32), or one number for the weight

value = number · scale_inv of its block.  Inputs of 128 x 128 blocks are rounded in groups of 128,
as `activation_scheme: dynamic` says; those of others are taken as they are: what is read so is
meant to be decoded, or quantized anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError
from quantkit.formats._skipped import kept_apart, skipped_together
from quantkit.formats.format import PlannedWeight, StoredWeight, named_as_weight
from quantkit.formats.readers import fp8_readers
from quantkit.formats.stored import by_block, by_row, model_dtype, round_scale, stored_scale
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.checkpoint.dtypes import Dtype

_SCALE = "_scale_inv"
_WRITTEN = Scheme.parse("fp8a8_b128")


class Fp8:
    """e4m3 weights with a scale per block; per weight and of other blocks they are read only."""

    name: ClassVar[str] = "fp8"
    holds_permuted: ClassVar[bool] = False

    def supports(self, scheme: Scheme) -> str | None:
        """None for fp8a8_b128."""
        return None if scheme == _WRITTEN else f"it holds {_WRITTEN.name}, not {scheme.name}"

    def supports_shape(self, weight: PlannedWeight) -> str | None:
        """None unless it is a Conv1D weight, or its name is not that of a weight."""
        if weight.transposed:
            return "Conv1D weights are not held in blocks"
        return named_as_weight(weight)

    def supports_together(self, weights: Sequence[PlannedWeight]) -> str | None:
        """None if readers, asked to skip a kept module, would not skip a quantized one too."""
        return skipped_together(weights)

    def readers(
        self, weights: Sequence[PlannedWeight], model_type: str
    ) -> Mapping[str, str | None]:
        """Runtime -> None if it reads the checkpoint, else why not; see formats/readers.py."""
        return fp8_readers(weights, model_type)

    def layout(self, weight: PlannedWeight, dtype: Dtype) -> tuple[TensorInfo, ...]:
        """Exactly the tensors `pack` returns."""
        (rows, columns), size = weight.shape, _WRITTEN.group_size or 0
        scales = (-(-rows // size), columns // size)
        return (
            TensorInfo(name=weight.name, dtype="F8_E4M3", shape=weight.shape),
            TensorInfo(name=weight.name + _SCALE, dtype="F32", shape=scales),
        )

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32."""
        return torch.float32

    def represent(self, tensor: QuantizedTensor) -> tuple[QuantizedTensor, str | None]:
        """The tensor with float32 scales, which hold any, and what was rounded, or None."""
        return round_scale(tensor, self.scale_dtype(tensor.dtype))

    def pack(self, weight: PlannedWeight, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Checkpoint name -> contiguous CPU tensor.  NumericsError if rows of a block differ."""
        scale = stored_scale(weight.name, tensor, self.scale_dtype(tensor.dtype))
        return {
            weight.name: tensor.codes.cpu().view(torch.float8_e4m3fn).contiguous(),
            weight.name + _SCALE: by_block(weight.name, scale, tensor.scheme),
        }

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
        kept = kept_apart(weights, others)
        return {
            "quant_method": self.name,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_WRITTEN.group_size, _WRITTEN.group_size],
            "modules_to_not_convert": kept,
        }

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """Weight name -> how it is stored, for every quantized weight of a checkpoint."""
        config = source.config.get("quantization_config")
        config = config if isinstance(config, dict) else {}
        block, dtype = config.get("weight_block_size"), model_dtype(source)
        dynamic = config.get("activation_scheme") == "dynamic"
        found = {}
        for key in source.names():
            if key.endswith(".weight" + _SCALE):
                name = key.removesuffix(_SCALE)
                found[name] = _stored(name, block, dtype, source, dynamic=dynamic)
        return found

    def unpack(self, weight: StoredWeight, source: Source) -> QuantizedTensor:
        """Numbers as codes, and each block's scale once per row."""
        (rows, columns), scheme = weight.shape, weight.scheme
        scale = source.read(weight.name + _SCALE).to(torch.float32)
        if scale.numel() == 1 and scheme.share == "group":
            size = scheme.group_size or columns
            scale_OG = scale.reshape(1, 1).expand(rows, columns // size).contiguous()
        elif scheme.share == "group":
            height = _block_height(source)
            scale_OG = scale.repeat_interleave(height, dim=0)[:rows].contiguous()
        else:
            scale_OG = by_row(scale, scheme, rows)
        tensor = QuantizedTensor(
            codes=source.read(weight.name).view(torch.uint8),
            scale=PlainScale(tensor=scale_OG),
            zero=None,
            scheme=scheme,
            dtype=weight.dtype,
        )
        tensor.check(weight.name)
        return tensor


def _block_height(source: Source) -> int:
    height: int = source.config["quantization_config"]["weight_block_size"][0]
    return height


def _stored(name: str, block: object, dtype: str, source: Source, *, dynamic: bool) -> StoredWeight:
    """How one weight is stored.  CheckpointError if its scales do not fit the block size."""
    info, scale = source.info(name), source.info(name + _SCALE)
    if info.label != "F8_E4M3" or len(info.shape) != 2:
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
    written = [_WRITTEN.group_size, _WRITTEN.group_size]
    # One number for all may be a small weight's only block, which stands in a matrix.
    if block == written and dynamic and scale.shape == (-(-rows // 128), columns // 128):
        scheme = _WRITTEN
    return StoredWeight(
        name=name,
        scheme=scheme,
        shape=(rows, columns),
        label=dtype,
        tensors=(name, name + _SCALE),
    )
