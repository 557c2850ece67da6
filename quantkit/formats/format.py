"""On-disk formats: what each must offer; `registry.py` finds one by its name.

A format maps one weight to named tensors and back; files, shards and indexes are the checkpoint's
business.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.dtypes import dtype_of, label_of
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.shards import Layout
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError
from quantkit.numbers.cache import CacheScheme
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.checkpoint.dtypes import Dtype

# What `expert_name` gives.
_EXPERT = re.compile(r"(.+)\.(\d+)(?:\.([^.]+))?\.weight")


@dataclass(frozen=True, kw_only=True)
class PlannedWeight:
    """A quantizable weight and what becomes of it.

    name         in the checkpoint, as in "model.layers.0.mlp.up_proj.weight"
    module       path of the module that holds it in the transformers model (differs from `name`
                 where transformers renames: fused experts, a base model without its prefix)
    shape        (O, I), whatever the storage
    scheme       None = kept in full precision
    transposed   the source stores [I, O] (Conv1D)
    expert       transformers holds it as a slice of a fused 3-D parameter
    split        the source had it in one tensor with others, as all experts of a layer
    joined       transformers holds it as rows of a parameter with others
    """

    name: str
    module: str
    shape: tuple[int, int]
    scheme: Scheme | None
    transposed: bool = False
    expert: bool = False
    split: bool = False
    joined: bool = False


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A quantized weight found in a checkpoint; `tensors` are the names of all that belong to it.

    label        its original dtype, as safetensors names it
    transposed   the format stores its codes [I, O]
    permuted     columns of one group are not neighbours (`QuantizedTensor.columns`)
    expert       the weight is this slice of `tensors`, which hold all experts of a layer
    centered     the format does not say whether the scheme is symmetric, and its zeros are those
                 of a symmetric one: the numbers of both are the same
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    label: str
    tensors: tuple[str, ...]
    transposed: bool = False
    permuted: bool = False
    expert: int | None = None
    centered: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """torch's dtype."""
        return dtype_of(self.label)

    @classmethod
    def of(
        cls,
        weight: PlannedWeight,
        dtype: Dtype,
        infos: Sequence[TensorInfo],
        *,
        permuted: bool = False,
        centered: bool = False,
    ) -> StoredWeight:
        """The weight, whose original dtype is `dtype`, as it lies in these tensors."""
        assert weight.scheme is not None, weight.name
        return cls(
            name=weight.name,
            scheme=weight.scheme,
            shape=weight.shape,
            label=label_of(dtype),
            tensors=tuple(info.name for info in infos),
            transposed=weight.transposed,
            permuted=permuted,
            centered=centered,
        )


@runtime_checkable
class FormatReader(Protocol):
    """One on-disk layout of quantized weights, to read."""

    name: ClassVar[str]

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """Weight name -> how it is stored, for every quantized weight of a checkpoint.

        Raises CheckpointError if the tensors and `quantization_config` contradict each other, or
        if the checkpoint uses something this format's implementation does not know.
        """
        ...

    def unpack(self, weight: StoredWeight, source: Source) -> QuantizedTensor:
        """The inverse of `pack`: same codes, scale and zero."""
        ...


@runtime_checkable
class Format(FormatReader, Protocol):
    """One on-disk layout of quantized weights, to read and to write."""

    # Whether columns of one group may lie apart (`QuantizedTensor.columns`).
    holds_permuted: ClassVar[bool]

    def supports(self, scheme: Scheme) -> str | None:
        """None if the format can hold the scheme, else why not (without other formats' names)."""
        ...

    def supports_shape(self, weight: PlannedWeight) -> str | None:
        """None if a weight of this shape can be held under its scheme, else why not and what fits.

        The scheme itself is supported and its `check_shape` passed.
        """
        ...

    def supports_together(self, weights: Sequence[PlannedWeight]) -> str | None:
        """None if one checkpoint can hold these weights side by side, else which not and why."""
        ...

    def readers(
        self, weights: Sequence[PlannedWeight], model_type: str
    ) -> Mapping[str, str | None]:
        """Runtime -> None if it reads the checkpoint, else the reason why it does not."""
        ...

    def layout(self, weight: PlannedWeight, dtype: torch.dtype) -> tuple[TensorInfo, ...]:
        """Exactly the tensors `pack` returns; `dtype` is that of the weight in the source."""
        ...

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What it stores the scales of a weight of this dtype in.  Scales of integers and fp8 are
        bfloat16 values always; for float16 they are those that it holds too."""
        ...

    def represent(self, tensor: QuantizedTensor) -> tuple[QuantizedTensor, str | None]:
        """The nearest tensor that `pack` takes, and what was rounded; the tensor itself and None
        if it is held exactly.  The scheme is supported."""
        ...

    def pack(self, weight: PlannedWeight, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Checkpoint name -> contiguous CPU tensor.  Memory: the result plus a bounded chunk."""
        ...

    def config(
        self,
        weights: Sequence[PlannedWeight],
        *,
        model_type: str,
        dtype: torch.dtype,
        others: Sequence[TensorInfo] = (),
    ) -> dict[str, Any]:
        """The `quantization_config` for config.json.

        `weights` are all quantizable weights, the kept ones included; `others` are the model's
        other tensors, so that linear layers outside the blocks can be listed as kept too: by the
        checkpoint's names, and by "MODULE.weight" where transformers calls a layer otherwise.
        """
        ...


