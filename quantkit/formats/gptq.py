"""The GPTQ layout, which its two versions share: they differ by one in the zeros they store.

Shapes: O out features, I in features, G groups per row, b bits.  For weight NAME (less ".weight"):

    NAME.qweight  int32 [I*b/32, O]    codes along I, the first in the lowest bits
    NAME.qzeros   int32 [G, O*b/32]    zeros along O, version 1 less one; of symmetric schemes
                                       the zero is 2**(b-1)
    NAME.scales   float16 [G, O]
    NAME.g_idx    int32 [I]            the group of each column: i // group size as written here;
                                       any with activation order (desc_act), as read

3 bits: 32 codes fill 3 words without gaps, so codes 10 and 21 of each 32 straddle two words.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source
from quantkit.errors import CheckpointError, NumericsError
from quantkit.formats.bitpack import pack_rows, unpack_rows
from quantkit.formats.format import (
    PlannedWeight,
    StoredWeight,
    check_divides,
    check_stored,
    named_as_weight,
)
from quantkit.formats.readers import gptq_readers, outside_blocks
from quantkit.formats.stored import model_dtype, round_scale, stored_scale
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.checkpoint.dtypes import Dtype

BITS = (2, 3, 4, 8)
# Codes that fill whole words: 32 of 3 bits, 32/b of b bits.
_WHOLE = {2: 16, 3: 32, 4: 8, 8: 4}
_ENOUGH_GROUPS = 4096
_ONE_OFF = (0.7, 1.3)
_OTHER_VERSION = (
    "are these zeros of the other version?  Version 1 (checkpoint_format gptq) stores zero - 1, "
    "version 2 (gptq_v2) the zero"
)


class Gptq:
    """Weight-only integers of 2, 3, 4 and 8 bits, zeros less one (AutoGPTQ, vLLM).

    `name` is also the `checkpoint_format`; `stored_less` is what stored zeros are too small by.
    """

    name: ClassVar[str] = "gptq"
    stored_less: ClassVar[int] = 1
    holds_permuted: ClassVar[bool] = True

    def supports(self, scheme: Scheme) -> str | None:
        """None if the scheme is weight-only with 2, 3, 4 or 8 bits."""
        if scheme.kind != "int":
            return f"it holds integers, not {scheme.kind}"
        if scheme.activation_bits != 16:
            return "it is for 16-bit activations"
        if scheme.bits not in BITS:
            return "it holds 2, 3, 4 and 8 bit"
        return None

    def supports_shape(self, weight: PlannedWeight) -> str | None:
        """None if rows and columns fill whole words."""
        if (reason := named_as_weight(weight)) is not None:
            return reason
        assert weight.scheme is not None
        whole = _WHOLE[weight.scheme.bits]
        if weight.shape[0] % whole or weight.shape[1] % whole:
            return (
                f"{weight.scheme.bits} bit needs rows and columns divisible by {whole}; "
                "keep this weight with --skip"
            )
        return None

    def supports_together(self, weights: Sequence[PlannedWeight]) -> str | None:
        """None: `dynamic` rules give each weight its own scheme."""
        return None

    def readers(
        self, weights: Sequence[PlannedWeight], model_type: str
    ) -> Mapping[str, str | None]:
        """Runtime -> None if it reads the checkpoint, else why not; see formats/readers.py."""
        return gptq_readers(weights, model_type)

    def layout(self, weight: PlannedWeight, dtype: Dtype) -> tuple[TensorInfo, ...]:
        """Exactly the tensors `pack` returns, whatever the dtype of the weight in the source."""
        scheme, (rows, columns) = weight.scheme, weight.shape
        assert scheme is not None, weight.name
        groups = columns // (scheme.group_size or columns)
        stem = weight.name.removesuffix("weight")
        packed = (columns * scheme.bits // 32, rows)
        zeros = (groups, rows * scheme.bits // 32)
        return (
            TensorInfo(name=stem + "qweight", dtype="I32", shape=packed),
            TensorInfo(name=stem + "qzeros", dtype="I32", shape=zeros),
            TensorInfo(name=stem + "scales", dtype="F16", shape=(groups, rows)),
            TensorInfo(name=stem + "g_idx", dtype="I32", shape=(columns,)),
        )

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float16, whatever the model's."""
        return torch.float16

    def represent(self, tensor: QuantizedTensor) -> tuple[QuantizedTensor, str | None]:
        """The tensor with float16 scales and, in version 1, zeros of at least 1.

        A zero of 0 becomes 1 and its group's codes go up with it; the highest code has no room.
        """
        tensor, told = round_scale(tensor, torch.float16)
        if tensor.zero is None or int(tensor.zero.min()) >= self.stored_less:
            return tensor, told
        low = tensor.zero < self.stored_less
        group = tensor.shape[1] // low.shape[1]
        shift = low.repeat_interleave(group, dim=1)
        top = 2**tensor.scheme.bits - 1
        lost = int((shift & (tensor.codes == top)).sum())
        codes = torch.where(shift, tensor.codes.clamp(max=top - 1) + 1, tensor.codes)
        shifted = dataclasses.replace(
            tensor, codes=codes, zero=tensor.zero.clamp(min=self.stored_less)
        )
        if not lost:
            return shifted, told
        clipped = f"{lost} codes clipped, as a zero of 0 is stored as 1"
        return shifted, clipped if told is None else f"{told}; {clipped}"

    def pack(self, weight: PlannedWeight, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Checkpoint name -> contiguous CPU tensor.  NumericsError if a scale is not exact."""
        scheme, columns = tensor.scheme, tensor.shape[1]
        assert scheme == weight.scheme
        scales = stored_scale(weight.name, tensor, torch.float16).T.contiguous()
        if tensor.zero is None:
            zero_GO = torch.full(scales.shape, 2 ** (scheme.bits - 1), dtype=torch.uint8)
        else:
            zero_GO = tensor.zero.cpu().to(torch.uint8).T
        if int(zero_GO.min()) < self.stored_less:
            raise NumericsError(
                f"{weight.name}: {self.name} stores zero - 1 and cannot hold the zero 0; "
                "gptq_v2 can"
            )
        codes, g_idx = tensor.codes.cpu(), _trivial_g_idx(columns, scheme)
        if tensor.columns is not None:
            order = torch.argsort(tensor.columns.cpu())
            codes, g_idx = codes[:, order], g_idx[order]
        stem = weight.name.removesuffix("weight")
        return {
            stem + "qweight": pack_rows(codes, scheme.bits).T.contiguous(),
            stem + "qzeros": pack_rows(zero_GO - self.stored_less, scheme.bits),
            stem + "scales": scales,
            stem + "g_idx": g_idx,
        }

    def config(
        self,
        weights: Sequence[PlannedWeight],
        *,
        model_type: str,
        dtype: torch.dtype,
        others: Sequence[TensorInfo] = (),
    ) -> dict[str, Any]:
        """The `quantization_config`: the commonest scheme for all, `dynamic` rules for the rest.

        `dynamic` is what GPTQModel and vLLM read, `modules_in_block_to_quantize` what transformers
        reads; `others` need no mention, as readers look into blocks only.
        """
        quantized = [weight for weight in weights if weight.scheme is not None]
        kept = [weight for weight in weights if weight.scheme is None]
        (base, _), *_ = Counter(weight.scheme for weight in quantized).most_common()
        assert base is not None
        dynamic: dict[str, dict[str, int | bool]] = {}
        for weight in kept:
            if not outside_blocks(weight):
                dynamic["-:" + _exactly(weight.name)] = {}
        for weight in quantized:
            if weight.scheme is not None and weight.scheme != base:
                dynamic["+:" + _exactly(weight.name)] = _fields(weight.scheme)
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            **_fields(base),
            "desc_act": False,
            "pack_dtype": "int32",
            "lm_head": any(outside_blocks(weight) for weight in quantized),
        }
        if dynamic:
            config["dynamic"] = dynamic
        if any(not outside_blocks(weight) for weight in kept):
            modules = dict.fromkeys(w.module for w in quantized if not outside_blocks(w))
            config["modules_in_block_to_quantize"] = [list(modules)]
        return config

    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """Weight name -> how it is stored, for every quantized weight of a checkpoint."""
        config = source.config.get("quantization_config")
        if not isinstance(config, dict) or config.get("checkpoint_format", "gptq") != self.name:
            raise CheckpointError(f"config.json: quantization_config is not that of {self.name}")
        names = set(source.names())
        dtype = model_dtype(source)
        found: dict[str, StoredWeight] = {}
        for key in sorted(names):
            if not key.endswith(".qweight"):
                continue
            name = key.removesuffix("qweight") + "weight"
            scheme = _scheme_for(name, config)
            shape = source.info(key).shape
            if len(shape) != 2:
                raise CheckpointError(f"{key}: {list(shape)} is not the shape of a matrix")
            size = (shape[1], shape[0] * 32 // scheme.bits)
            check_divides(name, size, scheme)
            planned = PlannedWeight(name=name, module="", shape=size, scheme=scheme)
            infos = self.layout(planned, dtype)
            check_stored(infos, source, "quantization_config")
            # Few files have other orders, and what those are needs torch.
            trivial = _in_order(source, name, size[1], scheme)
            permuted = not trivial and _column_order(source, name, scheme) is not None
            found[name] = StoredWeight.of(planned, dtype, infos, permuted=permuted)
        return found

    def unpack(self, weight: StoredWeight, source: Source) -> QuantizedTensor:
        """The inverse of `pack`.

        CheckpointError if groups have other sizes than the scheme's, or zeros look like those of
        the other version.
        """
        scheme, (rows, columns) = weight.scheme, weight.shape
        stem = weight.name.removesuffix("weight")
        packed = source.read(stem + "qweight").T.contiguous()
        codes = unpack_rows(packed, scheme.bits, columns)
        order = _column_order(source, weight.name, scheme)
        zero = unpack_rows(source.read(stem + "qzeros"), scheme.bits, rows).T.contiguous()
        # Version 1 adds before it masks: the highest code stands for the zero 2**bits.
        zero += self.stored_less
        if scheme.symmetric and bool((zero != 2 ** (scheme.bits - 1)).any()):
            raise CheckpointError(
                f"{stem}qzeros: the scheme is symmetric, but a zero is not {2 ** (scheme.bits - 1)}"
                f"; {_OTHER_VERSION}"
            )
        if not scheme.symmetric:
            _check_version(stem + "qzeros", codes, zero, scheme)
        return QuantizedTensor(
            codes=codes if order is None else codes[:, order],
            scale=PlainScale(tensor=source.read(stem + "scales").T.contiguous()),
            zero=None if scheme.symmetric else zero,
            scheme=scheme,
            dtype=weight.dtype,
            columns=order,
        )


def _in_order(source: Source, name: str, columns: int, scheme: Scheme) -> bool:
    """True if columns lie sorted by their group."""
    stored = source.read_bytes(name.removesuffix("weight") + "g_idx")
    return stored == _sorted_g_idx(columns, scheme.group_size or columns)


@cache
def _sorted_g_idx(columns: int, size: int) -> bytes:
    return struct.pack(f"<{columns}i", *(column // size for column in range(columns)))


def _column_order(source: Source, weight: str, scheme: Scheme) -> Tensor | None:
    """Columns int64 [I] sorted by their group; None if they lie so already."""
    name = weight.removesuffix("weight") + "g_idx"
    g_idx = source.read(name)
    trivial = _trivial_g_idx(len(g_idx), scheme)
    if torch.equal(g_idx, trivial):
        return None
    grouped, order = torch.sort(g_idx, stable=True)
    if not torch.equal(grouped, trivial):
        raise CheckpointError(
            f"{name}: its groups do not have {scheme.group_size or len(g_idx)} columns each, as "
            "quantization_config says"
        )
    return order


def _check_version(name: str, codes: Tensor, zero: Tensor, scheme: Scheme) -> None:
    """CheckpointError if zeros are one off, as they are when read as those of the other version.

    Weights have a mean near zero, so codes have one near their group's zero; with up to 4 bits and
    many groups a distance of a whole step is no chance.
    """
    if scheme.bits > 4 or zero.numel() < _ENOUGH_GROUPS:
        return
    distance = float(codes.float().mean()) - float(zero.float().mean())
    if _ONE_OFF[0] < abs(distance) < _ONE_OFF[1]:
        raise CheckpointError(
            f"{name}: codes lie {distance:+.2f} from their zeros on average, not about 0; "
            f"{_OTHER_VERSION}"
        )


def _trivial_g_idx(columns: int, scheme: Scheme) -> Tensor:
    return torch.arange(columns, dtype=torch.int32) // (scheme.group_size or columns)


def _exactly(name: str) -> str:
    return f"^{re.escape(name.removesuffix('.weight'))}$"


def _fields(scheme: Scheme) -> dict[str, int | bool]:
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "sym": scheme.symmetric,
    }


def _scheme_for(name: str, config: Mapping[str, Any]) -> Scheme:
    """The scheme of a weight by the base settings and the first `dynamic` rule that matches."""
    module = name.removesuffix(".weight")
    fields = {key: config.get(key) for key in ("bits", "group_size", "sym")}
    rules = config.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise CheckpointError(
            "config.json: quantization_config: dynamic must map rules to settings"
        )
    for rule, override in rules.items():
        if not _matches(rule, module):
            continue
        if rule.startswith("-:"):
            raise CheckpointError(f"{name}: it is stored quantized, but {rule!r} excludes it")
        if not isinstance(override, dict):
            raise CheckpointError(f"{name}: the rule {rule!r} gives no settings")
        fields.update({key: override[key] for key in fields if key in override})
        break
    bits, group_size = fields["bits"], fields["group_size"]
    if bits not in BITS or type(group_size) is not int or not isinstance(fields["sym"], bool):
        raise CheckpointError(f"{name}: quantization_config gives it {fields}, which is not read")
    return Scheme(
        kind="int",
        bits=bits,
        group_size=None if group_size == -1 else group_size,
        symmetric=fields["sym"],
    )


def _matches(rule: str, module: str) -> bool:
    try:
        return re.match(rule.removeprefix("+:").removeprefix("-:"), module) is not None
    except re.error as error:
        raise CheckpointError(
            f"config.json: quantization_config: the rule {rule!r} is no pattern: {error}"
        ) from error
