"""Keys and values on their way to attention: told of, or as a checkpoint's cache holds them.

Letters: B sequences, H heads of keys and values, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from quantkit.model.attention import KeysValues
from quantkit.model.causal import CausalModel
from quantkit.model.decoded import Unpacked
from quantkit.numbers.cache import CacheScheme

CacheSeen = Callable[[str, Tensor, Tensor], None]


class RoundedCache:
    """The scales of a checkpoint's cache, read once, and what they make of keys and values."""

    def __init__(self, source: Unpacked, scheme: CacheScheme, model: CausalModel) -> None:
        self.scheme = scheme
        self._scales = [
            {
                path: source.cache_scales(model.module_name(index, path), scheme, one.heads)
                for path, one in model.attentions(index).items()
            }
            for index in range(model.num_blocks)
        ]

    def of(self, index: int) -> KeysValues:
        """For `keys_and_values`: what the cache of a block gives back."""
        scales = self._scales[index]

        def rounded(path: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            if path not in scales:
                return key, value
            key_scale, value_scale = scales[path]
            return self.scheme.rounded(key, key_scale), self.scheme.rounded(value, value_scale)

        return rounded


def counting(cached: CacheSeen, mask_BT: Tensor | None) -> KeysValues:
    """Tells of keys and values of tokens that count, and changes none."""

    def see(path: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        counts = [key, value]
        if mask_BT is not None:
            mask = mask_BT.to(key.device).bool()
            # [tokens, H, D] as one sequence.
            counts = [x.transpose(1, 2)[mask].transpose(0, 1)[None] for x in counts]
        cached(path, *counts)
        return key, value

    return see
