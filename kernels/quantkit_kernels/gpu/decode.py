"""Triton: packed words to values in the order of the columns, for every weight-only op.

A block is 128 columns; BN rows of the weight at a time.  KIND is "int4" (code - zero), "int8",
"fp8" (e4m3), "e2m1" or "nf4" (the codebook's value).  All but NF4's are exact in every dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels.gpu import asm
from quantkit_kernels.ops.codebook import NF4

_INT4_BF16 = tl.constexpr(asm.int4("bf16", zero_operand=False))
_INT4_BF16_ZERO = tl.constexpr(asm.int4("bf16", zero_operand=True))
_INT4_F16 = tl.constexpr(asm.int4("f16", zero_operand=False))
_INT4_F16_ZERO = tl.constexpr(asm.int4("f16", zero_operand=True))
_INT8_BF16 = tl.constexpr(asm.int8("bf16"))
_INT8_F16 = tl.constexpr(asm.int8("f16"))
_FP8_BF16 = tl.constexpr(asm.fp8("bf16"))
_FP8_F16 = tl.constexpr(asm.fp8("f16"))
_E2M1_BF16 = tl.constexpr(asm.e2m1("bf16"))
_E2M1_F16 = tl.constexpr(asm.e2m1("f16"))
_NF4_BF16 = tl.constexpr(asm.table4([asm.bf16_bits(value) for value in NF4]))
_NF4_F16 = tl.constexpr(asm.table4([asm.f16_bits(value) for value in NF4]))
_EIGHT = tl.constexpr(asm.constraints(8, 1))
_EIGHT_ZERO = tl.constexpr(asm.constraints(8, 2))
_FOUR = tl.constexpr(asm.constraints(4, 1))
_MINUS_BF16 = tl.constexpr(asm.SIGN | asm.MAGIC["bf16"])
_MINUS_F16 = tl.constexpr(asm.SIGN | asm.MAGIC["f16"])


@triton.jit
def decode(
    packed,
    zero,
    block,
    rows,
    N_PAD,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BN: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Values [BN, 128] of one block, in DTYPE, or in float32 without ASM."""
    if KIND == "int8" or KIND == "fp8":
        words = _words(packed, block, rows, N_PAD, 32)
        if KIND == "fp8":
            o0, o1, o2, o3 = _floats(words, DTYPE, ASM)
        else:
            o0, o1, o2, o3 = _bytes(words, DTYPE, ASM)
        digits = tl.reshape(tl.join(tl.join(o0, o2), tl.join(o1, o3)), (BN, 4, 8, 2, 2))
        # [n, t, b, h, p] -> [n, b, h, t, p]: a change of names only, nothing moves.
        values = tl.reshape(tl.permute(digits, (0, 2, 3, 1, 4)), (BN, 128))
    else:
        words = _words(packed, block, rows, N_PAD, 16)
        if KIND == "nf4":
            o0, o1, o2, o3, o4, o5, o6, o7 = _table(words, DTYPE, ASM)
        elif KIND == "e2m1":
            o0, o1, o2, o3, o4, o5, o6, o7 = _short_floats(words, DTYPE, ASM)
        elif HAS_ZERO:
            offset = _zeros(zero, block, rows, N_PAD, GROUP, BN)
            o0, o1, o2, o3, o4, o5, o6, o7 = _nibbles(words, offset, True, DTYPE, ASM)
        else:
            o0, o1, o2, o3, o4, o5, o6, o7 = _nibbles(words, 8, False, DTYPE, ASM)
        first = tl.join(tl.join(o0, o4), tl.join(o2, o6))
        second = tl.join(tl.join(o1, o5), tl.join(o3, o7))
        # [n, t, b, j, h, p] -> [n, b, j, h, t, p]
        digits = tl.reshape(tl.join(first, second), (BN, 4, 4, 2, 2, 2))
        values = tl.reshape(tl.permute(digits, (0, 2, 3, 4, 1, 5)), (BN, 128))
    return values


