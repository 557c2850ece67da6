"""A cache of keys and values in 8 or 4 bits, behind transformers' cache interface.

Keys have outliers in fixed channels and values have none (KIVI, arXiv 2402.02750), so keys are
rounded per channel, over `CHUNK` tokens, and values per token.  The most recent tokens stay as
they are; older ones are rounded once, a chunk at a time, and never again.

Letters: B sequences, H heads of keys and values, T tokens, C tokens of a chunk, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from quantkit.errors import ModelError

# Widths of a packed cache by the name that asks for it.
PACKED = {"int8": 8, "int4": 4}
CHUNK = 64
# Recent tokens that are never rounded; up to a chunk more wait for the others of theirs.
WINDOW = 64


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """x ~ low + scale * code: codes uint8 [B, H, C, D], of 4 bits two of a row in a byte.

    scale and low are float32, [B, H, 1, D] or [B, H, C, 1]; `size` is D.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    size: int
    bits: int

    @classmethod
    def of(cls, x_BHCD: Tensor, bits: int, axis: int) -> Chunk:
        """Rounded to nearest between the least and the largest along `axis`."""
        x = x_BHCD.float()
        low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        # What does not vary is its least value.
        scale = torch.where(scale > 0, scale, 1.0)
        codes = ((x - low) / scale).round_().to(torch.uint8)
        if bits == 4:
            if codes.shape[-1] % 2:
                codes = torch.nn.functional.pad(codes, (0, 1))
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        return cls(codes=codes, scale=scale, low=low, size=x.shape[-1], bits=bits)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """What it stands for [B, H, C, D]."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[..., : self.size]
        return (codes.float() * self.scale + self.low).to(dtype)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Chunk:
        """The chunk with other sequences."""
        parts = (change(self.codes), change(self.scale), change(self.low))
        return Chunk(codes=parts[0], scale=parts[1], low=parts[2], size=self.size, bits=self.bits)

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return self.codes.nbytes + self.scale.nbytes + self.low.nbytes


class PackedLayer(DynamicLayer):
    """A layer of full attention; `keys` and `values` hold the recent tokens [B, H, T, D]."""

    keys: Tensor
    values: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.chunks: list[tuple[Chunk, Chunk]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values so far, the new ones as they are; packs the oldest recent ones."""
        super().update(key_states, value_states, *args, **kwargs)
        whole = self._whole()
        while self.keys.shape[-2] >= WINDOW + CHUNK:
            key, value = self.keys[..., :CHUNK, :], self.values[..., :CHUNK, :]
            self.chunks.append((Chunk.of(key, self.bits, -2), Chunk.of(value, self.bits, -1)))
            # Copies: a view would keep what was packed.
            self.keys = self.keys[..., CHUNK:, :].clone()
            self.values = self.values[..., CHUNK:, :].clone()
        return whole

    def get_seq_length(self) -> int:
        """Tokens, packed ones included."""
        return CHUNK * len(self.chunks) + int(super().get_seq_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last tokens (a negative number of them); packed ones come back as they are."""
        while self.chunks and -tokens_to_remove > self.keys.shape[-2]:
            key, value = self.chunks.pop()
            self.keys = torch.cat([key.decoded(self.dtype), self.keys], dim=-2)
            self.values = torch.cat([value.decoded(self.dtype), self.values], dim=-2)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Empties the layer."""
        self.chunks = []
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Other sequences in the places of these, as beams ask for."""
        super().reorder_cache(beam_idx)
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence several times."""
        super().batch_repeat_interleave(repeats)
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the sequences."""
        super().batch_select_indices(indices)
        self._map(lambda x: x[indices])

    @property
    def num_bytes(self) -> int:
        """Memory that keys and values take."""
        packed = sum(part.num_bytes for pair in self.chunks for part in pair)
        return packed + (self.keys.nbytes + self.values.nbytes if self.is_initialized else 0)

    def _whole(self) -> tuple[Tensor, Tensor]:
        packed = [[part.decoded(self.dtype) for part in pair] for pair in self.chunks]
        keys = torch.cat([*(pair[0] for pair in packed), self.keys], dim=-2)
        return keys, torch.cat([*(pair[1] for pair in packed), self.values], dim=-2)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.chunks = [(key.mapped(change), value.mapped(change)) for key, value in self.chunks]


def check_packed(name: str) -> None:
    """Raises ModelError for a name that no packed cache has."""
    if name not in PACKED:
        raise ModelError(f"--kv {name!r}: choose {' or '.join(PACKED)}")


def packed_cache(config: Any, name: str) -> DynamicCache:
    """An empty cache for a model with this configuration; `name` is int8 or int4.

    Layers with a window or a state of their own keep theirs.  Raises ModelError for another name,
    or if there is no layer of full attention.
    """
    check_packed(name)
    cache = DynamicCache(config=config)
    full = [number for number, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    if not full:
        raise ModelError(
            f"--kv {name}: no layer of this model keeps all keys and values, so there is nothing "
            "to pack; leave --kv out"
        )
    for number in full:
        cache.layers[number] = PackedLayer(PACKED[name])
    return cache
