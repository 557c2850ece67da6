"""MatMulNBits: the operator's bytes, drawn by hand and gone through for every scheme."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.errors import CheckpointError
from quantkit.formats.onnx.nbits import BITS, Packed, blocks_of, holds, pack, unpack
from quantkit.numbers.scheme import Scheme
from quantkit.numbers.tensor import PlainScale, QuantizedTensor

SCHEMES = [
    f"w{bits}a16_{group}{asym}"
    for bits in range(2, 9)
    for group in ("g16", "g32", "g48", "g96", "g128", "g512", "row")
    for asym in ("", "_asym")
]


def sample(name: str, rows: int = 5, groups: int = 3, seed: int = 0) -> QuantizedTensor:
    """A random weight; of rows, the width is no multiple of any block."""
    scheme = Scheme.parse(name)
    generator = torch.Generator().manual_seed(seed)
    columns = 40 * groups if scheme.group_size is None else groups * scheme.group_size
    count = 1 if scheme.group_size is None else groups
    top = 2**scheme.bits
    codes = torch.randint(0, top, (rows, columns), generator=generator).to(torch.uint8)
    zero = torch.randint(0, top, (rows, count), generator=generator).to(torch.uint8)
    scale = torch.rand(rows, count, generator=generator).bfloat16()
    return QuantizedTensor(
        codes=codes,
        scale=PlainScale(tensor=scale),
        zero=None if scheme.symmetric else zero,
        scheme=scheme,
        dtype=torch.bfloat16,
    )


def decoded_slowly(
    packed: Packed, bits: int, size: int, shape: tuple[int, int]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """What the operator's description says, one number at a time."""
    rows, columns = shape
    count = -(-columns // size)
    mask, per_byte = 2**bits - 1, 8 // bits
    out = np.empty(shape, dtype=np.float32)
    codes, scales = packed.codes.numpy(), packed.scales.numpy()
    zeros = None if packed.zeros is None else packed.zeros.numpy().reshape(rows, -1)
    for row in range(rows):
        for column in range(columns):
            block, place = divmod(column, size)
            code = codes[row, block, place // per_byte] >> (place % per_byte * bits) & mask
            zero = 2 ** (bits - 1)
            if zeros is not None:
                zero = int(zeros[row, block // per_byte] >> (block % per_byte * bits) & mask)
            out[row, column] = np.float32(int(code) - zero) * scales[row * count + block]
    return out


@pytest.mark.parametrize("name", SCHEMES)
def test_packed_weights_decode_to_the_same_values_and_unpack_to_the_same_codes(name: str) -> None:
    tensor = sample(name)
    blocks = blocks_of(tensor)
    packed = pack(blocks)
    again = unpack("node", packed, bits=blocks.bits, size=blocks.size, shape=tensor.shape)
    assert again.differs_from(blocks) is None
    assert torch.equal(again.codes, tensor.codes)
    expected = tensor.dequantize(torch.float32)
    assert torch.equal(blocks.decode(), expected)
    slow = decoded_slowly(packed, blocks.bits, blocks.size, tensor.shape)
    assert np.array_equal(slow, expected.numpy())


def test_the_first_code_is_in_the_lowest_bits_and_zeros_fill_whole_bytes_per_row() -> None:
    tensor = sample("w4a16_g16_asym", rows=2, groups=3)
    packed = pack(blocks_of(tensor))
    assert packed.codes.shape == (2, 3, 8)
    first = int(tensor.codes[0, 0]) | int(tensor.codes[0, 1]) << 4
    assert int(packed.codes[0, 0, 0]) == first
    assert tensor.zero is not None and packed.zeros is not None
    assert packed.zeros.tolist() == [
        value for row in tensor.zero.tolist() for value in (row[0] | row[1] << 4, row[2])
    ]


def test_symmetric_weights_need_no_zeros_unless_held_in_more_bits() -> None:
    assert pack(blocks_of(sample("w4a16_g32"))).zeros is None
    widened = pack(blocks_of(sample("w3a16_g32", groups=2)))
    assert widened.zeros is not None and set(widened.zeros.tolist()) == {0x44}


@pytest.mark.parametrize("bits", BITS)
def test_a_difference_names_its_kind(bits: int) -> None:
    blocks = blocks_of(sample(f"w{bits}a16_g16_asym"))
    for kind in ("codes", "scale", "zero"):
        changed = blocks_of(sample(f"w{bits}a16_g16_asym"))
        getattr(changed, kind)[0, 0] += 1
        assert blocks.differs_from(changed) == kind
    assert blocks.differs_from(blocks.rows(0, 4)) == "shape"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nf4_b64", "holds integers, not nf4"),
        ("w8a8_row", "for weights alone"),
        ("w4a16_g24", "groups divisible by 16"),
    ],
)
def test_schemes_that_cannot_be_held_have_a_reason(name: str, reason: str) -> None:
    told = holds(Scheme.parse(name))
    assert told is not None and reason in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "3 bits in blocks of 16"),
        ({"size": 24}, "blocks of 24"),
        ({"size": 1 << 40}, "is not read"),
        ({"shape": (0, 48)}, "is not read"),
        ({"shape": (1 << 60, 48)}, "B is torch.uint8"),
        ({"bits": 8}, "B is torch.uint8"),
    ],
)
def test_attributes_that_contradict_the_tensors_are_refused(
    change: dict[str, object], message: str
) -> None:
    tensor = sample("w4a16_g16_asym")
    packed = pack(blocks_of(tensor))
    attributes: dict[str, object] = {"bits": 4, "size": 16, "shape": tensor.shape, **change}
    with pytest.raises(CheckpointError, match=message):
        unpack("node", packed, **attributes)  # type: ignore[arg-type]


def test_tensors_cut_short_are_refused() -> None:
    tensor = sample("w4a16_g16_asym")
    whole = pack(blocks_of(tensor))
    assert whole.zeros is not None
    for cut in (
        Packed(codes=whole.codes, scales=whole.scales[:-1], zeros=whole.zeros),
        Packed(codes=whole.codes, scales=whole.scales, zeros=whole.zeros[:-1]),
        Packed(codes=whole.codes.to(torch.int8), scales=whole.scales, zeros=whole.zeros),
    ):
        with pytest.raises(CheckpointError, match=r"node: (scales|zero_points|B) is"):
            unpack("node", cut, bits=4, size=16, shape=tensor.shape)