@triton.jit
def _words(packed, block, rows, N_PAD, PER_ROW: tl.constexpr):
    return tl.load(
        packed
        + block * (N_PAD * PER_ROW)
        + rows[:, None] * PER_ROW
        + tl.arange(0, PER_ROW)[None, :],
        eviction_policy="evict_first",
    )


@triton.jit
def _zeros(zero, block, rows, N_PAD, GROUP: tl.constexpr, BN: tl.constexpr):
    """The zero of each word [BN, 16]."""
    if GROUP == 0:
        z = tl.load(zero + rows).to(tl.int32)[:, None]
    elif GROUP >= 128:
        z = tl.load(zero + (block // (GROUP // 128)) * N_PAD + rows).to(tl.int32)[:, None]
    else:
        PER_BLOCK: tl.constexpr = 128 // GROUP
        group = block * PER_BLOCK + tl.arange(0, PER_BLOCK)
        z = tl.load(zero + group[None, :] * N_PAD + rows[:, None]).to(tl.int32)
        z = tl.broadcast_to(z[:, None, :, None], (BN, 4, PER_BLOCK, 4 // PER_BLOCK))
        z = tl.reshape(z, (BN, 16))
    return tl.broadcast_to(z, (BN, 16))


@triton.jit
def _nibbles(word, zero, HAS_ZERO: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Code - zero; outputs 2i and 2i + 1 are nibbles i and i + 4."""
    if not ASM:
        o0 = ((word & 15) - zero).to(tl.float32)
        o1 = (((word >> 16) & 15) - zero).to(tl.float32)
        o2 = (((word >> 4) & 15) - zero).to(tl.float32)
        o3 = (((word >> 20) & 15) - zero).to(tl.float32)
        o4 = (((word >> 8) & 15) - zero).to(tl.float32)
        o5 = (((word >> 24) & 15) - zero).to(tl.float32)
        o6 = (((word >> 12) & 15) - zero).to(tl.float32)
        o7 = (((word >> 28) & 15) - zero).to(tl.float32)
        return o0, o1, o2, o3, o4, o5, o6, o7
    elif HAS_ZERO:
        if tl.bfloat16 == DTYPE:
            half = (zero | _MINUS_BF16).to(tl.uint32)
            words = [word, (half << 16) | half]
            return tl.inline_asm_elementwise(
                _INT4_BF16_ZERO, _EIGHT_ZERO, words, (tl.bfloat16,) * 8, True, 1
            )
        else:
            half = (zero | _MINUS_F16).to(tl.uint32)
            words = [word, (half << 16) | half]
            return tl.inline_asm_elementwise(
                _INT4_F16_ZERO, _EIGHT_ZERO, words, (tl.float16,) * 8, True, 1
            )
    elif tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(_INT4_BF16, _EIGHT, [word], (tl.bfloat16,) * 8, True, 1)
    else:
        return tl.inline_asm_elementwise(_INT4_F16, _EIGHT, [word], (tl.float16,) * 8, True, 1)


@triton.jit
def _bytes(word, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The signed bytes of each word."""
    if ASM:
        if tl.bfloat16 == DTYPE:
            return tl.inline_asm_elementwise(_INT8_BF16, _FOUR, [word], (tl.bfloat16,) * 4, True, 1)
        else:
            return tl.inline_asm_elementwise(_INT8_F16, _FOUR, [word], (tl.float16,) * 4, True, 1)
    else:
        # An arithmetic shift of the byte moved to the top extends its sign.
        o0 = ((word << 24) >> 24).to(tl.float32)
        o1 = ((word << 16) >> 24).to(tl.float32)
        o2 = ((word << 8) >> 24).to(tl.float32)
        o3 = (word >> 24).to(tl.float32)
        return o0, o1, o2, o3


@triton.jit
def _floats(word, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The e4m3 numbers in each word."""
    if ASM:
        if tl.bfloat16 == DTYPE:
            return tl.inline_asm_elementwise(_FP8_BF16, _FOUR, [word], (tl.bfloat16,) * 4, True, 1)
        else:
            return tl.inline_asm_elementwise(_FP8_F16, _FOUR, [word], (tl.float16,) * 4, True, 1)
    else:
        return _e4m3(word), _e4m3(word >> 8), _e4m3(word >> 16), _e4m3(word >> 24)


@triton.jit
def _e4m3(code):
    """The numbers of the lowest bytes, in float32."""
    exponent = (code >> 3) & 15
    mantissa = (code & 7).to(tl.float32)
    small = mantissa * 0.001953125
    value = (mantissa + 8.0) * tl.exp2((exponent - 10).to(tl.float32))
    value = tl.where(exponent == 0, small, value)
    return tl.where((code & 128) != 0, -value, value)


@triton.jit
def _short_floats(word, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The e2m1 numbers in each word; outputs 2i and 2i + 1 are nibbles i and i + 4."""
    if not ASM:
        o0, o1 = _e2m1(word), _e2m1(word >> 16)
        o2, o3 = _e2m1(word >> 4), _e2m1(word >> 20)
        o4, o5 = _e2m1(word >> 8), _e2m1(word >> 24)
        o6, o7 = _e2m1(word >> 12), _e2m1(word >> 28)
        return o0, o1, o2, o3, o4, o5, o6, o7
    elif tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(_E2M1_BF16, _EIGHT, [word], (tl.bfloat16,) * 8, True, 1)
    else:
        return tl.inline_asm_elementwise(_E2M1_F16, _EIGHT, [word], (tl.float16,) * 8, True, 1)


@triton.jit
def _e2m1(code):
    """The numbers of the lowest nibbles, in float32."""
    exponent = (code >> 1) & 3
    half = 0.5 * (code & 1).to(tl.float32)
    value = (1.0 + half) * tl.exp2((exponent - 1).to(tl.float32))
    value = tl.where(exponent == 0, half, value)
    return tl.where((code & 8) != 0, -value, value)


@triton.jit
def _table(word, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The codebook's values of the nibbles, in order."""
    if ASM:
        if tl.bfloat16 == DTYPE:
            return tl.inline_asm_elementwise(_NF4_BF16, _EIGHT, [word], (tl.bfloat16,) * 8, True, 1)
        else:
            return tl.inline_asm_elementwise(_NF4_F16, _EIGHT, [word], (tl.float16,) * 8, True, 1)
    else:
        o0, o1 = _nf4(word & 15), _nf4((word >> 4) & 15)
        o2, o3 = _nf4((word >> 8) & 15), _nf4((word >> 12) & 15)
        o4, o5 = _nf4((word >> 16) & 15), _nf4((word >> 20) & 15)
        o6, o7 = _nf4((word >> 24) & 15), _nf4((word >> 28) & 15)
        return o0, o1, o2, o3, o4, o5, o6, o7


@triton.jit
def _nf4(code):
    """NF4 values of codes, in float32."""
    value = tl.where(code == 15, 1.0, 0.7229568362236023)
    value = tl.where(code == 13, 0.5626170039176941, value)
    value = tl.where(code == 12, 0.44070982933044434, value)
    value = tl.where(code == 11, 0.33791524171829224, value)
    value = tl.where(code == 10, 0.24611230194568634, value)
    value = tl.where(code == 9, 0.16093020141124725, value)
    value = tl.where(code == 8, 0.07958029955625534, value)
    value = tl.where(code == 7, 0.0, value)
    value = tl.where(code == 6, -0.09105003625154495, value)
    value = tl.where(code == 5, -0.18477343022823334, value)
    value = tl.where(code == 4, -0.28444138169288635, value)
    value = tl.where(code == 3, -0.39491748809814453, value)
    value = tl.where(code == 2, -0.5250730514526367, value)
    value = tl.where(code == 1, -0.6961928009986877, value)
    return tl.where(code == 0, -1.0, value)
