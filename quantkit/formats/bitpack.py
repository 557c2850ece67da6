"""Codes of 1 to 8 bits packed densely into int32 words: first code in the lowest bits, no gaps.

This is the layout of GPTQ (3 bits: 32 codes in 3 words) and of compressed-tensors.
Shapes: R rows, C codes per row, W = ceil(C * bits / 32) words per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


# Codes handled at a time: the int64 temporaries stay at some tens of MB, on a GPU at hundreds.
_CHUNK_CODES = {"cpu": 1 << 20, "cuda": 1 << 24}


def num_words(count: int, bits: int) -> int:
    """int32 words that hold `count` codes."""
    return -(-count * bits // 32)


def pack_rows(codes_RC: Tensor, bits: int) -> Tensor:
    """int32 [R, W] from uint8 codes < 2**bits, where they are.

    The last word of a row is filled with zero bits.
    """
    rows, columns = codes_RC.shape
    device = codes_RC.device
    words = torch.empty(rows, num_words(columns, bits), dtype=torch.int32, device=device)
    raw = words.view(torch.uint8)
    step = max(1, _CHUNK_CODES[device.type] // max(columns, 1))
    for start in range(0, rows, step):
        packed = _pack(codes_RC[start : start + step], bits)
        raw[start : start + step] = packed[:, : raw.shape[1]]
    return words


def unpack_rows(words_RW: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 codes [R, columns] from int32 words: the inverse of `pack_rows`."""
    rows = words_RW.shape[0]
    assert words_RW.shape[1] == num_words(columns, bits)
    # Flattened first: a column of one word counts as contiguous whatever its stride, and no view
    # of its bytes exists then.
    raw = words_RW.reshape(-1).view(torch.uint8).view(rows, -1)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    step = max(1, _CHUNK_CODES["cpu"] // max(columns, 1))
    for start in range(0, rows, step):
        codes[start : start + step] = _unpack(raw[start : start + step], bits)[:, :columns]
    return codes


def pack_nibbles(codes_RC: Tensor) -> Tensor:
    """uint8 [R, C/2] from codes of 4 bits, the first of two in the low nibble; C is even."""
    return (codes_RC[:, ::2] | (codes_RC[:, 1::2] << 4)).contiguous()


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 codes [R, C]: the inverse of `pack_nibbles`."""
    # Each byte becomes two in a little-endian 16-bit number: one pass, no copies.
    wide = packed.to(torch.int16)
    return ((wide & 15) | ((wide & 0xF0) << 4)).view(torch.uint8)


def _pack(codes_RC: Tensor, bits: int) -> Tensor:
    """Bytes, at least as many as the row's words have: eight codes of b bits are b bytes."""
    rows, columns = codes_RC.shape
    num_bytes = 4 * num_words(columns, bits)
    device = codes_RC.device
    padded = torch.zeros(rows, -(-num_bytes // bits) * 8, dtype=torch.uint8, device=device)
    padded[:, :columns] = codes_RC
    if bits == 8:
        return padded
    if bits == 4:
        return pack_nibbles(padded)
    shifts = torch.arange(0, 8 * bits, bits, device=device)
    eights = padded.view(rows, -1, 8).to(torch.int64) << shifts
    packed = eights.sum(-1, keepdim=True).view(torch.uint8)
    return packed[..., :bits].reshape(rows, -1)


def _unpack(raw: Tensor, bits: int) -> Tensor:
    """Codes, at least as many as the row has, from its bytes."""
    rows, num_bytes = raw.shape
    if bits == 8:
        return raw
    if bits == 4:
        return unpack_nibbles(raw)
    padded = torch.zeros(rows, -(-num_bytes // bits) * bits, dtype=torch.uint8)
    padded[:, :num_bytes] = raw
    eights = torch.zeros(rows, padded.shape[1] // bits, 8, dtype=torch.uint8)
    eights[..., :bits] = padded.view(rows, -1, bits)
    # Eight codes spread over the eight bytes of a little-endian 64-bit number.
    dense = eights.view(torch.int64)
    mask = 2**bits - 1
    spread = dense & mask
    for k in range(1, 8):
        spread |= (dense >> (bits * k) & mask) << (8 * k)
    return spread.view(torch.uint8).view(rows, -1)
