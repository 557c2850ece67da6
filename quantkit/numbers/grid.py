"""Number grids: real weights to codes and back, for one scheme.

Shapes: O out features, I in features, N groups of B weights each (N·B = O·I).
Every method sees weights as `blocks` [N, B]: groups along rows and bitsandbytes' flat blocks are
the same thing there, since a group never straddles a row and a flat block is padded at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quantkit_kernels.lazy import torch
from quantkit_kernels.ops.codebook import NF4

from quantkit.numbers.scheme import Scheme
from quantkit.numbers.superblock import BLOCK_TYPES

if TYPE_CHECKING:
    from torch import Tensor

# Sign, two exponent bits, one mantissa bit, as bitsandbytes orders them (code 8 is a second zero).
FP4_VALUES = tuple(
    sign * value / 12.0
    for sign in (1.0, -1.0)
    for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)
# Sign, two exponent bits, one mantissa bit, as OCP's Microscaling Formats 1.0 orders them.
E2M1_VALUES = tuple(
    sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
)

# The largest e4m3 number, and the smallest above zero.
E4M3_LARGEST, E4M3_SMALLEST = 448.0, 2.0**-9
# Magnitudes of bfloat16 scales: reciprocals stay finite, and so does 448 times a scale.
SCALE_MIN, SCALE_MAX = 2.0**-126, 2.0**119
# Of those that float16 holds too: its smallest subnormal number, and 65280, the largest that
# bfloat16 has.
HALF_MIN, HALF_MAX = 2.0**-24, 65280.0
# Groups of zeros decode to zeros whatever their scale; this one is exact everywhere.
_ZERO_SCALE = 2.0**-14


def blocks(weight_OI: Tensor, scheme: Scheme) -> Tensor:
    """The weight as [N, B], one row per group; a flat scheme's last block is padded with zeros."""
    size = scheme.group_size or weight_OI.shape[1]
    flat = weight_OI.reshape(-1)
    if padding := -flat.numel() % size:
        assert scheme.flat, "check_shape comes first"
        flat = torch.cat([flat, flat.new_zeros(padding)])
    return flat.view(-1, size)


