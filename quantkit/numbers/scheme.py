"""What one weight is quantized to: number kind, bits, group size, symmetry, activation width.

A scheme says nothing about layer names, file formats or algorithms.
Names: `w{2-8}a{16|8}_{g<size>|row}[_asym]`, `w4afp8_{g<size>|row}`, `nf4_b64[_dq]`,
`fp4_b64[_dq]`, `fp8a{16|8}_row`, those of `_FIXED`, kinds that come in few forms, and the block
types of ggml, `q4_0` .. `q6_k`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from quantkit.errors import SchemeError, ShapeError

Kind = Literal["int", "nf4", "fp4", "fp8", "mxfp4", "mxfp8", "nvfp4", "ggml"]
Bits = Literal[4, 8, 16]
Share = Literal["group", "block", "tensor"]
# Kinds that come in few forms: kind, bits, group size, bits of activations, who shares a scale.
_FIXED: Mapping[str, tuple[Kind, int, int | None, Bits, Share]] = {
    "fp8a8_b128": ("fp8", 8, 128, 8, "block"),
    "fp8a8_tensor": ("fp8", 8, None, 8, "tensor"),
    "mxfp8a16": ("mxfp8", 8, 32, 16, "group"),
    "mxfp8a8": ("mxfp8", 8, 32, 8, "group"),
    "mxfp4a16": ("mxfp4", 4, 32, 16, "group"),
    "mxfp4a4": ("mxfp4", 4, 32, 4, "group"),
    "nvfp4a16": ("nvfp4", 4, 16, 16, "group"),
    "nvfp4a4": ("nvfp4", 4, 16, 4, "group"),
}
NAMES = (
    "w{2-8}a{16|8}_{g<size>|row}[_asym], w4afp8_{g<size>|row}, nf4_b64[_dq], fp4_b64[_dq], "
    "fp8a{16|8}_row, "
    + ", ".join(_FIXED)
    + ", and for gguf q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k_m, q4_k_m, q5_k_m, q6_k"
)

_INTEGER = re.compile(r"w([2-8])a(16|8|fp8)_(?:g(\d+)|(row))(_asym)?")
_FLOAT8 = re.compile(r"fp8a(16|8)_(?:g(\d+)|row)")
_FLOAT4 = re.compile(r"(nf4|fp4)_b(\d+)(_dq)?")
# Block type of ggml -> (bits, weights that share a scale, symmetric); numbers/superblock.py has all
# of it.  Mixes, named as llama-quantize does, are what most of their weights are.
BLOCKS: Mapping[str, tuple[int, int, bool]] = {
    "q4_0": (4, 32, True), "q4_1": (4, 32, False), "q5_0": (5, 32, True), "q5_1": (5, 32, False),
    "q8_0": (8, 32, True), "q2_k": (2, 16, False), "q3_k": (3, 16, True), "q4_k": (4, 32, False),
    "q5_k": (5, 32, False), "q6_k": (6, 16, True),
}  # fmt: skip
_MIXES = ("q3_k_m", "q4_k_m", "q5_k_m")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """The numbers of one quantized weight.

    `group_size` counts the consecutive weights that share a scale: along a row for integers (None =
    the whole row), along the flattened row-major weight for nf4 and fp4 (bitsandbytes' blocks).
    fp8 is e4m3 (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433), written with a scale
    per row (checkpoints of others have groups), per block of 128 x 128 or per weight (`share`).
    mxfp4 and mxfp8 are e2m1 and e4m3 in groups of 32 along a row that share a power of two (OCP
    Microscaling Formats 1.0,
    https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
    nvfp4 is e2m1 in groups of 16 whose scales are e4m3 numbers over one float32 for the weight
    (https://developer.nvidia.com/blog/introducing-nvfp4-for-efficient-and-accurate-low-precision-inference).
    `double_quant` stores those block scales in 8 bits themselves (Dettmers et al. 2023).
    ggml has the block types of llama.cpp's files: `block` names one, or a mix of them, which only
    stands for a whole model.
    `float_input`: the 8-bit activations of an integer scheme are e4m3 numbers (w4afp8), not int8.
    `half_scales`: the scales will be stored in float16, which holds none below 2^-24.  It says
    where numbers are going to, so ranges and roundings see it; names and stored weights do not.
    """

    kind: Kind
    bits: int
    group_size: int | None
    symmetric: bool = True
    activation_bits: Bits = 16
    double_quant: bool = False
    block: str | None = None
    half_scales: bool = False
    share: Share = "group"
    float_input: bool = False

    def __post_init__(self) -> None:
        if self._fixed_name is not None:
            return
        if self.coarse_scales:
            raise SchemeError(f"{self.kind} in this form is unknown; known: {', '.join(_FIXED)}")
        if self.float_input and (self.kind, self.activation_bits) != ("int", 8):
            raise SchemeError("e4m3 activations are named for integer weights only: w4afp8_g128")
        if self.group_size is not None and self.group_size < 2:
            raise SchemeError(f"group size {self.group_size}: a group holds at least 2 weights")
        if self.kind == "int":
            if not 2 <= self.bits <= 8:
                raise SchemeError(f"{self.bits} bits: integer schemes have 2 to 8")
            if self.double_quant:
                raise SchemeError("double quantization is for nf4 and fp4 only")
            if self.activation_bits != 16 and not (
                self.activation_bits == 8
                and self.symmetric
                and (self.bits == 4 or (self.bits == 8 and self.group_size is None))
                and not (self.float_input and self.bits != 4)
            ):
                raise SchemeError(
                    f"{self.name}: 8-bit activations go with symmetric weights, of 8 bits per row "
                    "or of 4; use w8a8_row, w4a8_g128, w4afp8_g128, or 16-bit activations (a16)"
                )
        elif self.kind == "fp8":
            if self.bits != 8 or not self.symmetric or self.double_quant:
                raise SchemeError("fp8 has 8 bits and no zeros: fp8a8_row or fp8a16_row")
            if self.activation_bits != 16 and (
                self.group_size is not None or self.activation_bits != 8
            ):
                raise SchemeError("8-bit activations go with fp8 weights per row: fp8a8_row")
        elif self.kind == "ggml":
            known = BLOCKS.get((self.block or "").removesuffix("_m"))
            if known != (self.bits, self.group_size, self.symmetric):
                raise SchemeError(f"block type {self.block!r}: known are {', '.join(BLOCKS)}")
        elif self.bits != 4 or not self.symmetric or self.activation_bits != 16:
            raise SchemeError(f"{self.kind} is 4-bit, symmetric and weight-only")
        elif self.group_size is None:
            raise SchemeError(f"{self.kind} needs a block size, as in {self.kind}_b64")

    @property
    def name(self) -> str:
        """The scheme's name, which `Scheme.parse` reads back."""
        if (fixed := self._fixed_name) is not None:
            return fixed
        if self.kind == "fp8":
            group = "row" if self.group_size is None else f"g{self.group_size}"
            return f"fp8a{self.activation_bits}_{group}"
        if self.block is not None:
            return self.block
        if self.kind != "int":
            return f"{self.kind}_b{self.group_size}" + ("_dq" if self.double_quant else "")
        group = "row" if self.group_size is None else f"g{self.group_size}"
        inputs = "fp8" if self.float_input else self.activation_bits
        return f"w{self.bits}a{inputs}_{group}" + ("" if self.symmetric else "_asym")

    @property
    def integer(self) -> Scheme:
        """The integer scheme whose steps lie as this one's do, as far as a search needs to know."""
        if self.kind != "ggml":
            return self
        return Scheme(
            kind="int", bits=self.bits, group_size=self.group_size, symmetric=self.symmetric
        )

    @property
    def flat(self) -> bool:
        """True if blocks run along the flattened weight and may straddle rows."""
        return self.kind in ("nf4", "fp4")

    @property
    def centered(self) -> bool:
        """True of int8 weights that meet int8 activations: -127..127, one rule for both."""
        return self.kind == "int" and (self.bits, self.activation_bits) == (8, 8)

    @property
    def coarse_scales(self) -> bool:
        """True if scales are powers of two or e4m3 numbers, or rows share them."""
        return self.kind in ("mxfp4", "mxfp8", "nvfp4") or self.share != "group"

    @property
    def static_input(self) -> bool:
        """True if calibration gives the input a scale: all of it (fp8), or over its groups'."""
        return self.share == "tensor" or (self.kind == "nvfp4" and self.activation_bits != 16)

    @property
    def _fixed_name(self) -> str | None:
        if not self.symmetric or self.double_quant:
            return None
        form = (self.kind, self.bits, self.group_size, self.activation_bits, self.share)
        return next((name for name, fixed in _FIXED.items() if fixed == form), None)

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """The scheme of that name.  Raises SchemeError with the allowed names."""
        if match := _INTEGER.fullmatch(name):
            bits, activation, group, _, asym = match.groups()
            return cls(
                kind="int",
                bits=int(bits),
                group_size=int(group) if group else None,
                symmetric=asym is None,
                activation_bits=16 if activation == "16" else 8,
                float_input=activation == "fp8",
            )
        if match := _FLOAT4.fullmatch(name):
            kind, block, double = match.groups()
            return cls(
                kind="nf4" if kind == "nf4" else "fp4",
                bits=4,
                group_size=int(block),
                double_quant=double is not None,
            )
        if match := _FLOAT8.fullmatch(name):
            return cls(
                kind="fp8",
                bits=8,
                group_size=int(match[2]) if match[2] else None,
                activation_bits=8 if match[1] == "8" else 16,
            )
        if name in BLOCKS or name in _MIXES:
            bits, group_size, symmetric = BLOCKS[name.removesuffix("_m")]
            return cls(
                kind="ggml", bits=bits, group_size=group_size, symmetric=symmetric, block=name
            )
        if name in _FIXED:
            kind, bits, size, activation_bits, share = _FIXED[name]
            return cls(
                kind=kind,
                bits=bits,
                group_size=size,
                activation_bits=activation_bits,
                share=share,
            )
        raise SchemeError(f"scheme {name!r} is unknown; allowed: {NAMES}")

    def check_shape(self, weight: str, shape: tuple[int, int]) -> None:
        """Nothing if a weight [O, I] of this shape can be quantized so; else raises ShapeError."""
        columns = shape[1]
        if self.flat or self.group_size is None or columns % self.group_size == 0:
            return
        if self._fixed_name is not None:
            raise ShapeError(
                f"{weight}: {columns} columns are not divisible by the {self.group_size} of "
                f"{self.name}; keep this weight with --skip, or give it another scheme by a rule"
            )
        fitting = [g for g in range(16, columns + 1) if columns % g == 0 and g <= 256]
        allowed = ", ".join(str(g) for g in fitting[:12])
        raise ShapeError(
            f"{weight}: {columns} columns are not divisible by group_size {self.group_size}; "
            f'use {allowed + " or " if allowed else ""}"row", or keep this weight with --skip'
        )

    def num_groups(self, shape: tuple[int, int]) -> int:
        """How many scales a weight [O, I] of this shape has."""
        rows, columns = shape
        if self.flat:
            assert self.group_size is not None
            return -(-rows * columns // self.group_size)
        return rows * (columns // (self.group_size or columns))
