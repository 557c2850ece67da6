"""Scales for a cache of keys and values: planned by layer, calibrated on the quantized blocks.

Letters: B sequences, H heads of keys and values, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.checkpoint.memory import format_size
from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.errors import FormatError, NumericsError, RecipeError
from quantkit.formats.format import CacheFormat, Format
from quantkit.model.attention import Attention, caches_latent
from quantkit.model.causal import CausalModel
from quantkit.numbers.cache import CacheScheme

# Memory of a common GPU.
_ROOM = 24 * 2**30


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """What is written of the cache: `infos` has, for each block, its attention modules by path,
    each with the tensors for the scales of keys and of values; `attentions` what they are like."""

    scheme: CacheScheme
    attentions: tuple[Mapping[str, Attention], ...]
    infos: tuple[Mapping[str, tuple[TensorInfo, ...]], ...]

    @property
    def numbers_per_token(self) -> int:
        """Keys and values of all layers for one token."""
        return sum(
            one.heads * (one.key_size + one.value_size)
            for block in self.attentions
            for one in block.values()
        )

    def note(self, weight_bytes: int) -> str:
        """What a token of context takes, and how many there is room for beside the weights."""
        bytes_now, left = self.numbers_per_token, _ROOM - weight_bytes
        room = f"; beside the weights {format_size(_ROOM)} hold {left // bytes_now:,} tokens"
        return (
            f"keys and values of a token take {format_size(bytes_now)} as {self.scheme.name}, "
            f"{format_size(2 * bytes_now)} in bfloat16{room if left > 0 else ''}"
        )


def plan_cache(model: CausalModel, scheme: CacheScheme, fmt: Format) -> CachePlan:
    """The plan; raises FormatError or RecipeError where there can be none."""
    if not isinstance(fmt, CacheFormat):
        raise FormatError(
            f"--kv {scheme.name}: {fmt.name} has no place for scales of the cache; "
            "--format compressed-tensors and, for fp8, modelopt have"
        )
    if caches_latent(model.text_config):
        raise RecipeError(
            f"--kv {scheme.name}: this model's cache holds what keys and values are computed from "
            "(multi-head latent attention), whose scales no reader takes from a file; leave --kv "
            "out and let the server choose"
        )
    found = tuple(model.attentions(index) for index in range(model.num_blocks))
    if not any(found):
        raise RecipeError(
            f"--kv {scheme.name}: no block hands keys and values to transformers' attention "
            "functions, so there is nothing to calibrate; leave --kv out"
        )
    infos = tuple(
        {
            path: fmt.cache_layout(model.module_name(index, path), scheme, one.heads)
            for path, one in block.items()
        }
        for index, block in enumerate(found)
    )
    return CachePlan(scheme=scheme, attentions=found, infos=infos)


class CacheRanges:
    """The largest keys and values of a block's attention modules, for each head."""

    def __init__(self, plan: CachePlan, index: int) -> None:
        self._scheme, self._infos = plan.scheme, plan.infos[index]
        self.largest: dict[str, list[Tensor]] = {}

    def see(self, path: str, key_BHTD: Tensor, value_BHTD: Tensor) -> None:
        """Keys and values of tokens that count, as the attention at that path reads them."""
        if path not in self._infos:
            return
        found = [x.abs().amax(dim=(0, 2, 3)).float() for x in (key_BHTD, value_BHTD)]
        self.merge_([{path: found}])

    def merge_(self, others: Sequence[Mapping[str, list[Tensor]]]) -> None:
        """Takes in what other processes saw, `largest` of each."""
        for other in others:
            for path, found in other.items():
                before = self.largest.get(path, found)
                self.largest[path] = [
                    torch.maximum(a, b) for a, b in zip(before, found, strict=True)
                ]

    def scales(self) -> dict[str, Tensor]:
        """Tensor name -> scale.  Raises NumericsError if attention never ran or overflowed."""
        made: dict[str, Tensor] = {}
        for path, infos in self._infos.items():
            if path not in self.largest:
                raise NumericsError(
                    f"{infos[0].name}: calibration never reached the attention of this layer; "
                    "calibrate on more text, or leave --kv out"
                )
            for info, largest in zip(infos, self.largest[path], strict=True):
                if not bool(torch.isfinite(largest).all()):
                    raise NumericsError(
                        f"{info.name}: a key or value is NaN or infinite; the model overflows on "
                        "this text"
                    )
                made[info.name] = self._scheme.scale(largest)
        return made
