"""On-disk formats: what each must offer, and how a name finds one (the file name is the registry).

`--format compressed-tensors` means class `CompressedTensors` in formats/compressed_tensors.py;
`package.module:Class` names a third party's, and an installed package announces its own as an
entry point of the group `quantkit.formats`: only such a one is found when a checkpoint names it.
A format maps one weight to named tensors and back; files, shards and indexes are the checkpoint's
business.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast, runtime_checkable

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.dtypes import dtype_of, label_of
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.shards import Layout
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError, FormatError
from quantkit.methods.parts import imported
from quantkit.numbers.cache import CacheScheme
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.checkpoint.dtypes import Dtype

_PACKAGE = "quantkit.formats"
_ENTRY_POINTS = "quantkit.formats"
# quant_method -> file and class of what reads it and cannot write it.
_READ_ONLY: Mapping[str, tuple[str, str]] = {
    "mxfp4": ("_mxfp4", "Mxfp4"),
    "onnx": ("onnx.format", "OnnxWeights"),
}


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
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    label: str
    tensors: tuple[str, ...]
    transposed: bool = False
    permuted: bool = False
    expert: int | None = None

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
        """Scheme (None: kept) and reason of each matrix, where one name stands for a mix."""
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


def available_formats() -> list[str]:
    """Names of the built-in formats, sorted."""
    package = importlib.import_module(_PACKAGE)
    names = (m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_")
    found = (_class_of(name) for name in names)
    return sorted(cls.name for cls in found if cls is not None)


def installed_formats() -> list[str]:
    """Names of the formats that other installed packages bring, sorted."""
    return sorted(set(entry_points(group=_ENTRY_POINTS).names) - {*available_formats()})


def make_format(name: str) -> Format:
    """The format of that name.  Raises FormatError listing the known ones."""
    if ":" in name:
        found = imported(name, "format", FormatError)
        try:
            made = found()
        # Code of others, which may fail in any way.
        except Exception as error:
            raise FormatError(f"format {name!r} cannot be made: {error}") from error
        return demand_writer(made)
    if name in available_formats() and (cls := _class_of(name)) is not None:
        return cls()
    if (found := _installed(name)) is not None:
        return demand_writer(found)
    known = ", ".join([*available_formats(), *installed_formats()])
    raise FormatError(f"format {name!r} is unknown; known: {known}, or package.module:Class")


def code_of(fmt: FormatReader) -> str:
    """sha256 of the file a third party's format comes from; empty for a built-in one."""
    module = type(fmt).__module__
    file = sys.modules[module].__file__
    if module.startswith(f"{_PACKAGE}.") or file is None:
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def default_format(scheme: Scheme) -> str:
    """The format a scheme is written in unless another is asked for.

    compressed-tensors for integers and floats, bitsandbytes for NF4 and FP4, gguf for ggml's
    blocks.  Raises FormatError if no built-in format holds the scheme.
    """
    for name in ("compressed-tensors", "bitsandbytes", "gguf"):
        if make_format(name).supports(scheme) is None:
            return name
    raise FormatError(f"scheme {scheme.name}: no format holds it; " + _holders(scheme))


def default_scheme(format_name: str | None) -> str | None:
    """The scheme that goes with a format; None where that is for the method to say."""
    fmt = None if format_name is None else make_format(format_name)
    return fmt.default_scheme if isinstance(fmt, WholeFormat) else None


def asked_format(format_name: str | None, scheme: Scheme | None) -> Format | None:
    """The format that is named, or that a scheme of ggml's blocks means; None if neither is."""
    if format_name is not None:
        return make_format(format_name)
    if scheme is not None and scheme.kind == "ggml":
        return make_format(default_format(scheme))
    return None


def check_supported(chosen: Format, weights: Sequence[PlannedWeight]) -> None:
    """Nothing if the format can hold all weights as planned.

    Raises FormatError that names the weight, the reason, and the formats that can hold its scheme.
    """
    reasons: dict[Scheme, str | None] = {}
    for weight in weights:
        if weight.scheme is None:
            continue
        if weight.scheme not in reasons:
            reasons[weight.scheme] = chosen.supports(weight.scheme)
        reason = reasons[weight.scheme]
        if reason is not None:
            raise FormatError(
                f"{weight.name}: {chosen.name} cannot hold {weight.scheme.name}: {reason}; "
                + _holders(weight.scheme)
            )
        reason = chosen.supports_shape(weight)
        if reason is not None:
            raise FormatError(
                f"{weight.name}: {chosen.name} cannot hold shape {weight.shape}: {reason}"
            )
    if (reason := chosen.supports_together(weights)) is not None:
        raise FormatError(f"{chosen.name}: {reason}")


