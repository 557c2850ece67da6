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


@pytest.mark.parametrize("bits", [4, 8])
def test_a_transposed_row_of_words_unpacks_as_its_copy(bits: int) -> None:
    # How compressed-tensors keeps the zeros of few rows: one word for each of the groups.
    words = torch.tensor([[0x03020100, 0x07060504]], dtype=torch.int32).T
    assert words.is_contiguous() and words.stride(-1) == 2
    columns = 32 // bits
    assert torch.equal(unpack_rows(words, bits, columns), unpack_rows(words.clone(), bits, columns))
    assert unpack_rows(words, 8, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
