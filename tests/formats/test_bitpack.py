"""Dense packing of codes into words."""

from __future__ import annotations

import pytest
import torch

from quantkit.formats.bitpack import num_words, pack_rows, unpack_rows


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_one_little_endian_number(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for columns in (1, 5, 31, 32, 33, 100):
        codes = torch.randint(0, 2**bits, (3, columns), generator=generator, dtype=torch.uint8)
        words = pack_rows(codes, bits)
        for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
            number = sum(code << (bits * place) for place, code in enumerate(row))
            expected = [number >> (32 * k) & 0xFFFFFFFF for k in range(num_words(columns, bits))]
            assert [word & 0xFFFFFFFF for word in packed] == expected
        assert torch.equal(unpack_rows(words, bits, columns), codes)


def test_chunks_of_rows_join_without_a_seam() -> None:
    codes = torch.randint(0, 8, (600, 4097), dtype=torch.uint8)
    words = pack_rows(codes, 3)
    assert torch.equal(words[599:], pack_rows(codes[599:], 3))
    assert torch.equal(words[255:257], pack_rows(codes[255:257], 3))
    assert torch.equal(unpack_rows(words, 3, 4097), codes)