def format_of(source: Source) -> FormatReader:
    """What reads a quantized checkpoint, by its `quantization_config`.

    Looks among the built-in formats and those of installed packages.  Raises FormatError if there
    is none or if nothing reads it.
    """
    config = source.config.get("quantization_config")
    if not isinstance(config, dict):
        raise FormatError("config.json has no quantization_config: the model is not quantized")
    method = config.get("quant_method")
    version = ""
    if method == "gptq":
        # Files older than version 2 do not say which they are.
        version = str(config.get("checkpoint_format", "gptq"))
        if version in ("gptq", "gptq_v2"):
            return make_format(version)
    elif isinstance(method, str) and method in _READ_ONLY:
        stem, class_name = _READ_ONLY[method]
        module = importlib.import_module(f"{_PACKAGE}.{stem}")
        return cast(FormatReader, getattr(module, class_name)())
    elif method in ("awq", "compressed-tensors", "bitsandbytes", "fp8"):
        return make_format(method)
    elif isinstance(method, str) and (found := _installed(method)) is not None:
        return found
    known = ", ".join([*available_formats(), *installed_formats()])
    told = f"quant_method {method!r}" + (f" as {version!r}" if version else "")
    raise FormatError(f"quantization_config: {told} is not read; known: {known}")


def reader_of(source: Source) -> FormatReader | None:
    """What reads a source's quantized weights, whoever decodes them; None if it has none.

    Raises FormatError if nothing reads them.
    """
    if source.packed_as is not None:
        return make_format(source.packed_as)
    return format_of(source) if "quantization_config" in source.config else None


def demand_writer(reader: FormatReader) -> Format:
    """The reader, if it is a format that writes too; else FormatError."""
    if isinstance(reader, Format):
        return reader
    name = getattr(reader, "name", type(reader).__name__)
    if not isinstance(reader, FormatReader):
        raise FormatError(f"{name}: it is no Format as quantkit/formats/format.py defines it")
    known = ", ".join(available_formats())
    raise FormatError(f"{name}: the format is read, not written; written are: {known}")


def expert_name(name: str, expert: int) -> str:
    """What one expert of the fused tensor `name` is called by itself, a weight [O, I]."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.{expert}.weight" if leaf == "weight" else f"{path}.{expert}.{leaf}.weight"


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


def _installed(name: str) -> FormatReader | None:
    """The format that an installed package brings under this name; None if none does."""
    for entry in entry_points(group=_ENTRY_POINTS, name=name):
        try:
            made = entry.load()()
        # Code of others, which may fail in any way.
        except Exception as error:
            raise FormatError(
                f"format {name!r}: {entry.value} of an installed package cannot be made: {error}"
            ) from error
        if not isinstance(made, FormatReader) or made.name != name:
            raise FormatError(
                f"format {name!r}: {entry.value} of an installed package is no format of this name"
            )
        return made
    return None


def _class_of(name: str) -> type[Any] | None:
    """The class that a file of the formats' folder is named after; None if it holds no such one.

    A folder has it in its format.py.
    """
    stem = name.replace("-", "_")
    class_name = "".join(word.capitalize() for word in stem.split("_"))
    module = importlib.import_module(f"{_PACKAGE}.{stem}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{_PACKAGE}.{stem}.format")
    found = getattr(module, class_name, None)
    # Helpers of the formats lie there too; a class that writes has a name of its own.
    writes = isinstance(found, type) and hasattr(found, "pack")
    return found if writes and isinstance(getattr(found, "name", None), str) else None


def _holders(scheme: Scheme) -> str:
    able = [name for name in available_formats() if make_format(name).supports(scheme) is None]
    return f"formats that can: {', '.join(able)}" if able else "no built-in format can"
