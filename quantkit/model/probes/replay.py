"""Whether a model may be run one block at a time: the check before anything is calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from quantkit.checkpoint.source import Source
from quantkit.errors import ModelError, NumericsError
from quantkit.model.passes import Inputs, Passes
from quantkit.model.refs import BlockCall

_TASK = {
    False: "quantized block by block",
    True: "calibrated on images block by block; calibrate it on text alone",
}


class Replayed(Protocol):
    """What is run block by block: a `CausalModel`."""

    source: Source

    def block_path(self, index: int) -> str:
        """Path of a block in the model."""
        ...

    def load_block(self, index: int) -> nn.Module:
        """A block with its weights."""
        ...

    def calls(
        self,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor | None = None,
        inputs: Inputs | None = None,
    ) -> tuple[torch.Tensor, tuple[BlockCall, ...]]:
        """What enters the first block, and every block's other arguments."""
        ...

    def run(self, block: nn.Module, hidden_BTH: torch.Tensor, call: BlockCall) -> torch.Tensor:
        """The block's hidden states."""
        ...


def check_replay(
    model: Replayed,
    passes: Passes,
    signatures: Sequence[str],
    ids_BT: torch.Tensor | None,
    inputs: Inputs | None = None,
) -> None:
    """Raises ModelError unless running block by block equals the model's own forward.

    Computes the first two blocks and the first of each kind; the others hand their input on.
    With `inputs` what reaches the head is compared too.
    """
    if ids_BT is None:
        vocabulary = model.source.info(passes.embedding_name).shape[0]
        ids_BT = torch.arange(1, 17, dtype=torch.int64).reshape(1, 16) % vocabulary
    seen: set[str] = set()
    computed = set()
    for index, signature in enumerate(signatures):
        if index < 2 or signature not in seen:
            computed.add(index)
        seen.add(signature)
    entered: list[torch.Tensor] = []

    def compute(index: int, hidden_BTH: torch.Tensor, call: BlockCall) -> torch.Tensor:
        if not bool(torch.isfinite(hidden_BTH).all()):
            before = model.block_path(index - 1) if index else "the embedding"
            raise NumericsError(
                f"{before}: an activation it hands on is NaN or infinite; the model overflows "
                f"in {hidden_BTH.dtype}, or a weight in or before it is damaged"
            )
        entered.append(hidden_BTH)
        if index not in computed:
            return hidden_BTH
        return model.run(model.load_block(index), hidden_BTH, call)

    headed: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        headed.append(x)
        return x[..., :1]

    found = passes.run(ids_BT, None, compute, keep, inputs=inputs)
    wanted = headed[0] if headed else found
    hidden, calls = model.calls(ids_BT, inputs=inputs)
    for index, call in enumerate(calls):
        entering = hidden if call.added is None else hidden + call.added
        if not torch.equal(entering, entered[index]):
            raise ModelError(
                f"{model.block_path(index)}: replaying block by block differs from the model's "
                "own forward here: blocks of this model share more than hidden states, so it "
                f"cannot be {_TASK[inputs is not None]}"
            )
        hidden = entering
        if index in computed:
            hidden = model.run(model.load_block(index), hidden, replace(call, added=None))
    if inputs is not None and not torch.equal(passes.head_hidden(hidden), wanted):
        raise ModelError(
            f"{passes.head_path or 'the output'}: what reads the last block's output differs from "
            f"the model's own forward, so it cannot be {_TASK[True]}"
        )
