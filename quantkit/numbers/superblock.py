"""Block types of ggml: what a block of weights is as numbers.

Every block has a float16 `d`; the blocks of K-quants hold groups whose scales (and minima)
are small integers under it.  How the numbers lie in a file is `formats/gguf/blocks.py`.

Shapes: O out features, I in features, N blocks of B weights each, G groups in a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


# Blocks decoded at a time, so that float32 temporaries stay small whatever the weight's size.
_DECODE_WEIGHTS = 1 << 21


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Bits `shift..shift+bits` of every code, `8 // bits` codes to a byte.

    Codes are cut into runs of `run`; byte k of a run group holds element k of each of its runs.
    """

    shift: int
    bits: int
    run: int


Field = Plane | str


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """How one block of weights is stored.

    `fields` in the order of their bytes: planes of the codes, and "d", "m", "scales".
    value = d·scale·(code - center), or d·scale·code + m, or d·scale·code - m·min.
    """

    name: str
    number: int
    size: int
    groups: int
    bits: int
    num_bytes: int
    fields: tuple[Field, ...]
    center: int = 0
    minimum: bool = False
    scale_bits: int = 0
    signed_scale: bool = False

    @property
    def group_size(self) -> int:
        """Weights that share a scale."""
        return self.size // self.groups

    @property
    def super_block(self) -> bool:
        """True for K-quants: groups' scales are integers under one float16 `d`."""
        return self.scale_bits > 0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight."""
        return 8 * self.num_bytes / self.size


_NIBBLES_16 = Plane(shift=0, bits=4, run=16)
_NIBBLES_32 = Plane(shift=0, bits=4, run=32)
_PAIRS_32 = Plane(shift=0, bits=2, run=32)
_FIFTH_1 = Plane(shift=4, bits=1, run=1)

Q4_0 = BlockType(
    name="Q4_0", number=2, size=32, groups=1, bits=4, num_bytes=18, center=8,
    fields=("d", _NIBBLES_16),
)  # fmt: skip
Q4_1 = BlockType(
    name="Q4_1", number=3, size=32, groups=1, bits=4, num_bytes=20, minimum=True,
    fields=("d", "m", _NIBBLES_16),
)  # fmt: skip
Q5_0 = BlockType(
    name="Q5_0", number=6, size=32, groups=1, bits=5, num_bytes=22, center=16,
    fields=("d", _FIFTH_1, _NIBBLES_16),
)  # fmt: skip
Q5_1 = BlockType(
    name="Q5_1", number=7, size=32, groups=1, bits=5, num_bytes=24, minimum=True,
    fields=("d", "m", _FIFTH_1, _NIBBLES_16),
)  # fmt: skip
# Signed bytes in the file; codes here are they plus 128.
Q8_0 = BlockType(
    name="Q8_0", number=8, size=32, groups=1, bits=8, num_bytes=34, center=128,
    fields=("d", Plane(shift=0, bits=8, run=32)),
)  # fmt: skip
Q2_K = BlockType(
    name="Q2_K", number=10, size=256, groups=16, bits=2, num_bytes=84, minimum=True, scale_bits=4,
    fields=("scales", _PAIRS_32, "d", "m"),
)  # fmt: skip
Q3_K = BlockType(
    name="Q3_K", number=11, size=256, groups=16, bits=3, num_bytes=110, center=4, scale_bits=6,
    signed_scale=True, fields=(Plane(shift=2, bits=1, run=32), _PAIRS_32, "scales", "d"),
)  # fmt: skip
Q4_K = BlockType(
    name="Q4_K", number=12, size=256, groups=8, bits=4, num_bytes=144, minimum=True, scale_bits=6,
    fields=("d", "m", "scales", _NIBBLES_32),
)  # fmt: skip
Q5_K = BlockType(
    name="Q5_K", number=13, size=256, groups=8, bits=5, num_bytes=176, minimum=True, scale_bits=6,
    fields=("d", "m", "scales", Plane(shift=4, bits=1, run=32), _NIBBLES_32),
)  # fmt: skip
Q6_K = BlockType(
    name="Q6_K", number=14, size=256, groups=16, bits=6, num_bytes=210, center=32, scale_bits=8,
    signed_scale=True,
    fields=(Plane(shift=0, bits=4, run=64), Plane(shift=4, bits=2, run=32), "scales", "d"),
)  # fmt: skip

BLOCK_TYPES: Mapping[str, BlockType] = {
    kind.name: kind for kind in (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
}


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The stored numbers of N blocks of one type.

    codes   uint8 [N, B]
    d       float16 [N]
    m       float16 [N], if the type has minima: the minimum itself, of K-quants the minima's scale
    scales  int8 [N, G], K-quants only
    mins    int8 [N, G], K-quants with minima only
    """

    kind: BlockType
    codes: Tensor
    d: Tensor
    m: Tensor | None = None
    scales: Tensor | None = None
    mins: Tensor | None = None

    def values(self) -> Tensor:
        """The weights, float32 [N, B], with ggml's order of multiplications."""
        kind = self.kind
        out = torch.empty(self.codes.shape, dtype=torch.float32)
        step = max(1, _DECODE_WEIGHTS // kind.size)
        for start in range(0, len(self.codes), step):
            part = slice(start, start + step)
            codes = self.codes[part].to(torch.float32).view(-1, kind.groups, kind.group_size)
            scale = self.d[part].to(torch.float32)[:, None]
            if self.scales is not None:
                scale = scale * self.scales[part].to(torch.float32)
            decoded = scale[..., None] * (codes - kind.center)
            if self.m is not None:
                low = self.m[part].to(torch.float32)[:, None]
                if self.mins is not None:
                    low = -(low * self.mins[part].to(torch.float32))
                decoded += low[..., None]
            out[part] = decoded.view(-1, kind.size)
        return out


@dataclass(frozen=True, kw_only=True)
class BlockScale:
    """Scales and minima of a weight [O, I] on a block type's grid, as stored: blocks in row order.

    d, m         float16 [O, N]; m only for types with minima
    scales, mins int8 [O, N·G], K-quants only
    """

    kind: BlockType
    d: Tensor
    m: Tensor | None = None
    scales: Tensor | None = None
    mins: Tensor | None = None

    @classmethod
    def of(cls, blocks: Blocks, rows: int) -> BlockScale:
        """The scales of blocks that make up a weight of so many rows."""

        def by_rows(numbers: Tensor | None) -> Tensor | None:
            return None if numbers is None else numbers.reshape(rows, -1)

        d = by_rows(blocks.d)
        assert d is not None
        return cls(
            kind=blocks.kind,
            d=d,
            m=by_rows(blocks.m),
            scales=by_rows(blocks.scales),
            mins=by_rows(blocks.mins),
        )

    @classmethod
    def joined(cls, parts: Sequence[BlockScale]) -> BlockScale:
        """The scales of parts of a weight, rows one after the other."""

        def cat(numbers: Sequence[Tensor | None]) -> Tensor | None:
            found = [part for part in numbers if part is not None]
            return torch.cat(found) if found else None

        return cls(
            kind=parts[0].kind,
            d=torch.cat([part.d for part in parts]),
            m=cat([part.m for part in parts]),
            scales=cat([part.scales for part in parts]),
            mins=cat([part.mins for part in parts]),
        )

    def rows(self, rows: slice) -> BlockScale:
        """The scales of some rows."""

        def part(numbers: Tensor | None) -> Tensor | None:
            return None if numbers is None else numbers[rows]

        return BlockScale(
            kind=self.kind,
            d=self.d[rows],
            m=part(self.m),
            scales=part(self.scales),
            mins=part(self.mins),
        )

    def blocks(self, codes_OI: Tensor) -> Blocks:
        """The blocks of all these numbers, with codes uint8 [O, I]."""
        groups = self.kind.groups
        return Blocks(
            kind=self.kind,
            codes=codes_OI.reshape(-1, self.kind.size),
            d=self.d.reshape(-1),
            m=None if self.m is None else self.m.reshape(-1),
            scales=None if self.scales is None else self.scales.reshape(-1, groups),
            mins=None if self.mins is None else self.mins.reshape(-1, groups),
        )

    def values(self) -> Tensor:
        """What a step of each group is worth, float32 [O, groups of a row]."""
        return self._spread(self.d, self.scales)

    def minima(self) -> Tensor | None:
        """What is added to each group's values, float32 as `values`; None for types without."""
        if self.m is None:
            return None
        low = self._spread(self.m, self.mins)
        return low if self.mins is None else -low

    def _spread(self, outer: Tensor, integers: Tensor | None) -> Tensor:
        """A block's number times those of its groups, one for each group of a row."""
        value = outer.float().repeat_interleave(self.kind.groups, 1)
        return value if integers is None else value * integers.float()
