"""Quantized weights as ggml blocks without requantizing: which type holds them, and how exactly.

Shapes: O out features, I in features, G groups per row, N blocks of 32 weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.formats.gguf.blocks import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Blocks, BlockType, pack
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

_ROWS = 1 << 21


def why_not(scheme: Scheme) -> str | None:
    """None if a block type of ggml holds the scheme's codes, else why not."""
    if scheme.kind != "int":
        return f"ggml has no block type with {scheme.kind}'s values and free scales"
    if not scheme.symmetric and scheme.bits > 5:
        return "ggml has no block type with a minimum and more than 5 bits"
    if scheme.group_size is not None and scheme.group_size % 32:
        return f"ggml's blocks are of 32 weights; {scheme.group_size} is no multiple"
    return None


def block_type_of(scheme: Scheme) -> BlockType:
    """The smallest block type that holds the scheme's codes; `why_not` comes first."""
    if scheme.symmetric:
        return Q4_0 if scheme.bits <= 4 else Q5_0 if scheme.bits == 5 else Q8_0
    return Q4_1 if scheme.bits <= 4 else Q5_1


def is_exact(scheme: Scheme) -> bool:
    """True if every value is kept; else minima are rounded to float16."""
    return scheme.symmetric


def to_blocks(name: str, tensor: QuantizedTensor) -> Tensor:
    """The weight as packed blocks, uint8 [O, bytes of a row].

    Scales are repeated for each 32 weights.  Raises NumericsError naming the weight if a scale is
    not exact in float16 or a minimum overflows it.
    """
    scheme = tensor.scheme
    kind = block_type_of(scheme)
    assert isinstance(tensor.scale, PlainScale) and tensor.scale.tensor.ndim == 2
    rows, columns = tensor.shape
    scale_OG = tensor.scale.tensor.float()
    if not torch.equal(scale_OG.half().float(), scale_OG):
        raise NumericsError(f"{name}: a scale is not exact in float16, ggml's dtype of scales")
    repeats = columns // scale_OG.shape[1] // kind.size
    out = torch.empty(rows, columns // kind.size * kind.num_bytes, dtype=torch.uint8)
    step = max(1, _ROWS // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        d = scale_OG[part].repeat_interleave(repeats, 1).half().reshape(-1)
        codes = tensor.codes[part].reshape(-1, kind.size)
        minimum = None
        if tensor.zero is None:
            # 2-bit code 0..3 around 2 is 6..9 around 8: the same distances from the center.
            codes = codes + (kind.center - 2 ** (scheme.bits - 1))
        else:
            low = -tensor.zero[part].float() * scale_OG[part]
            minimum = low.repeat_interleave(repeats, 1).half().reshape(-1)
            if not bool(torch.isfinite(minimum).all()):
                raise NumericsError(f"{name}: a group's minimum is too large for float16")
        blocks = Blocks(kind=kind, codes=codes.to(torch.uint8), d=d, m=minimum)
        packed = pack(blocks).view(-1, out.shape[1])
        out[part] = packed
    return out
