"""GGUF as a format: weights as ggml's blocks, rows of packed bytes.

What is packed already in another format goes into blocks without being quantized anew, where a
block type has the same grid.  Shapes: O out features, I in features, G groups per row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError, NumericsError
from quantkit.formats.format import PlannedWeight, StoredWeight
from quantkit.formats.gguf.blocks import pack
from quantkit.formats.gguf.container import GgufContainer
from quantkit.formats.gguf.floats import FLOAT_TYPES, MXFP4, pack_mxfp4, unpack_floats
from quantkit.formats.gguf.mixes import RECIPES, scheme_of
from quantkit.formats.gguf.source import GgufSource
from quantkit.formats.stored import round_scale
from quantkit.numbers.scheme import BLOCKS, Scheme
from quantkit.numbers.superblock import BLOCK_TYPES, BlockScale, BlockType
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.checkpoint.dtypes import Dtype

# Weights packed at a time.
_CHUNK = 1 << 23


class Gguf:
    """One file for llama.cpp and Ollama: mixes of block types, named as llama-quantize does."""

    name: ClassVar[str] = "gguf"
    holds_permuted: ClassVar[bool] = False
    # Blocks run as llama.cpp decodes them: nothing is rounded to the checkpoint's dtype.
    compute_dtype: ClassVar[str] = "F32"
    default_method: ClassVar[str] = "gptq"
    default_scheme: ClassVar[str] = "q4_k_m"

    def supports(self, scheme: Scheme) -> str | None:
        """None for block types of ggml, else why not."""
        if scheme.kind == "ggml" or scheme == MXFP4:
            return None
        if scheme.kind == "nvfp4":
            return "NVFP4 blocks have no divisor for the weight, without which small ones are lost"
        return (
            f"it is quantized in blocks of ggml: --scheme {', '.join(RECIPES)}; other schemes are "
            "quantized to another format first and then written with `quantkit export`"
        )

    def supports_shape(self, weight: PlannedWeight) -> str | None:
        """None if rows are whole blocks, else why not and what fits."""
        assert weight.scheme is not None
        if weight.scheme == MXFP4:
            # Groups of 32 are its blocks.
            return None
        if weight.scheme.block not in BLOCKS:
            return f"{weight.scheme.name} is a mix for a whole model; one weight has a block type"
        kind = _kind(weight.scheme)
        if weight.shape[1] % kind.size == 0:
            return None
        return (
            f"{weight.shape[1]} columns are no whole blocks of {kind.size}; use q8_0, whose blocks "
            "have 32, or keep the weight"
        )

    def supports_together(self, weights: Sequence[PlannedWeight]) -> str | None:
        """None: types mix freely."""
        return None

    def readers(
        self, weights: Sequence[PlannedWeight], model_type: str
    ) -> Mapping[str, str | None]:
        """llama.cpp and Ollama: the container refuses families that they do not have."""
        return {"llama.cpp": None, "ollama": None}

    def layout(self, weight: PlannedWeight, dtype: Dtype) -> tuple[TensorInfo, ...]:
        """Rows of packed blocks, uint8 [O, bytes of a row], under the weight's own name."""
        assert weight.scheme is not None
        rows, columns = weight.shape
        if weight.scheme == MXFP4:
            _, size, num_bytes = FLOAT_TYPES["MXFP4"]
        else:
            kind = _kind(weight.scheme)
            size, num_bytes = kind.size, kind.num_bytes
        shape = (rows, columns // size * num_bytes)
        return (TensorInfo(name=weight.name, dtype="U8", shape=shape),)

    def pack(self, weight: PlannedWeight, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The packed rows, under the weight's own name."""
        (info,) = self.layout(weight, tensor.dtype)
        if tensor.scheme == MXFP4:
            return {weight.name: pack_mxfp4(weight.name, tensor)}
        assert isinstance(tensor.scale, BlockScale), weight.name
        packed = torch.empty(info.shape, dtype=torch.uint8)
        step = max(1, _CHUNK // tensor.shape[1])
        for start in range(0, len(packed), step):
            rows = slice(start, min(start + step, len(packed)))
            blocks = tensor.scale.rows(rows).blocks(tensor.codes[rows].cpu())
            packed[rows] = pack(blocks).view(-1, info.shape[1])
        return {weight.name: packed}

    def config(
        self,
        weights: Sequence[PlannedWeight],
        *,
        model_type: str,
        dtype: torch.dtype,
        others: Sequence[TensorInfo] = (),
    ) -> dict[str, Any]:
        """Nothing but the name: a file describes itself."""
        return {"quant_method": self.name}

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """The quantized weights of a GGUF file, by the checkpoint's names."""
        if not isinstance(source, GgufSource):
            raise CheckpointError("gguf: weights are read from a GGUF file")
        found = {}
        for name in source.names():
            label = source.type_of(name)
            if label in BLOCK_TYPES or label in FLOAT_TYPES:
                found[name] = StoredWeight(
                    name=name,
                    scheme=scheme_of(label),
                    shape=source.stored_shape(name),
                    label="F16",
                    tensors=(name,),
                )
        return found

    def unpack(self, weight: StoredWeight, source: Source) -> QuantizedTensor:
        """The very codes, scales and minima of the file."""
        assert isinstance(source, GgufSource)
        if (label := source.type_of(weight.name)) in FLOAT_TYPES:
            data = source.packed_rows(weight.name)
            return unpack_floats(weight.name, label, data, weight.dtype)
        blocks = source.blocks(weight.name)
        return QuantizedTensor(
            codes=blocks.codes.reshape(weight.shape),
            scale=BlockScale.of(blocks, weight.shape[0]),
            zero=None,
            scheme=weight.scheme,
            dtype=weight.dtype,
        )

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float16, ggml's dtype of scales."""
        return torch.float16

    def container(
        self, source: Source, config: Any, *, head_tied: bool, unused: Collection[str]
    ) -> GgufContainer:
        """Where the model's tensors go; see `GgufContainer`."""
        return GgufContainer(source, config, head_tied=head_tied, unused=unused)

    def stored_as(self, scheme: Scheme) -> Scheme | str:
        """The block type that holds another format's codes as they are, or why none does."""
        if scheme.kind == "ggml" or scheme == MXFP4:
            return scheme
        if (reason := why_not(scheme)) is not None:
            return reason
        return Scheme.parse(_holder(scheme))

    def represent(self, tensor: QuantizedTensor) -> tuple[QuantizedTensor, str | None]:
        """The same codes and scales in blocks, and whether minima had to be rounded to float16.

        Raises NumericsError if a minimum overflows float16.
        """
        scheme = tensor.scheme
        if scheme.kind == "ggml" or scheme == MXFP4:
            return tensor, None
        target = Scheme.parse(_holder(scheme))
        kind = _kind(target)
        tensor, told = round_scale(tensor, torch.float16)
        assert isinstance(tensor.scale, PlainScale) and tensor.scale.tensor.ndim == 2
        scale_OG = tensor.scale.tensor.float()
        repeats = tensor.shape[1] // scale_OG.shape[1] // kind.size
        codes, minimum, rounded = tensor.codes, None, [told]
        if tensor.zero is None:
            # 2-bit code 0..3 around 2 is 6..9 around 8: the same distances from the center.
            codes = (codes + (kind.center - 2 ** (scheme.bits - 1))).to(torch.uint8)
        else:
            low = -tensor.zero.float() * scale_OG
            minimum = low.half()
            if not bool(torch.isfinite(minimum).all()):
                raise NumericsError("a group's minimum is too large for float16")
            if not torch.equal(minimum.float(), low):
                rounded.append("minima rounded to float16")
            minimum = minimum.repeat_interleave(repeats, 1)
        scale = BlockScale(kind=kind, d=scale_OG.half().repeat_interleave(repeats, 1), m=minimum)
        held = QuantizedTensor(
            codes=codes, scale=scale, zero=None, scheme=target, dtype=tensor.dtype
        )
        return held, "; ".join(note for note in rounded if note is not None) or None


def why_not(scheme: Scheme) -> str | None:
    """None if a block type of ggml holds the scheme's codes, else why not."""
    if scheme.kind != "int":
        return f"ggml has no block type with {scheme.kind}'s values and free scales"
    if not scheme.symmetric and scheme.bits > 5:
        return "ggml has no block type with a minimum and more than 5 bits"
    if scheme.group_size is not None and scheme.group_size % 32:
        return f"ggml's blocks are of 32 weights; {scheme.group_size} is no multiple"
    return None


def _holder(scheme: Scheme) -> str:
    """The smallest block type that holds an integer scheme's codes; `why_not` comes first."""
    if scheme.symmetric:
        return "q4_0" if scheme.bits <= 4 else "q5_0" if scheme.bits == 5 else "q8_0"
    return "q4_1" if scheme.bits <= 4 else "q5_1"


def _kind(scheme: Scheme) -> BlockType:
    assert scheme.block is not None and scheme.block in BLOCKS, scheme.name
    return BLOCK_TYPES[scheme.block.upper()]
