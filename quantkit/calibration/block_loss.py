"""What a block's outputs lack of those that are wanted, and its gradient by the block's weights.

Letters: B sequences, T tokens, H hidden size, O out features, I in features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from quantkit.calibration.hidden import HiddenStore
from quantkit.calibration.spans import phase
from quantkit.calibration.stream import CalibrationStream
from quantkit.model.refs import WeightRef, part_view, weight_view


@contextlib.contextmanager
def repeatable(device: str) -> Iterator[None]:
    """Gradients are the same again: on a GPU their sums are else added up in any order."""
    if not device.startswith("cuda"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


class BlockLoss:
    """The `Outputs` of one block, on the hidden states that enter it now.

    `wanted` holds in the generation after the block's what it is to hand on.  A batch is one of the
    stream's, so that neither its memory nor the order of sums depends on a budget; the rank that
    has it works it out for all.
    """

    def __init__(
        self,
        stream: CalibrationStream,
        index: int,
        block: nn.Module,
        refs: Sequence[WeightRef],
        wanted: HiddenStore,
    ) -> None:
        self._stream, self._index, self._block, self._refs = stream, index, block, refs
        self._wanted = wanted
        self._every, self._owners = stream.shares.every, stream.shares.owners
        self.batches = len(self._every)
        # Several weights may be parts of one parameter: experts, fused projections.
        self._parameters = {ref.parameter: block.get_parameter(ref.parameter) for ref in refs}

    def put_(self, weights: Iterable[Tensor]) -> None:
        """Has the block compute with these, float32 [O, I], rounded to its dtype."""
        for ref, weight_OI in zip(self._refs, weights, strict=True):
            weight_view(self._block, ref).copy_(weight_OI)

    def losses(self, batches: Sequence[int]) -> list[float]:
        """‖got - wanted‖² / ‖wanted‖² of each batch, over the tokens that count."""

        def losing(batch: int) -> Callable[[], float]:
            return lambda: float(self._lack(batch))

        owners = [self._owners[batch] for batch in batches]
        return list(self._stream.world.spread(owners, [losing(batch) for batch in batches]))

    def slopes(self, batch: int) -> tuple[float, list[Tensor]]:
        """The loss of a batch and its gradient by each weight; zero where no token came by."""
        (found,) = self._stream.world.spread([self._owners[batch]], [lambda: self._slopes(batch)])
        return found

    def _slopes(self, batch: int) -> tuple[float, list[Tensor]]:
        with self._watched(), repeatable(self._stream.device), torch.enable_grad():
            loss = self._lack(batch)
            found = torch.autograd.grad(
                loss, list(self._parameters.values()), allow_unused=True, materialize_grads=True
            )
        by_path = dict(zip(self._parameters, found, strict=True))
        # In one order in memory, whichever process has it: a sum may depend on that.
        slopes = [part_view(by_path[ref.parameter], ref).contiguous() for ref in self._refs]
        return float(loss.detach()), slopes

    def _lack(self, number: int) -> Tensor:
        batch = self._every[number]
        got = self._stream.output(self._index, self._block, batch)
        with phase("reading"):
            wanted = self._stream.read(self._wanted, self._index + 1, batch)
        got_TH, wanted_TH = (
            self._stream.rows(batch, out).to(torch.float32) for out in (got, wanted)
        )
        return (got_TH - wanted_TH).square().sum() / wanted_TH.square().sum().clamp(min=1e-30)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """The parameters that weights lie in have gradients."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self._parameters.values():
                parameter.requires_grad_(False)
