"""A quantized weight as the numbers it stores, independent of any file format.

Shapes: O out features, I in features, G groups per row, N groups in all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from quantkit_kernels.lazy import torch

from quantkit.errors import NumericsError
from quantkit.numbers.grid import E4M3_LARGEST, E4M3_SMALLEST, blocks, grid_of, unblocks
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.superblock import BlockScale

if TYPE_CHECKING:
    from torch import Tensor

# Rows decoded at a time, so that float32 temporaries stay small whatever the weight's size.
_DECODE_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class PlainScale:
    """Group scales as stored: [O, G], or [N] where flat blocks straddle rows."""

    tensor: Tensor

    def values(self) -> Tensor:
        """The scales in float32, shaped as stored."""
        return self.tensor.to(torch.float32)


@dataclass(frozen=True, kw_only=True)
class NestedScale:
    """Block scales that are quantized themselves, as bitsandbytes stores them (QLoRA, section 3).

    codes uint8 [N] index `table` float32 [256]; each 256 codes share one `absmax` float32 [N/256];
    value = table[code] · absmax + offset.
    """

    codes: Tensor
    table: Tensor
    absmax: Tensor
    offset: Tensor
    shape: tuple[int, ...]
    block: int = 256

    def values(self) -> Tensor:
        """The scales in float32, [O, G] or [N]."""
        count = self.codes.numel()
        outer = self.absmax.repeat_interleave(self.block)[:count]
        return (self.table[self.codes.to(torch.int64)] * outer + self.offset).view(self.shape)


@dataclass(frozen=True, kw_only=True)
class DividedScale:
    """Group scales as NVFP4 stores them: `tensor` float8_e4m3fn [O, G] over one float32 `divisor`.

    value = tensor / divisor, divided and rounded in float32 as compressed-tensors and vLLM do.  If
    `inverted`, the file has the divisor's reciprocal, as ModelOpt's do: value = tensor · divisor.
    """

    tensor: Tensor
    divisor: Tensor
    inverted: bool = False

    @classmethod
    def of(cls, scale_OG: Tensor, divisor: float) -> DividedScale:
        """The nearest to float32 scales; none becomes zero."""
        numbers = (scale_OG * divisor).clamp_(E4M3_SMALLEST, E4M3_LARGEST)
        return cls(
            tensor=numbers.to(torch.float8_e4m3fn),
            divisor=torch.tensor(divisor, dtype=torch.float32),
        )

    def values(self) -> Tensor:
        """The scales in float32, [O, G]."""
        numbers = self.tensor.to(torch.float32)
        return numbers * self.divisor if self.inverted else numbers / self.divisor

    def turned(self, *, inverted: bool) -> DividedScale:
        """The same with the divisor, or its reciprocal, as stored; exact for powers of two."""
        if inverted == self.inverted:
            return self
        return dataclasses.replace(self, divisor=1 / self.divisor, inverted=inverted)


Scale = PlainScale | NestedScale | DividedScale | BlockScale


def tensors_of(scale: Scale) -> dict[str, Tensor]:
    """The tensors of a scale by the names of its fields, none of those that are None."""
    found = {field.name: getattr(scale, field.name) for field in dataclasses.fields(scale)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def with_tensors(scale: Scale, parts: Mapping[str, Tensor | None]) -> Scale:
    """The scale with other tensors in some fields."""
    changed: Scale = dataclasses.replace(cast(Any, scale), **parts)
    return changed


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """Codes uint8 [O, I] with their scales; `zero` uint8 [O, G] for asymmetric integer schemes.
    A block type's minima are part of its scale.

    dtype    the weight's before quantization, which runtimes restore
    input_scale  float32 []: what calibration gives the input of a scheme with `static_input`: its
             scale (fp8), or the divisor of its groups' scales (nvfp4); None for all others
    columns  int64 [I]: codes[:, j] belong to column columns[j] of the weight (checkpoints of others
             with activation order, whose groups are not neighbours); None: to column j
    """

    codes: Tensor
    scale: Scale
    zero: Tensor | None
    scheme: Scheme
    dtype: torch.dtype
    columns: Tensor | None = None
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.codes.dtype == torch.uint8 and self.codes.ndim == 2
        assert (self.zero is None) == (self.scheme.symmetric or self.scheme.kind == "ggml")
        assert (self.input_scale is not None) == self.scheme.static_input
        assert self.columns is None or not self.scheme.flat

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def minima(self) -> Tensor | None:
        """What is added to the values of each group of a block type, float32 [O, G]; else None."""
        return self.scale.minima() if isinstance(self.scale, BlockScale) else None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [O, I]: decoded in float32, rounded once to `dtype` (default: its own)."""
        dtype = dtype or self.dtype
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        scale = self.scale.values()
        if scale.ndim == 1 or (self.scheme.flat and self.shape[1] % scale.shape[1]):
            grid = grid_of(self.scheme)
            decoded = grid.decode(blocks(self.codes, self.scheme), scale.reshape(-1, 1), None)
            return out.copy_(unblocks(decoded, self.shape))
        step = max(1, _DECODE_ELEMENTS // self.shape[1])
        zero = self._zero()
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            out[rows] = self._decode(rows, scale, zero)
        return out

    def decode(self, rows: Tensor | slice) -> Tensor:
        """Float32 values [R, I] of some rows; `rows` is a slice or int64 [R]."""
        scale = self.scale.values()
        if scale.ndim == 1:
            # Blocks that straddle rows cannot be decoded one by one.
            return self.dequantize(torch.float32)[rows]
        return self._decode(rows, scale, self._zero())

    def check(self, name: str) -> None:
        """Nothing if scales are finite and codes in range; else NumericsError naming `name`."""
        scale = self.scale.values()
        if not bool(torch.isfinite(scale).all()):
            raise NumericsError(f"{name}: a scale is NaN or infinite")
        low = self.minima
        if low is not None and not bool(torch.isfinite(low).all()):
            raise NumericsError(f"{name}: a minimum is NaN or infinite")
        if isinstance(self.scale, DividedScale) and bool((scale <= 0).any()):
            raise NumericsError(
                f"{name}: a scale is zero or negative, which {self.scheme.name} forbids"
            )
        if self.input_scale is not None and not 0 < float(self.input_scale) < float("inf"):
            raise NumericsError(
                f"{name}: the input's scale is {float(self.input_scale)}, not positive"
            )
        if not self.codes.numel():
            return
        float8 = self.scheme.kind in ("fp8", "mxfp8")
        if float8 and int((self.codes & 0x7F).max()) == 0x7F:
            raise NumericsError(f"{name}: a code is the NaN of e4m3")
        highest = int(self.codes.max())
        if highest >= 2**self.scheme.bits:
            raise NumericsError(f"{name}: code {highest} does not fit {self.scheme.bits} bits")

    def _zero(self) -> Tensor | None:
        """Integer zeros, or the minima of a block type; None if there are none."""
        return self.minima if self.zero is None else self.zero

    def _decode(self, rows: Tensor | slice, scale: Tensor, zero: Tensor | None) -> Tensor:
        zero = None if zero is None else zero[rows]
        decoded = decode_rows(self.codes[rows], scale[rows], zero, self.scheme)
        if self.columns is None:
            return decoded
        return torch.empty_like(decoded).index_copy_(1, self.columns, decoded)


def decode_rows(
    codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, scheme: Scheme
) -> Tensor:
    """Float32 values [O, I] of codes whose groups lie within rows."""
    rows, columns = codes_OI.shape
    grouped = codes_OI.view(rows, scale_OG.shape[1], -1)
    zero = None if zero_OG is None else zero_OG.to(torch.float32)[..., None]
    return grid_of(scheme).decode(grouped, scale_OG[..., None], zero).view(rows, columns)
