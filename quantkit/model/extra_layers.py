"""Layers of a checkpoint that the model class does not have, found by names and shapes.

Models that predict several tokens at once bring such layers: transformers' class leaves them out,
vLLM drafts tokens with them.  Their tensors are called as those of a block, under another prefix.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.core_model_loading import dot_natural_key

from quantkit.checkpoint.source import Source
from quantkit.model.names import NameMap
from quantkit.model.refs import WeightRef

# Parts of the names of configuration fields that count such layers.
_WORDS = ("nextn", "mtp")


@dataclass(frozen=True, kw_only=True)
class ExtraLayer:
    """A layer that holds all matrices that one of the model's blocks has.

    prefix   of its tensors' names, "mtp.layers.0."
    like     the number of that block, and `stem` the prefix of its tensors
    root     what begins with it in the checkpoint belongs to such layers: "mtp."
    counted  where it would be, counted on from the last block: "model.layers.61."
    """

    prefix: str
    like: int
    stem: str
    root: str
    counted: str

    def refs(self, refs: Sequence[WeightRef]) -> tuple[WeightRef, ...]:
        """The layer's weights, from those of the block that it is like."""
        return tuple(
            replace(
                ref,
                name=self.prefix + ref.name.removeprefix(self.stem),
                block=None,
                parameter=self.counted + ref.name.removeprefix(self.stem),
                input=self.prefix + ref.input,
            )
            for ref in refs
        )


def find_extra_layers(
    names: NameMap, source: Source, blocks: Sequence[str]
) -> tuple[ExtraLayer, ...]:
    """The extra layers among what no parameter takes, in their order; reads headers only.

    `blocks` are the paths of the model's blocks.
    """
    shapes = {name: source.info(name).shape for name in names.unmapped}
    found: dict[str, tuple[int, int, str]] = {}
    seen: set[tuple[tuple[str, tuple[int, ...]], ...]] = set()
    first = ""
    for index, path in enumerate(blocks if shapes else ()):
        pieces = names.under(path).values()
        inside = [piece.name for many in pieces for piece in many]
        stem = _common(inside)
        first = first or stem
        matrices = {
            name.removeprefix(stem): shape
            for name in inside
            if len(shape := source.info(name).shape) > 1
        }
        kind = tuple(sorted(matrices.items()))
        if not matrices or kind in seen:
            continue
        seen.add(kind)
        longest = max(matrices, key=len)
        for name in shapes:
            prefix = name.removesuffix(longest)
            same = all(shapes.get(prefix + tail) == shape for tail, shape in kind)
            if prefix.endswith(".") and prefix != name and same:
                found[prefix] = max(found.get(prefix, (0, 0, "")), (len(kind), index, stem))
    start = first.removesuffix("0.") if first.endswith(".0.") else None
    return tuple(
        ExtraLayer(
            prefix=prefix,
            like=found[prefix][1],
            stem=found[prefix][2],
            root=_root(prefix, source, shapes),
            counted=prefix if start is None else f"{start}{len(blocks) + number}.",
        )
        for number, prefix in enumerate(sorted(found, key=dot_natural_key))
    )


def announced(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """The field of config.json that counts extra layers, and how many; None if there is none."""
    texts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in texts:
        for key, value in part.items():
            counts = "layers" in key and any(word in key.split("_") for word in _WORDS)
            if counts and type(value) is int and value > 0:
                return key, value
    return None


def _common(names: Sequence[str]) -> str:
    """The parts of the names, with their dots, that all begin with."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    same = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return "".join(f"{column[0]}." for column in same)


def _root(prefix: str, source: Source, unmapped: Mapping[str, object]) -> str:
    """The shortest part of the prefix below which no parameter takes a tensor."""
    parts = prefix.split(".")
    for end in range(1, len(parts)):
        root = ".".join(parts[:end]) + "."
        if all(name in unmapped for name in source.names() if name.startswith(root)):
            return root
    return prefix
