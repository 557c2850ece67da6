"""A source under the names of the model's parameters.

Weights that transformers computes from other tensors, a fused qkv that is cut into three modules
or rows that are put in another order, would not come through the conversion once they are
quantized: those of blocks are read, and written, as the parameters themselves, which transformers
takes as they are.  Tied weights have the name of the parameter that owns them, whichever of the two
the file has.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source, View
from quantkit.errors import ModelError
from quantkit.model import stacks
from quantkit.model.names import Conversion, NameMap, map_names


def converted(source: Source, model: PreTrainedModel) -> Source:
    """The source, with the blocks' weights that transformers computes in place of what they are
    computed from.

    The source itself if there are none, or if the model has no stack of blocks to quantize.  What
    a conversion would be run on again, under the parameter's name, stays as it is.
    """
    names = map_names(model, source)
    try:
        blocks = stacks.likely_root(model) if names.conversions else ""
    except ModelError:
        return source
    made = {path: rule for path, rule in names.conversions.items() if path.startswith(f"{blocks}.")}
    if not made:
        return source
    again = map_names(model, Converted(source, made)).pieces
    # One conversion makes several parameters, or none.
    stay = {
        rule.first
        for path, rule in made.items()
        if [(piece.name, piece.opaque) for piece in again.get(path, ())] != [(path, False)]
    }
    made = {path: rule for path, rule in made.items() if rule.first not in stay}
    return Converted(source, made) if made else source


class Converted(View):
    """The view that `converted` gives.  Holds what the conversion that ran last has made."""

    def __init__(self, source: Source, made: Mapping[str, Conversion]) -> None:
        super().__init__(source)
        self._made = made
        self._infos: dict[str, TensorInfo] = {}
        used: set[str] = set()
        for path, rule in made.items():
            used.update(name for names in rule.sources.values() for name in names)
            if path not in self._infos:
                self._infos.update(rule.targets(source))
        self._names = tuple(sorted({*source.names(), *made} - used))
        self._last: tuple[str, dict[str, Tensor]] | None = None

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        return self._infos[name] if name in self._made else self.source.info(name)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened tensor, fresh memory."""
        rule = self._made.get(name)
        if rule is None:
            return self.source.read_flat(name, start, stop)
        numel = self._infos[name].numel
        if not 0 <= start <= stop <= numel:
            raise IndexError(f"{name}: elements {start}..{stop} of {numel}")
        if self._last is None or self._last[0] != rule.first:
            self._last = None
            self._last = rule.first, rule.run(self.source)
        return self._last[1][name].reshape(-1)[start:stop].clone()


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
