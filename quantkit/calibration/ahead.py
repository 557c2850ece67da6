"""Blocks that are read from disk while the one before is at work."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import nn


class Blocks(Protocol):
    """The part of a CausalModel that loads blocks."""

    device: torch.device
    num_blocks: int

    def empty_block(self, index: int) -> nn.Module:
        """A copy of a block without weights."""
        ...

    def fill_block_(self, block: nn.Module, index: int, device: torch.device) -> None:
        """Reads its weights."""
        ...


class BlocksAhead:
    """Loads blocks in their order for a GPU: the next one's weights wait in the host's memory.

    Holds one block there.
    """

    def __init__(self, model: Blocks) -> None:
        self._model = model
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="next-block")
        self._next: tuple[int, Future[nn.Module]] | None = None

    def load(self, index: int) -> nn.Module:
        """As `CausalModel.load_block`, which says what it raises."""
        waiting, self._next = self._next, None
        if waiting is None or waiting[0] != index:
            waiting = index, self._begin(index)
        block = waiting[1].result()
        if index + 1 < self._model.num_blocks:
            self._next = index + 1, self._begin(index + 1)
        return block.to(self._model.device)

    def close(self) -> None:
        """Waits for what is being read, and drops it."""
        self._next = None
        self._reader.shutdown(cancel_futures=True)

    def _begin(self, index: int) -> Future[nn.Module]:
        # The skeleton is not for two threads at once: only reading happens in the other.
        block = self._model.empty_block(index)

        def fill() -> nn.Module:
            self._model.fill_block_(block, index, torch.device("cpu"))
            return block

        return self._reader.submit(fill)
