"""What probing finds out about a model's blocks, once for each kind of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from quantkit.model.passes import as_float
from quantkit.model.probes.scales import PROBE_TOKENS, Found, find_groups
from quantkit.model.probes.states import Key, find_fed, probe_tokens
from quantkit.model.refs import BlockCall
from quantkit.model.trace import noise_like, sketch_
from quantkit.model.uses import BlockTrace


class Probed(Protocol):
    """What is probed: a `CausalModel`."""

    def empty_block(self, index: int) -> nn.Module:
        """A block without weights."""
        ...

    def calls(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None
    ) -> tuple[Tensor, tuple[BlockCall, ...]]:
        """What enters the first block, and every block's other arguments."""
        ...

    def run(self, block: nn.Module, hidden_BTH: Tensor, call: BlockCall) -> Tensor:
        """The block's hidden states."""
        ...


class Probes:
    """Probes blocks; `signatures[index]` names the kind of a block, `traces` has a trace of each.

    What a model's own code raises comes through.
    """

    def __init__(
        self, model: Probed, signatures: Sequence[str], traces: Mapping[str, BlockTrace]
    ) -> None:
        self._model, self._signatures, self._traces = model, signatures, traces
        self._groups: dict[str, tuple[Found, ...]] = {}
        self._fed: dict[str, frozenset[Key]] = {}

    def groups(self, index: int, head_sizes: Sequence[int]) -> tuple[Found, ...]:
        """The scale groups of a block: see `scales`."""
        signature = self._signatures[index]
        if signature not in self._groups:
            sketch = sketch_(self._model.empty_block(index))
            trace = self._traces[signature]

            @functools.cache
            def prepared(batch: int) -> Callable[[nn.Module], Tensor]:
                return self._forward(index, torch.zeros(batch, PROBE_TOKENS, dtype=torch.int64))

            self._groups[signature] = find_groups(sketch, trace, prepared, head_sizes)
        return self._groups[signature]

    def fed(self, index: int) -> frozenset[Key]:
        """Weights of a block that feed a state carried along the sequence: see `states`."""
        signature = self._signatures[index]
        if signature not in self._fed:
            sketch = sketch_(self._model.empty_block(index))
            ids = torch.ones(1, probe_tokens(sketch), dtype=torch.int64)
            forward = self._forward(index, ids)
            self._fed[signature] = find_fed(sketch, self._traces[signature], forward)
        return self._fed[signature]

    def _forward(self, index: int, ids_BT: Tensor) -> Callable[[nn.Module], Tensor]:
        """What runs a sketch on noise in the shape of these tokens' hidden states."""
        hidden_BTH, calls = self._model.calls(ids_BT)
        noise_BTH, call = noise_like(hidden_BTH, len(ids_BT)), as_float(calls[index])
        return lambda block: self._model.run(block, noise_BTH, call)
