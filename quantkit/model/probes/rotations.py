"""What carries the activations between blocks, and each head of values, found by probing.

On a sketch of the block (see `trace`) every product is noise.  Rotate what enters the block and
what some products put out: if what every product reads is then rotated, or as before, and the
block's output is rotated, then weights can make up for the rotation and nothing else needs to.

Letters: B sequences, T tokens, H hidden size, O rows of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.model.experts import Routing
from quantkit.model.trace import NoiseMode
from quantkit.model.uses import Use

# Of float32 arithmetic on a few tokens, as a part of the largest number; signs differ by two.
_TOLERANCE = 1e-3

# Rotates the last axis.
Turning = Callable[[Tensor], Tensor]
# Runs a sketch on B sequences of hidden states.
Forward = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Parameters by path: those whose products read and write what is rotated.

    `broken` is the first one that reads it changed in another way; "" stands for the block's
    output, None says that all is well.
    """

    readers: frozenset[str]
    writers: frozenset[str]
    broken: str | None


def find_stream(drawn: nn.Module, forward: Forward, noise_1TH: Tensor, turn: Turning) -> Carried:
    """What reads and writes the hidden states that the block takes and puts out."""
    size = noise_1TH.shape[-1]
    seen = _run(drawn, forward, noise_1TH.expand(2, *noise_1TH.shape[1:]), {})
    candidates = [path for path, width in seen.widths.items() if width == size]
    writers = set()
    for path in candidates:
        doubled = _run(
            drawn, forward, noise_1TH.expand(2, *noise_1TH.shape[1:]), {path: lambda y: 2 * y}
        )
        if not _alike(doubled.output[1], doubled.output[0]):
            writers.add(path)
    both = torch.cat([noise_1TH, turn(noise_1TH)])
    run = _run(drawn, forward, both, dict.fromkeys(writers, turn))
    return _judged(run, frozenset(writers), turn, turn)


def find_heads(
    drawn: nn.Module,
    forward: Forward,
    noise_1TH: Tensor,
    producer: str,
    rotate: Turning,
    by_heads: Turning,
) -> Carried:
    """What reads what a product puts out, as `rotate` changes it [..., O].

    Readers are those that read all of it turned `by_heads`, whose number may be a multiple.
    """
    both = noise_1TH.expand(2, *noise_1TH.shape[1:])
    run = _run(drawn, forward, both, {producer: rotate})
    return _judged(run, frozenset({producer}), by_heads, lambda output: output)


@dataclass(frozen=True, kw_only=True)
class _Run:
    inputs: Mapping[str, Tensor]
    widths: Mapping[str, int]
    output: Tensor


def _judged(run: _Run, writers: frozenset[str], turn: Turning, out: Turning) -> Carried:
    readers: set[str] = set()
    broken = None if _alike(run.output[1], out(run.output[0])) else ""
    for path, x in run.inputs.items():
        if _alike(x[1], x[0]):
            continue
        if _turns(x[1], x[0], turn):
            readers.add(path)
        else:
            broken = path if broken is None else broken
    return Carried(readers=frozenset(readers), writers=writers, broken=broken)


def _turns(x: Tensor, before: Tensor, turn: Turning) -> bool:
    try:
        return _alike(x, turn(before))
    except RuntimeError:
        # Of a width that is not rotated.
        return False


def _alike(x: Tensor, other: Tensor) -> bool:
    scale = other.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    return bool((x - other).abs().amax() <= _TOLERANCE * scale)


def _run(
    drawn: nn.Module, forward: Forward, hidden_BTH: Tensor, changed: Mapping[str, Turning]
) -> _Run:
    """One run of two sequences, of which the second has the products' outputs changed."""
    mode = _TurnMode(drawn, changed)
    with torch.no_grad(), mode:
        output = forward(drawn, hidden_BTH.contiguous())
    return _Run(inputs=mode.inputs, widths=mode.widths, output=output)


class _TurnMode(NoiseMode):
    def __init__(self, block: nn.Module, changed: Mapping[str, Turning]) -> None:
        super().__init__(block, batch=2)
        self._changed = changed
        self.inputs: dict[str, Tensor] = {}
        self.widths: dict[str, int] = {}

    def routing(self, index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Routing:
        # Experts run the same code: what holds of the first holds of all.
        return super().routing(index_TK, weight_TK, num_experts)[:1]

    def product(self, use: Use, x: Tensor, token_n: Tensor | None) -> Tensor | None:
        y = self.noise(x, use.shape[0])
        self.inputs[use.path] = x.reshape(2, -1, x.shape[-1]).clone()
        self.widths[use.path] = use.shape[0]
        if use.path in self._changed:
            parts = y.reshape(2, -1, y.shape[-1]).clone()
            parts[1] = self._changed[use.path](parts[1])
            y = parts.reshape(y.shape)
        return y
