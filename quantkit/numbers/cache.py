"""Keys and values of attention in 8 bits, as a server's cache holds them.

Letters: B sequences, H heads of keys and values, T tokens, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from quantkit_kernels.lazy import torch

from quantkit.errors import SchemeError

if TYPE_CHECKING:
    from torch import Tensor

CacheName = Literal["fp8", "fp8_head"]
CACHE_NAMES: tuple[CacheName, ...] = get_args(CacheName)
_LARGEST = 448.0
# Twice what calibration saw is still held: float8 loses nothing by it, but very small numbers, and
# few tokens of calibration do not show the largest ones.
_HEADROOM = 2


@dataclass(frozen=True, kw_only=True)
class CacheScheme:
    """float8 e4m3 with one scale for the keys of a layer and one for its values, or per head.

    x = scale * q.  Twice the largest |x| that calibration saw is held, more becomes that.
    """

    name: CacheName

    @classmethod
    def parse(cls, name: str) -> CacheScheme:
        """By its name.  Raises SchemeError listing all."""
        for known in CACHE_NAMES:
            if name == known:
                return cls(name=known)
        raise SchemeError(f"--kv {name!r}: choose {' or '.join(CACHE_NAMES)}")

    @property
    def per_head(self) -> bool:
        """Whether each head has scales of its own."""
        return self.name == "fp8_head"

    def scale_shape(self, heads: int) -> tuple[int, ...]:
        """Shape of a layer's scale of keys, and of values: [1], or [H, 1, 1]."""
        return (heads, 1, 1) if self.per_head else (1,)

    def scale(self, largest_H: Tensor) -> Tensor:
        """The scale, float32 in `scale_shape`, by the largest |x| of each head; 1 where that is 0.

        A bfloat16 value, not less than asked for, so that readers of either dtype agree.
        """
        largest = largest_H.float().cpu()
        largest = largest if self.per_head else largest.amax().reshape(1)
        wanted = largest * (_HEADROOM / _LARGEST)
        found = wanted.to(torch.bfloat16).float()
        up = (wanted * (1 + 2**-7)).to(torch.bfloat16).float()
        found = torch.where(found < wanted, up, found)
        return torch.where(largest > 0, found, 1.0).reshape(self.scale_shape(len(largest_H)))

    def rounded(self, x_BHTD: Tensor, scale: Tensor) -> Tensor:
        """What is read back from the cache, in x's dtype: divided in float32, clamped, rounded."""
        scale = scale.to(x_BHTD.device, torch.float32)
        codes = (x_BHTD.float() / scale).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return (codes.float() * scale).to(x_BHTD.dtype)
