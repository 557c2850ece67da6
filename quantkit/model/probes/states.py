"""Weights that feed a state which is carried along the sequence, found by probing.

On a sketch of the block (see `trace`) every product is noise.  The output of one weight is changed
at one token, and what is behind it, other products' inputs and the block's output, is compared with
an untouched run at tokens far on.  Attention would hand the change on to all of them, but it looks
it up each time: here every softmax over tokens attends to its own one only.  A convolution hands it
on as far as it is wide.  What still arrives beyond that came through a state.

Letters: T tokens, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit.errors import ModelError
from quantkit.model.attention import SOFTMAX
from quantkit.model.trace import NoiseMode
from quantkit.model.uses import BlockTrace, Use

Key = tuple[str, int | None]
# Where one weight's output changes, and how far behind it, at least, changes are looked for.
_TOUCHED, _LEAST = 3, 8
# Tokens behind the first that is looked at; with the others a number that no axis else has.
_LOOKED_AT = 11


def probe_tokens(block: nn.Module) -> int:
    """How many tokens `find_fed` needs: more than all convolutions of the block reach."""
    return _far(block) + _LOOKED_AT


def find_fed(
    drawn: nn.Module, trace: BlockTrace, forward: Callable[[nn.Module], Tensor]
) -> frozenset[Key]:
    """Keys of the block's weights whose outputs enter a state that later tokens read.

    `drawn` is a sketch, `forward` runs it on one sequence of `probe_tokens` tokens.  Experts are
    left out: they see tokens one by one.  ModelError where tokens share rows of a product.
    """
    generator = torch.Generator().manual_seed(1)
    vectors = [parameter for parameter in drawn.parameters() if parameter.dim() == 1]
    before = [vector.clone() for vector in vectors]
    for vector in vectors:
        # Of a decay's parameters some have to let it last for some tokens.
        vector.copy_(torch.rand(vector.shape, generator=generator) * 4.5 - 3)
    far, total = _far(drawn), probe_tokens(drawn)
    keys = [use.key for use in trace.uses if use.expert is None]

    def run(touched: frozenset[Key]) -> Mapping[object, Tensor]:
        mode = _StateMode(drawn, total, touched)
        with torch.no_grad(), mode:
            mode.keep(None, forward(drawn))
        return mode.seen

    untouched = run(frozenset())
    if not all(bool(x.isfinite().all()) for x in untouched.values()):
        # Some code takes roots of a vector.
        for vector, old in zip(vectors, before, strict=True):
            vector.copy_(old)
        untouched = run(frozenset())
    if not all(bool(x.isfinite().all()) for x in untouched.values()):
        raise ModelError(
            f"{type(drawn).__name__}: a trial run of the block on noise gives NaN or infinity, so "
            "what feeds a state cannot be told; name weights in rules instead"
        )
    readings = {key: _changes(untouched, run(frozenset({key})), far) for key in keys}
    fed = {key for key, (_, later) in readings.items() if later}
    # What only weights that feed the state read feeds it too: decays in two factors, say.
    while more := {
        key for key, (any_, _) in readings.items() if key not in fed and any_ and any_ <= fed
    }:
        fed |= more
    return frozenset(fed)


def _changes(
    untouched: Mapping[object, Tensor], found: Mapping[object, Tensor], far: int
) -> tuple[frozenset[object], bool]:
    """What reads something else than before, and whether any of it does at tokens from `far` on."""
    changed, later = set(), False
    for key, plain in untouched.items():
        now = found.get(key)
        if now is None or now.shape != plain.shape or torch.equal(now, plain):
            continue
        changed.add(key)
        later = later or not torch.equal(now[far:], plain[far:])
    return frozenset(changed), later


def _far(block: nn.Module) -> int:
    """The first token that no convolution carries a change at _TOUCHED to."""
    widths = [
        module.weight.shape[-1] - 1
        for module in block.modules()
        if isinstance(module, nn.Conv1d) and isinstance(module.weight, Tensor)
    ]
    return _TOUCHED + 1 + max(_LEAST, sum(widths))


class _StateMode(NoiseMode):
    """Changes the outputs of some weights at one token; keeps what is read, token by token."""

    def __init__(self, block: nn.Module, tokens: int, touched: frozenset[Key]) -> None:
        super().__init__(block, batch=1)
        self._tokens_here, self._touched = tokens, touched
        self.seen: dict[object, Tensor] = {}

    def keep(self, key: object, x: Tensor) -> None:
        """Keeps x [..., I], of the first time under a key, if it has rows for each token."""
        if key not in self.seen and (rows := self._by_token(x)) is not None:
            self.seen[key] = rows.clone()

    def product(self, use: Use, x: Tensor, token_n: Tensor | None) -> Tensor | None:
        self.keep(use.key, x)
        y = self.noise(x, use.shape[0])
        if use.key in self._touched and (rows := self._by_token(y)) is not None:
            rows[_TOUCHED] *= -1.5
        return y

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().other(func, args, kwargs)
        if func is functional.scaled_dot_product_attention:
            return torch.zeros_like(result)
        if func in SOFTMAX:
            if result.dim() > 3:
                return torch.zeros_like(result)
            if result.dim() == 3 and result.shape[-2] == self._tokens_here:
                own = torch.arange(self._tokens_here).clamp_max(result.shape[-1] - 1)
                return functional.one_hot(own, result.shape[-1]).to(result).expand_as(result)
        return result

    def _by_token(self, x: Tensor) -> Tensor | None:
        """x with tokens first, a view where it can be one; None if no axis is theirs."""
        axes = [axis for axis, size in enumerate(x.shape[:-1]) if size == self._tokens_here]
        if len(axes) == 1:
            return x.movedim(axes[0], 0)
        rows = x.numel() // x.shape[-1]
        return None if rows % self._tokens_here else x.reshape(self._tokens_here, -1)