def unblocks(blocks_NB: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `blocks`: [O, I] without padding."""
    return blocks_NB.reshape(-1)[: shape[0] * shape[1]].view(shape)


def float_scale(magnitude: Tensor, scheme: Scheme) -> Tensor:
    """Scales, as stored, of groups of floats whose largest magnitudes are given; float32 > 0.

    nvfp4: magnitude / 6 in four significant bits, which e4m3 numbers have.
    mxfp4, mxfp8: the power of two that brings the magnitude into the numbers' highest binade, or
    the next one if it lies in its last quarter (e2m1's 6 is 1.5 · 4, so up to 7 is taken for 6), as
    compressed-tensors and vLLM choose it.
    """
    bits = magnitude.to(torch.float32)
    if scheme.kind == "nvfp4":
        bits = (bits / 6.0).clamp(min=2.0**-100).view(torch.int32)
        # To the nearest of the numbers that end in twenty zeros, ties to the even one.
        return ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20 << 20).view(torch.float32)
    highest = 2 if scheme.kind == "mxfp4" else 8
    exponent = ((bits.view(torch.int32) + (1 << 21)) >> 23) - highest
    return (exponent.clamp(1, 254) << 23).view(torch.float32)


def store_scale(scale: Tensor, *, half: bool = False) -> Tensor:
    """The scales that a file can hold, nearest to these: bfloat16 values in float32.

    `half` is for files that store float16: below 2^-17 that has fewer bits than bfloat16, so there
    only the values that both hold are left.  What lies outside SCALE_MIN..SCALE_MAX (`half`:
    HALF_MIN..HALF_MAX) becomes the limit; zero, which no weight of the group needs, 2^-14.
    """
    lowest, highest = (HALF_MIN, HALF_MAX) if half else (SCALE_MIN, SCALE_MAX)
    magnitude = torch.where(scale == 0, _ZERO_SCALE, scale.abs())
    stored = magnitude.clamp_(lowest, highest).to(torch.bfloat16)
    stored = stored.half().float() if half else stored.float()
    return torch.where(scale < 0, -stored, stored)


@dataclass(frozen=True, kw_only=True)
class IntegerGrid:
    """Codes `low..high`; value = (code - zero) · scale; `center` is the zero if symmetric."""

    low: int
    high: int
    center: int
    # Of every grid: how far neighbours are apart where they are farthest, in units of the scale.
    spacing: ClassVar[float] = 1.0

    @property
    def steps(self) -> int:
        """Distance between the lowest and the highest code."""
        return self.high - self.low

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Nearest codes, as float32 integers; ties go to the even multiple of the scale."""
        shift = self.center if zero is None else zero
        return torch.round(x / scale).add_(shift).clamp_(self.low, self.high)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Float32 values of codes (any dtype)."""
        shift = self.center if zero is None else zero
        return (codes.to(torch.float32) - shift) * scale

    def snap(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The grid value nearest to x: decode(encode(x)), in fewer passes."""
        steps = torch.div(x, scale).round_()
        if zero is None:
            steps.clamp_(self.low - self.center, self.high - self.center)
        else:
            # clamp with tensor bounds is several times slower.
            torch.maximum(steps, self.low - zero, out=steps)
            torch.minimum(steps, self.high - zero, out=steps)
        return steps.mul_(scale)


@dataclass(frozen=True, kw_only=True)
class CodebookGrid:
    """Sixteen values; value = values[code] · scale.  NF4's and FP4's lie in [-1, 1], their scale
    is an absmax; those of e2m1 (Float4Grid) reach 6."""

    values: tuple[float, ...]
    # Sixteen values span twice the absmax of a block: their mean distance.
    spacing: ClassVar[float] = 2.0 / 15.0

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes of the nearest values, as float32 integers; a block of zeros codes to zero."""
        assert zero is None, "codebooks are symmetric"
        # bitsandbytes multiplies by the reciprocal; dividing would differ in the last bit.
        return self.encode_unit(x * (1.0 / scale.clamp(min=1e-38)))

    def encode_unit(self, unit: Tensor) -> Tensor:
        """Codes, as float32 integers, of the values nearest to x / scale; ties go down."""
        _, order, index = self._nearest(unit)
        return order[index].to(torch.float32)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Float32 values of codes (any dtype)."""
        assert zero is None, "codebooks are symmetric"
        table = torch.tensor(self.values, dtype=torch.float32, device=codes.device)
        return table[codes.to(torch.int64)] * scale

    def snap(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The grid value nearest to x: decode(encode(x)), in fewer passes."""
        assert zero is None, "codebooks are symmetric"
        ordered, _, index = self._nearest(x * (1.0 / scale.clamp(min=1e-38)))
        return ordered[index].mul_(scale)

    def _nearest(self, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sorted values, their codes, for each x / scale the place of the nearest among them)."""
        table = torch.tensor(self.values, dtype=torch.float32, device=unit.device)
        ordered, order = torch.sort(table, stable=True)
        midpoints = (ordered[1:] + ordered[:-1]) / 2
        return ordered, order, torch.bucketize(unit.contiguous(), midpoints)


@dataclass(frozen=True, kw_only=True)
class Float4Grid(CodebookGrid):
    """e2m1 numbers times the scale, saturating at 6; ties go to the even mantissa, and what rounds
    to zero is code 0."""

    values: tuple[float, ...] = E2M1_VALUES
    spacing: ClassVar[float] = 2.0

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes of the nearest values, as float32 integers."""
        assert zero is None, "float grids are symmetric"
        return self.encode_unit(x / scale)

    def encode_unit(self, unit: Tensor) -> Tensor:
        """Codes, as float32 integers, of the values nearest to x / scale."""
        values = self._rounded(unit)
        size = values.abs()
        codes = torch.where(size < 2, size * 2, torch.where(size < 4, size + 2, size / 2 + 4))
        return codes.add_(8.0 * (values < 0))

    def snap(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The grid value nearest to x: decode(encode(x)), in fewer passes."""
        return self._rounded(x / scale).mul_(scale)

    def _rounded(self, unit: Tensor) -> Tensor:
        # Rounded in steps of 2 from 4 on, of 1 from 2 on, else of a half: the spacing there.
        size = unit.abs().clamp_(max=6.0)
        step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
        return size.div_(step).round_().mul_(step).copysign_(unit)


@dataclass(frozen=True, kw_only=True)
class Float8Grid:
    """e4m3 numbers times the scale, saturating at `largest`; a code is the number's byte."""

    largest: float = E4M3_LARGEST
    spacing: ClassVar[float] = 32.0

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes of the nearest values, as float32 integers; ties go to the even mantissa."""
        return self._bytes(x / scale).to(torch.float32)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Float32 values of codes (any dtype)."""
        assert zero is None, "float grids are symmetric"
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32) * scale

    def snap(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The grid value nearest to x: decode(encode(x)), in fewer passes."""
        unit = (x / scale).clamp_(-self.largest, self.largest)
        return unit.to(torch.float8_e4m3fn).to(torch.float32).mul_(scale)

    def _bytes(self, unit: Tensor) -> Tensor:
        # A cast alone turns what is too large into NaN.
        clamped = unit.clamp(-self.largest, self.largest)
        return clamped.to(torch.float8_e4m3fn).view(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class BlockGrid:
    """The grid of a block type of ggml: value = (code - center) · scale + minimum.

    The minimum is a real number and stands where other grids have their zero; a scale of 0 has one
    value only.
    """

    high: int
    center: int
    spacing: ClassVar[float] = 1.0

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Nearest codes, as float32 integers."""
        one = scale == 0
        codes = (x if zero is None else x - zero) / torch.where(one, torch.ones_like(scale), scale)
        codes = codes.round_().add_(self.center)
        return torch.where(one, torch.full_like(codes, self.center), codes).clamp_(0, self.high)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Float32 values of codes (any dtype)."""
        value = scale * (codes.to(torch.float32) - self.center)
        return value if zero is None else value.add_(zero)

    def snap(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The grid value nearest to x: decode(encode(x))."""
        return self.decode(self.encode(x, scale, zero), scale, zero)


Grid = IntegerGrid | CodebookGrid | Float8Grid | BlockGrid


def grid_of(scheme: Scheme) -> Grid:
    """The grid a scheme's codes live on.

    8-bit weights that meet 8-bit activations use -127..127 around 128, all others the full range.
    """
    if scheme.kind == "nf4":
        return CodebookGrid(values=NF4)
    if scheme.kind == "fp4":
        return CodebookGrid(values=FP4_VALUES)
    if scheme.kind in ("mxfp4", "nvfp4"):
        return Float4Grid()
    if scheme.kind in ("fp8", "mxfp8"):
        return Float8Grid()
    if scheme.block is not None:
        return BlockGrid(high=2**scheme.bits - 1, center=BLOCK_TYPES[scheme.block.upper()].center)
    low = 1 if scheme.centered else 0
    return IntegerGrid(low=low, high=2**scheme.bits - 1, center=2 ** (scheme.bits - 1))
