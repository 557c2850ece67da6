"""A quantized checkpoint read as if it were not: its weights decoded when they are asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Reader, Source
from quantkit.errors import CheckpointError
from quantkit.formats.format import CacheFormat, FormatReader, StoredWeight
from quantkit.formats.registry import format_of, reader_of
from quantkit.model import skeleton
from quantkit.model.split_experts import split_experts
from quantkit.numbers.activations import InputRounding
from quantkit.numbers.cache import CacheScheme
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import QuantizedTensor

_CACHE = (".k_scale", ".v_scale")


class Unpacked(Reader):
    """A checkpoint under the names, shapes and dtypes it had before it was quantized.

    `transposed` names the weights whose unquantized storage is [I, O], `cache_names` are tensors
    with scales for keys and values.  Holds the codes of the weight read last in part, so that a
    head read in ranges of rows is unpacked once.
    """

    # What quantized weights are read in; None: their dtype before quantization.
    decoded_dtype: ClassVar[torch.dtype | None] = None

    def __init__(
        self, source: Source, fmt: FormatReader | None, stored: Mapping[str, StoredWeight]
    ) -> None:
        self.packed = source
        self.format = fmt
        self.stored = stored
        self.transposed: frozenset[str] = frozenset()
        if isinstance(source, FileSource):
            self.path = source.path
        packed = {name for weight in stored.values() for name in weight.tensors}
        # Scales of the cache belong to the format, not to the model.
        self.cache_names: tuple[str, ...] = ()
        if fmt is not None:
            self.cache_names = tuple(name for name in source.names() if name.endswith(_CACHE))
            packed |= set(self.cache_names)
        self._names = tuple(sorted({*source.names(), *stored} - (packed - set(stored))))
        self._last: tuple[str, QuantizedTensor] | None = None

    @classmethod
    def open(cls, source: Source, *, trust_remote_code: bool = False) -> Self:
        """The view of a quantized checkpoint.  FormatError if its format is not known."""
        fmt = reader_of(source) or format_of(source)
        view = cls(source, fmt, fmt.weights(source))
        model = skeleton.build(view, trust_remote_code=trust_remote_code, dtype=None)
        view.transposed = skeleton.conv1d_names(model, view.names())
        return view

    @property
    def config(self) -> dict[str, Any]:
        """The config without `quantization_config`."""
        return {k: v for k, v in self.packed.config.items() if k != "quantization_config"}

    @property
    def home(self) -> Path | None:
        """The quantized checkpoint's."""
        return self.packed.home

    @property
    def address(self) -> str | None:
        """The quantized checkpoint's."""
        return self.packed.address

    @property
    def recast(self) -> bool:
        """The source's."""
        return self.packed.recast

    def names(self) -> tuple[str, ...]:
        """Names as before quantization, sorted."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape as before quantization."""
        weight = self.stored.get(name)
        if weight is None:
            return self.packed.info(name)
        shape = weight.shape[::-1] if name in self.transposed else weight.shape
        return TensorInfo(name=name, dtype=weight.dtype, shape=shape)

    def quantized(self, name: str) -> QuantizedTensor:
        """The stored numbers of a quantized weight [O, I], fresh memory that is not kept."""
        assert self.format is not None
        return self.format.unpack(self.stored[name], self.packed)

    def tensor(self, name: str) -> QuantizedTensor:
        """The same, kept until another weight is asked for."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self.quantized(name)
        return self._last[1]

    def input_roundings(self) -> dict[str, InputRounding]:
        """What happens to the inputs of quantized weights, of those where something does.

        Reads the weights whose inputs have a scale of their own.
        """
        return {
            name: InputRounding(
                scheme=weight.scheme,
                scale=self.quantized(name).input_scale if weight.scheme.static_input else None,
            )
            for name, weight in self.stored.items()
            if weight.scheme.activation_bits != 16
        }

    def cache_scheme(self) -> CacheScheme | None:
        """How keys and values are to be cached; None if the checkpoint does not say."""
        config = self.packed.config.get("quantization_config")
        if not isinstance(self.format, CacheFormat) or not isinstance(config, Mapping):
            return None
        return self.format.cache_scheme(config)

    def cache_scales(self, module: str, scheme: CacheScheme, heads: int) -> tuple[Tensor, Tensor]:
        """The scales of an attention module's keys and values; 1 where the checkpoint has none,
        which is what servers take."""
        assert isinstance(self.format, CacheFormat)
        found = []
        for info in self.format.cache_layout(module, scheme, heads):
            there = info.name in self.packed.names()
            scale = self.packed.read(info.name).float() if there else torch.ones(info.shape)
            if scale.numel() != math.prod(info.shape) or not bool((scale > 0).all()):
                raise CheckpointError(
                    f"{info.name}: {list(scale.shape)} numbers, the least {float(scale.min()):g}; "
                    f"{list(info.shape)} above zero are wanted; the checkpoint is damaged"
                )
            found.append(scale.reshape(info.shape))
        return found[0], found[1]

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened tensor; of a quantized one, its rows decoded."""
        if name not in self.stored:
            return self.packed.read_flat(name, start, stop)
        weight = self.stored[name]
        numel, columns = math.prod(weight.shape), weight.shape[1]
        if not 0 <= start <= stop <= numel:
            raise IndexError(f"{name}: elements {start}..{stop} of {numel}")
        dtype = self.decoded_dtype or weight.dtype
        whole = start == 0 and stop == numel
        # Only what is read in ranges, as the output head is, is worth keeping.
        tensor = self.quantized(name) if whole else self.tensor(name)
        if name in self.transposed:
            values = tensor.dequantize(dtype).t().reshape(-1)
            return values if whole else values[start:stop].clone()
        if whole:
            return tensor.dequantize(dtype).reshape(-1)
        first, last = start // columns, -(-stop // columns)
        values = tensor.decode(slice(first, last)).to(dtype).reshape(-1)
        return values[start - first * columns : stop - first * columns]

    def tokens(self) -> tuple[str, ...] | None:
        """The source's."""
        return self.packed.tokens()

    def side_files(self) -> dict[str, Path | bytes]:
        """The source's."""
        return self.packed.side_files()

    def left_files(self) -> dict[str, str]:
        """The source's."""
        return self.packed.left_files()

    def _config_bytes(self) -> bytes:
        return json.dumps(self.packed.config, sort_keys=True).encode()


class Decoded(Unpacked):
    """`Unpacked` whose quantized weights are read in float32, though `info` names their own dtype:
    who computes in it rounds nothing."""

    decoded_dtype: ClassVar[torch.dtype | None] = torch.float32

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Scheme of every quantized weight by its checkpoint name."""
        return {name: weight.scheme for name, weight in self.stored.items()}


def open_decoded(source: Source, *, trust_remote_code: bool = False) -> Source | Decoded:
    """The source, experts one by one, if it is not quantized, else its decoded view.

    Raises FormatError for a quantized checkpoint in an unknown format.
    """
    if reader_of(source) is None:
        return split_experts(source, trust_remote_code=trust_remote_code)
    return Decoded.open(source, trust_remote_code=trust_remote_code)
