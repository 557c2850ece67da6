"""Weights that transformers computes from other tensors, read as the model holds them.

A fused qkv that is cut into three modules, rows that are put in another order: quantized, such a
tensor would not come through the conversion.  So the weights of blocks are read, and written, under
the names of the parameters, which transformers takes as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source, View
from quantkit.errors import ModelError
from quantkit.model import skeleton
from quantkit.model.names import Conversion, map_names


def converted(source: Source, model: PreTrainedModel) -> Source:
    """The source, with the blocks' weights that transformers computes in place of what they are
    computed from.

    The source itself if there are none, or if the model has no stack of blocks to quantize.  What
    a conversion would be run on again, under the parameter's name, stays as it is.
    """
    names = map_names(model, source)
    try:
        blocks = skeleton.find_blocks(model)[0] if names.conversions else ""
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
