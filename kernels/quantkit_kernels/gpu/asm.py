"""PTX that decodes packed weights, as strings; tests emulate each sequence over all codes.

Every sequence works on one 32-bit word and gives 16-bit floats in pairs: `$0`.. are 16-bit outputs,
the operands follow.  The tricks are those of Kim et al. 2022 (arXiv 2211.10017): a code or'ed into
the mantissa of a power of two is that power plus the code, exactly.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

# Floats whose last mantissa bits count ones: 128 + code in bfloat16, 1024 + code in float16.
MAGIC = {"bf16": 0x4300, "f16": 0x6400}
ONE = {"bf16": 0x3F80, "f16": 0x3C00}
SIGN = 0x8000


def int4(dtype: str, *, zero_operand: bool) -> str:
    """Code - zero for the eight 4-bit codes of `$8`: outputs 2i, 2i+1 are nibbles i and i + 4.

    The operand `$9` holds -(magic + zero) twice; without it the zero is 8.  One fma each: the
    multiplication by one is exact, and unlike sub.bf16x2 it exists before sm_90.
    """
    magic = MAGIC[dtype]
    minus = "$9" if zero_operand else "c"
    lines = ["{", ".reg .b32 t0,t1,t2,t3,s,one,c;"]
    lines.append(f"mov.b32 one, {_pair(ONE[dtype])};")
    if not zero_operand:
        lines.append(f"mov.b32 c, {_pair(SIGN | magic | 8)};")
    for index in range(4):
        word = "$8"
        if index:
            lines.append(f"shr.u32 s, $8, {4 * index};")
            word = "s"
        lines.append(f"lop3.b32 t{index}, {word}, 0x000f000f, {_pair(magic)}, 0xea;")
        lines.append(f"fma.rn.{dtype}x2 t{index}, t{index}, one, {minus};")
        lines.append(f"mov.b32 {{${2 * index},${2 * index + 1}}}, t{index};")
    return "\n".join([*lines, "}"])


def int8(dtype: str) -> str:
    """The four signed bytes of `$4`, in order.

    bfloat16 counts to 128 only: the low seven bits and the sign bit are taken apart, 128 + low
    minus 128 or 256.  float16 takes the byte with its sign bit flipped, 1024 + 128 + value.
    """
    magic = MAGIC[dtype]
    lines = ["{", ".reg .b32 t,u,one,c,m;"]
    lines.append(f"mov.b32 m, {_pair(magic >> 8 | magic & 0xFF00)};")
    lines.append(f"mov.b32 one, {_pair(ONE[dtype] | (SIGN if dtype == 'bf16' else 0))};")
    if dtype == "f16":
        lines.append(f"mov.b32 c, {_pair(SIGN | magic | 0x80)};")
    for half, selector in enumerate(("0x4140", "0x4342")):
        lines.append(f"prmt.b32 u, $4, m, {selector};")
        if dtype == "bf16":
            lines.append("and.b32 t, u, 0xff7fff7f;")
            lines.append("and.b32 c, u, 0xff80ff80;")
            lines.append("fma.rn.bf16x2 t, c, one, t;")
        else:
            lines.append("xor.b32 u, u, 0x00800080;")
            lines.append("fma.rn.f16x2 t, u, one, c;")
        lines.append(f"mov.b32 {{${2 * half},${2 * half + 1}}}, t;")
    return "\n".join([*lines, "}"])


def fp8(dtype: str) -> str:
    """The four e4m3 numbers of `$4`, in order; their two NaNs, which no weight holds, become 480.

    Exponent and mantissa move to where the wider type has them, which makes the number 2^-120
    (bfloat16) or 2^-8 (float16) of itself, subnormal numbers too; one fma brings it back exactly.
    """
    shift, mask, power = {"bf16": (4, 0x07F0, 0x7B80), "f16": (1, 0x3F80, 0x5C00)}[dtype]
    lines = ["{", ".reg .b32 s,t,u,m,z,none;", "mov.b32 z, 0x00000000;"]
    lines.append(f"mov.b32 m, {_pair(power)};")
    lines.append(f"mov.b32 none, {_pair(SIGN)};")
    for half, selector in enumerate(("0x1404", "0x3424")):
        lines += [
            f"prmt.b32 u, $4, z, {selector};",
            f"shr.u32 s, u, {shift};",
            f"and.b32 s, s, {_pair(mask)};",
            f"lop3.b32 t, u, {_pair(SIGN)}, s, 0xea;",
            f"fma.rn.{dtype}x2 t, t, m, none;",
            f"mov.b32 {{${2 * half},${2 * half + 1}}}, t;",
        ]
    return "\n".join([*lines, "}"])


def e2m1(dtype: str) -> str:
    """The e2m1 numbers of the eight nibbles of `$8`: outputs 2i, 2i+1 are nibbles i and i + 4.

    As `fp8`: sign, exponent and mantissa move to where the wider type has them, which makes the
    number 2^-126 (bfloat16) or 2^-14 (float16) of itself.
    """
    place, mask, power = {"bf16": (6, 0x01C0, 0x7E80), "f16": (9, 0x0E00, 0x7400)}[dtype]
    lines = ["{", ".reg .b32 s,t,m,none;"]
    lines.append(f"mov.b32 m, {_pair(power)};")
    lines.append(f"mov.b32 none, {_pair(SIGN)};")
    for index in range(4):
        left = place - 4 * index
        move = f"shl.b32 s, $8, {left};" if left > 0 else f"shr.u32 s, $8, {-left};"
        lines += [move, f"and.b32 s, s, {_pair(mask)};"]
        sign = "$8"
        if index < 3:
            sign = "t"
            lines.append(f"shl.b32 t, $8, {12 - 4 * index};")
        lines += [
            f"lop3.b32 t, {sign}, {_pair(SIGN)}, s, 0xea;",
            f"fma.rn.{dtype}x2 t, t, m, none;",
            f"mov.b32 {{${2 * index},${2 * index + 1}}}, t;",
        ]
    return "\n".join([*lines, "}"])


def table4(values: Sequence[int]) -> str:
    """Sixteen 16-bit patterns looked up by the eight nibbles of `$8`, in order.

    The table lives in eight registers; prmt picks bytes by three bits of a nibble, the fourth bit
    picks between the halves of the table.
    """
    low, high = [value & 0xFF for value in values], [value >> 8 for value in values]
    lines = ["{", ".reg .b32 v,s,z,p0,p1,q0,q1,r,la,lb,lc,ld,ha,hb,hc,hd;"]
    for name, part in (("l", low), ("h", high)):
        for index, letter in enumerate("abcd"):
            four = int.from_bytes(bytes(part[4 * index : 4 * index + 4]), "little")
            lines.append(f"mov.b32 {name}{letter}, 0x{four:08x};")
    for half in range(2):
        word = "$8"
        if half:
            lines.append("shr.u32 v, $8, 16;")
            word = "v"
        lines += [
            f"and.b32 s, {word}, 0x7777;",
            f"shr.u32 z, {word}, 1;",
            "lop3.b32 z, z, 0x4444, 0x3210, 0xea;",
            "prmt.b32 p0, la, lb, s;",
            "prmt.b32 p1, lc, ld, s;",
            "prmt.b32 q0, ha, hb, s;",
            "prmt.b32 q1, hc, hd, s;",
            "prmt.b32 p0, p0, p1, z;",
            "prmt.b32 q0, q0, q1, z;",
        ]
        for quarter, selector in enumerate(("0x5140", "0x7362")):
            first = 4 * half + 2 * quarter
            lines.append(f"prmt.b32 r, p0, q0, {selector};")
            lines.append(f"mov.b32 {{${first},${first + 1}}}, r;")
    return "\n".join([*lines, "}"])


def bf16_bits(value: float) -> int:
    """The bfloat16 pattern nearest to a value, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    rounded: int = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return rounded


def f16_bits(value: float) -> int:
    """The float16 pattern nearest to a value."""
    (bits,) = struct.unpack("<H", struct.pack("<e", value))
    return int(bits)


def constraints(outputs: int, operands: int) -> str:
    """The constraint string of 16-bit outputs and 32-bit operands."""
    return ",".join(["=h"] * outputs + ["r"] * operands)


def _pair(bits: int) -> str:
    """The 16-bit pattern in both halves of a 32-bit literal."""
    return f"0x{bits << 16 | bits:08x}"
