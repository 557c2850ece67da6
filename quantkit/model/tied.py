"""Tied weights under the name of the parameter that owns them, whichever name the file has."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source, View
from quantkit.model.names import NameMap


def stored_under_partners(model: nn.Module, names: NameMap) -> dict[str, str]:
    """Path of an owner -> the checkpoint's name of its tensor, which is a tied partner's."""
    owner_of = getattr(model, "all_tied_weights_keys", {})
    stored = {}
    for owner, partner in names.tied.items():
        pieces = names.pieces.get(partner, ())
        if owner_of.get(partner) == owner and len(pieces) == 1:
            stored[owner] = pieces[0].name
    return stored


def under_owners(source: Source, model: nn.Module, names: NameMap) -> Source:
    """The source, with each tensor that it stores under a tied partner's name under the owner's.

    A file may hold `lm_head.weight` and no embedding: transformers reads it, vLLM and llama.cpp
    look for the embedding.  The source itself if there is nothing to rename.
    """
    stored = stored_under_partners(model, names)
    return Renamed(source, stored) if stored else source


class Renamed(View):
    """A source some of whose tensors have other names; `stored` maps the new to the old ones."""

    def __init__(self, source: Source, stored: Mapping[str, str]) -> None:
        super().__init__(source)
        self._stored = dict(stored)
        self._names = tuple(sorted({*source.names(), *stored} - set(stored.values())))

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        info = self.source.info(self._stored.get(name, name))
        return TensorInfo(name=name, dtype=info.dtype, shape=info.shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened tensor, fresh memory."""
        return self.source.read_flat(self._stored.get(name, name), start, stop)