@runtime_checkable
class BuiltFormat(Format, Protocol):
    """A format whose files another program makes of a finished checkpoint (ONNX).

    built_by    that program, for people

    Till then `layout`, `pack` and `config` are those of a checkpoint in safetensors; `weights` and
    `unpack` are of what was built.
    """

    built_by: ClassVar[str]


@runtime_checkable
class PartFormat(Format, Protocol):
    """A format that only some weights of a model are meant for, as experts are."""

    def leaves(self, weight: PlannedWeight) -> str | None:
        """Why a weight stays as it is where only the recipe's scheme speaks of it, else None."""
        ...


@runtime_checkable
class DescribedFormat(Format, Protocol):
    """A format whose readers want files beside config.json."""

    def side_files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """File name -> its JSON, for a `quantization_config`."""
        ...


@runtime_checkable
class CacheFormat(Format, Protocol):
    """A format with a place for scales of the cache of keys and values."""

    def cache_layout(self, module: str, scheme: CacheScheme, heads: int) -> tuple[TensorInfo, ...]:
        """The tensors that hold the scales of an attention module's keys, and of its values."""
        ...

    def cache_config(self, scheme: CacheScheme) -> dict[str, Any]:
        """What the `quantization_config` says of it besides."""
        ...

    def cache_scheme(self, config: Mapping[str, Any]) -> CacheScheme | None:
        """The scheme that a `quantization_config` tells of; None if there is none.

        Raises CheckpointError for one that is not known.
        """
        ...


class Container(Protocol):
    """How one model lies in a file of its own format, which knows the model and not only weights.

    left_out        why a tensor of the source has no place in the file
    notes           what its reader will do otherwise, or what could not be as asked
    """

    left_out: ClassVar[str]
    notes: list[str]

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The table of embeddings and the head, by the names the file holds them under: [O, I]."""
        ...

    def spread(
        self, mix: Scheme, shapes: Mapping[str, tuple[int, int]]
    ) -> dict[str, tuple[Scheme | None, str]]:
        """Scheme (None: kept) and reason of each of these, where one name stands for a mix."""
        ...

    def place(self, name: str) -> tuple[TensorInfo, ...]:
        """What a tensor that is not quantized becomes; empty if it is left out."""
        ...

    def lay_out(self, mix: Scheme, schemes: Mapping[str, Scheme | None]) -> Layout:
        """The file, when each matrix's scheme (None: kept) is decided."""
        ...


@runtime_checkable
class WholeFormat(Format, Protocol):
    """A format that is a container of a whole model (GGUF), not tensors in safetensors.

    compute_dtype    what the blocks run in while they are quantized, as "F32"
    default_method   what quantizes to it unless another method is named
    default_scheme   what built-in methods write in it unless another scheme is named
    """

    compute_dtype: ClassVar[str]
    default_method: ClassVar[str]
    default_scheme: ClassVar[str]

    def container(
        self, source: Source, config: Any, *, head_tied: bool, unused: Collection[str]
    ) -> Container:
        """How this model lies in it; `config` is the language model's.  Raises FormatError.

        `unused`: tensors that no parameter of the model class takes, as prediction heads are.
        """
        ...

    def stored_as(self, scheme: Scheme) -> Scheme | str:
        """The scheme that holds another format's codes as they are, or why none does."""
        ...


def expert_name(name: str, expert: int) -> str:
    """What one expert of the fused tensor `name` is called by itself, a weight [O, I]."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.{expert}.weight" if leaf == "weight" else f"{path}.{expert}.{leaf}.weight"


def fused_name(name: str) -> tuple[str, int] | None:
    """The fused tensor and the expert's number of a weight that `expert_name` named, else None."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    path, expert, leaf = match.groups()
    return f"{path}.{leaf or 'weight'}", int(expert)


def named_as_weight(weight: PlannedWeight) -> str | None:
    """None if other tensors can be named after the weight, else why not."""
    if not weight.name.endswith(".weight"):
        return 'the tensor\'s name must end in ".weight"'
    return None


def check_divides(name: str, shape: tuple[int, int], scheme: Scheme) -> None:
    """Nothing if a stored weight of this shape can have the scheme, else CheckpointError."""
    if not scheme.flat and (min(shape) < 1 or shape[1] % (scheme.group_size or 1)):
        raise CheckpointError(
            f"{name}: its stored shape {list(shape)} does not fit the scheme {scheme.name} that "
            "quantization_config gives it"
        )


def check_stored(infos: Sequence[TensorInfo], source: Source, demanded_by: str) -> None:
    """Nothing if the source holds tensors of just these names, dtypes and shapes.

    Raises CheckpointError that names the tensor and what demands it.
    """
    for info in infos:
        # `info` raises CheckpointError itself if there is no such tensor.
        stored = source.info(info.name)
        if (stored.label, stored.shape) != (info.label, info.shape):
            raise CheckpointError(
                f"{info.name}: {stored.dtype} {list(stored.shape)} is stored, but {demanded_by} "
                f"demands {info.dtype} {list(info.shape)}"
            )
