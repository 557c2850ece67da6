"""Towers beside the text's blocks: empty in the skeleton, and filled while images pass them."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.source import Source
from quantkit.model import skeleton
from quantkit.model.names import NameMap, load_into
from quantkit.model.refs import WeightRef
from quantkit.model.towers.linears import tower_weights

# What forwards call the pixels of images, whatever else they take.
PIXELS = "pixel_values"
# Numbers that a tower holds at once for each pixel's: at 14 x 14 pixels to a patch of 1152 numbers
# and 4304 inside, a layer's input, its three projections, both sides of its MLP.
_ACTIVATIONS_PER_PIXEL = 32


class Towers:
    """The parts of a model that text never passes: its towers and projectors.

    `paths` are those of their parameters and stored buffers.
    """

    def __init__(
        self, model: Any, names: NameMap, source: Source, blocks: str, device: torch.device
    ) -> None:
        self._model, self._names, self._source, self._device = model, names, source, device
        text = set(skeleton.outside_paths(model, blocks))
        self.paths = tuple(
            path
            for path in model.state_dict()
            if path not in text and not path.startswith(f"{blocks}.")
        )

    @property
    def takes(self) -> Mapping[str, inspect.Parameter]:
        """What the model's forward takes by name."""
        return inspect.signature(self._model.forward).parameters

    @property
    def takes_images(self) -> bool:
        """Whether the model's class reads images."""
        return bool(self.paths) and PIXELS in self.takes

    @cached_property
    def names(self) -> frozenset[str]:
        """Checkpoint names of what fills them."""
        known = [path for path in self.paths if path in self._names.pieces]
        return frozenset(piece.name for path in known for piece in self._names.of(path))

    @cached_property
    def weights(self) -> tuple[WeightRef, ...]:
        """Every matrix of a linear layer in the towers; reads nothing."""
        return tower_weights(self._model, self._names, self.paths)

    def initialises(self, path: str) -> str | None:
        """The class that would set the weight of a linear layer at `path` while transformers loads
        the model, even where a packed layer has none; None if none does."""
        owner = skeleton.owner_of(self._model, path)
        packed = nn.Linear(1, 1)
        del packed._parameters["weight"]
        try:
            owner._init_weights(packed)
        except AttributeError:
            return type(owner).__name__
        return None

    @property
    def num_bytes(self) -> int:
        """Bytes of all towers in the model's dtype."""
        state = self._model.state_dict()
        return sum(state[path].numel() * state[path].element_size() for path in self.paths)

    def working_bytes(self, largest: int) -> int:
        """Bytes of all towers while they read inputs of up to `largest` bytes in float32."""
        wide = largest * _ACTIVATIONS_PER_PIXEL * self._model.dtype.itemsize // 4
        return self.num_bytes + wide

    def placeholders(self) -> frozenset[int]:
        """Token ids that stand for images and the like in texts; the vocabulary may lack them."""
        return placeholders_of(self._model.config)

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """While active the towers hold their weights, on the model's device.

        Raises CheckpointError for one that the checkpoint lacks, NumericsError for NaN.
        """
        filled: list[tuple[dict[str, Any], str, Tensor]] = []
        moved: list[tuple[dict[str, Any], str, Tensor]] = []
        modules = {path.rpartition(".")[0] for path in self.paths}
        try:
            for path in self.paths:
                owner, _, leaf = path.rpartition(".")
                module = self._model.get_submodule(owner)
                held = module._parameters if leaf in module._parameters else module._buffers
                if (old := held[leaf]) is None or not old.is_meta:
                    continue
                load_into(module, owner, self._names, self._source, self._device, only=leaf)
                filled.append((held, leaf, old))
            for name in modules:
                # Small tables that were computed on the CPU.
                buffers = self._model.get_submodule(name)._buffers
                for key, value in buffers.items():
                    if value is not None and value.device != self._device:
                        moved.append((buffers, key, value))
                        buffers[key] = value.to(self._device)
            with torch.no_grad():
                yield
        finally:
            for held, leaf, old in itertools.chain(moved, filled):
                held[leaf] = old

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Path and module of everything in the towers that holds parameters of its own."""
        owners = dict.fromkeys(path.rpartition(".")[0] for path in self.paths)
        return ((path, self._model.get_submodule(path)) for path in owners)


def placeholders_of(config: Any) -> frozenset[int]:
    """Token ids that stand for images and the like in a model's texts, by its configuration."""
    fields = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = (getattr(config, field, None) for field in fields)
    return frozenset(value for value in found if isinstance(value, int))


def without_placeholders(ids_BT: Tensor, config: Any) -> Tensor:
    """Token ids with the lowest that stands for no image in the place of those that do."""
    marks = placeholders_of(config)
    plain = min(set(range(len(marks) + 1)) - marks)
    return torch.where(
        torch.isin(ids_BT, torch.tensor(sorted(marks), dtype=torch.int64)), plain, ids_BT
    )
