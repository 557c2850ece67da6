"""Attention of whole sequences on what a packed cache holds while they are written token by token.

When token t is computed, the chunks that ended before its window are packed.  That is the same for
all tokens of a chunk, so a sequence is attended to in chunks of queries.

Letters: B sequences, H heads of keys and values, Q heads of queries, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantkit.inference.packed_cache import CHUNK, WINDOW, Chunk, PackedLayer, packed_cache
from quantkit.model.attention import Function


class PackedAttention:
    """For `attending`: layers that `packed_cache` would pack read what it would give them."""

    def __init__(self, config: Any, name: str) -> None:
        layers = packed_cache(config, name).layers
        self._bits = {
            number: layer.bits
            for number, layer in enumerate(layers)
            if isinstance(layer, PackedLayer)
        }

    def __call__(
        self,
        module: nn.Module,
        function: Function,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
    ) -> Any:
        """The output [B, T, Q, D] of a causal attention without a cache, and None."""
        bits = self._bits.get(getattr(module, "layer_idx", -1))
        length = key.shape[-2]
        if bits is None or query.shape[-2] != length:
            return function(query, key, value, mask)
        old_keys, old_values = _packed(key, bits, -2), _packed(value, bits, -1)
        if mask is None:
            full = torch.full((length, length), torch.finfo(query.dtype).min, device=query.device)
            mask = full.triu(1).to(query.dtype)[None, None]
        outputs = []
        for start in range(0, length, CHUNK):
            stop = min(start + CHUNK, length)
            old = max(0, (start - WINDOW) // CHUNK * CHUNK)
            keys = torch.cat([old_keys[..., :old, :], key[..., old:stop, :]], dim=-2)
            values = torch.cat([old_values[..., :old, :], value[..., old:stop, :]], dim=-2)
            part = mask[..., start:stop, :stop]
            outputs.append(function(query[..., start:stop, :], keys, values, part)[0])
        return torch.cat(outputs, dim=1), None


def _packed(x_BHTD: Tensor, bits: int, axis: int) -> Tensor:
    """All whole chunks as they are read from the cache."""
    whole = x_BHTD.shape[-2] // CHUNK * CHUNK
    parts = x_BHTD[..., :whole, :].split(CHUNK, dim=-2) if whole else ()
    empty = x_BHTD[..., :0, :]
    return torch.cat([empty, *(Chunk.of(p, bits, axis).decoded(p.dtype) for p in parts)], dim=-2)
