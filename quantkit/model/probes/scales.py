"""Scale groups found by probing: whose output channels reach which matrix products linearly.

On a sketch of the block (see `trace`) every product is noise, so what a product reads is a
function of the other products' outputs alone.  Multiply some of a producer's output channels by
known factors: if every product's input changes by constant ratios per column, or not at all, and
the block's output stays, then dividing the producer's channels and multiplying those columns is a
fold that changes nothing.  The ratios name the channel each column carries (GQA, fused qkv,
interleaved layouts); attention's q and k, gates and GELU give ratios that differ between tokens.

Letters: B sequences (one probe each), T tokens, O rows of a producer, C its usable channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from quantkit.errors import ModelError
from quantkit.model.experts import Routing
from quantkit.model.trace import NoiseMode, make_noise
from quantkit.model.uses import BlockTrace, Use

PROBE_TOKENS = 8
# Pieces tried in one run: each takes two sequences, beside the untouched one.
_PIECES = 8
# Factors lie in 1.25 .. 4, never at 1, so that touched and untouched columns differ clearly.
_LOWEST, _SPAN = 1.25, 3.2
# Of float32 arithmetic on a few tokens; channels' factors differ by far more (see _factors).
_TOLERANCE = 1e-4

# Number of sequences B -> a function that runs a sketch on them: [B, PROBE_TOKENS, H].
Forward = Callable[[int], Callable[[nn.Module], torch.Tensor]]
Key = tuple[str, int | None]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A scale group of one kind of block; the fields are those of `refs.ScaleGroup`.

    `readers` are the products that read the channels.
    """

    kind: Literal["norm", "rows"]
    producer: str
    bias: str | None
    expert: int | None
    transposed: bool
    offset: float
    rows: torch.Tensor
    channel_map: torch.Tensor
    readers: tuple[Key, ...]


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """Something whose output channels can be multiplied: a norm module or a product."""

    kind: Literal["norm", "rows"]
    path: str
    size: int
    offset: float = 0.0
    use: Use | None = None


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """How columns changed against the first sequence: ratio [B, I]; constant [B] over tokens."""

    ratio: torch.Tensor
    constant: torch.Tensor

    def same(self) -> torch.Tensor:
        """For each sequence whether it equals the first [B]."""
        return self.constant & ((self.ratio - 1).abs() < _TOLERANCE).all(1)


def find_groups(
    drawn: nn.Module, trace: BlockTrace, forward: Forward, head_sizes: Iterable[int]
) -> tuple[Found, ...]:
    """All scale groups of a block from its sketch, in the order of the producers.

    None at all where sequences share rows of a product.

    `forward` gives what runs a sketch on B equal sequences of PROBE_TOKENS tokens.  Of several
    producers of the same input the first is kept.
    """
    probe = _Probe(drawn, forward, frozenset(use.path for use in trace.uses))
    found: list[Found] = []
    taken: set[Key] = set()
    for candidate in [*_norms(drawn), *_products(trace)]:
        try:
            group = _group(drawn, probe, candidate, tuple(head_sizes))
        # Where sequences share rows of a product, no ratio tells what reads a channel.
        except ModelError:
            return ()
        if group is not None and not taken & set(group.readers):
            taken |= set(group.readers)
            found += _for_all_experts(group, trace)
    return tuple(found)


def _group(
    drawn: nn.Module, probe: _Probe, candidate: _Candidate, head_sizes: tuple[int, ...]
) -> Found | None:
    """The group of a producer, None if no channels of it can be folded."""
    rows = torch.arange(candidate.size)
    maps = probe.channel_maps(candidate, rows)
    if maps is None and candidate.kind == "rows":
        good = _good_pieces(probe, candidate, head_sizes)
        if good:
            rows = torch.unique(torch.cat(good))
            maps = probe.channel_maps(candidate, rows)
    if not maps:
        return None
    channel_map = next(iter(maps.values()))
    if not all(torch.equal(channel_map, other) for other in maps.values()):
        return None
    used, channel_map = torch.unique(channel_map, return_inverse=True)
    use = candidate.use
    module, _, name = candidate.path.rpartition(".")
    bias = f"{module}.bias" if name == "weight" else f"{candidate.path}_bias"
    return Found(
        kind=candidate.kind,
        producer=candidate.path,
        bias=bias if any(name == bias for name, _ in drawn.named_parameters()) else None,
        expert=None if use is None else use.expert,
        transposed=use is not None and use.transposed,
        offset=candidate.offset,
        rows=rows[used],
        channel_map=channel_map,
        readers=tuple(maps),
    )


def _good_pieces(
    probe: _Probe, candidate: _Candidate, head_sizes: tuple[int, ...]
) -> list[torch.Tensor]:
    """The pieces of a producer's rows that can be folded: halves, thirds, single heads."""
    size = candidate.size
    pieces = []
    for parts in (2, 3):
        if size % parts == 0:
            pieces += list(torch.arange(size).split(size // parts))
    good = [
        piece for piece, fits in zip(pieces, probe.good(candidate, pieces), strict=True) if fits
    ]
    for head in head_sizes:
        if size % head or size == head:
            continue
        heads = list(torch.arange(size).split(head))
        # Value heads come in a regular pattern: none among the first and last means none at all.
        sample = heads if len(heads) <= 8 else heads[:4] + heads[-4:]
        if any(probe.good(candidate, sample)):
            fits = probe.good(candidate, heads)
            good += [piece for piece, fit in zip(heads, fits, strict=True) if fit]
    return good


class _Probe:
    """Runs a sketch with factors on a producer's channels and compares with the first sequence."""

    def __init__(self, drawn: nn.Module, forward: Forward, paths: frozenset[str]) -> None:
        self._drawn, self._forward, self._paths = drawn, forward, paths

    def good(self, candidate: _Candidate, pieces: list[torch.Tensor]) -> list[bool]:
        """For each piece of the rows whether it can be folded and something reads it."""
        result = []
        for start in range(0, len(pieces), _PIECES):
            some = pieces[start : start + _PIECES]
            mode = self._run(candidate, some)
            for number in range(len(some)):
                pair = [1 + 2 * number, 2 + 2 * number]
                fits = bool(mode.output_same[pair].all())
                touched = False
                for reading in mode.readings.values():
                    fits = fits and bool(reading.constant[pair].all())
                    touched = touched or bool(((reading.ratio[pair] - 1).abs() > 0.1).any())
                result.append(fits and touched)
        return result

    def channel_maps(
        self, candidate: _Candidate, rows: torch.Tensor
    ) -> dict[Key, torch.Tensor] | None:
        """For every product that reads the rows, which of them each column carries [I].

        None if the rows cannot be folded: the block's output changes, or an input does by other
        than constant ratios, or in some of its columns only.
        """
        mode = self._run(candidate, [rows])
        # Of experts one stands for all, but of what no token reached nothing is known.
        reached = {path for path, _ in mode.readings}
        if not bool(mode.output_same.all()) or self._paths - reached:
            return None
        maps: dict[Key, torch.Tensor] = {}
        for key, reading in mode.readings.items():
            if not bool(reading.constant.all()):
                return None
            touched = (reading.ratio[1] - 1).abs() > (_LOWEST - 1) / 2
            if not bool(touched.any()):
                continue
            channel = _decode(reading.ratio[1], reading.ratio[2], len(rows))
            if not bool(touched.all()) or channel is None:
                return None
            maps[key] = channel
        return maps

    def _run(self, candidate: _Candidate, pieces: list[torch.Tensor]) -> _ProbeMode:
        factors = torch.ones(1 + 2 * len(pieces), candidate.size)
        for number, rows in enumerate(pieces):
            high, low = _factors(len(rows))
            factors[1 + 2 * number, rows] = high
            factors[2 + 2 * number, rows] = low
        mode = _ProbeMode(self._drawn, candidate, factors)
        forward = self._forward(len(factors))
        handle = None
        if candidate.kind == "norm":
            norm = self._drawn.get_submodule(candidate.path.rpartition(".")[0])
            handle = norm.register_forward_hook(lambda _m, _a, output: mode.scaled(output))
        try:
            with torch.no_grad(), mode:
                output = forward(self._drawn)
        finally:
            if handle is not None:
                handle.remove()
        mode.output_same = mode.compare(output).same()
        return mode


class _ProbeMode(NoiseMode):
    def __init__(self, block: nn.Module, candidate: _Candidate, factors: torch.Tensor) -> None:
        super().__init__(block, batch=len(factors))
        self._candidate, self._factors = candidate, factors
        self.readings: dict[Key, _Reading] = {}
        self.output_same = torch.ones(len(factors), dtype=torch.bool)

    def compare(self, x: torch.Tensor) -> _Reading:
        """x [..., I] of all sequences against the first one."""
        return _compare(self._rows(x))

    def scaled(self, y: torch.Tensor) -> torch.Tensor:
        """y [..., O] times the factors of its sequence."""
        return (self._rows(y) * self._factors[:, None]).reshape(y.shape)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """x as [B, rows, I]; ModelError if sequences share rows."""
        if x.numel() // x.shape[-1] % self.batch:
            raise ModelError(f"{tuple(x.shape)}: not as many rows for each of {self.batch}")
        return x.reshape(self.batch, -1, x.shape[-1])

    def routing(self, index_TK: torch.Tensor, weight_TK: torch.Tensor, num_experts: int) -> Routing:
        # Experts run the same code: what holds of the first holds of all.
        return super().routing(index_TK, weight_TK, num_experts)[:1]

    def product(
        self, use: Use, x: torch.Tensor, token_n: torch.Tensor | None
    ) -> torch.Tensor | None:
        self.readings[use.key] = self.compare(x)
        y = self.noise(x, use.shape[0])
        wanted = self._candidate.use
        return self.scaled(y) if wanted is not None and wanted.key == use.key else y


def _compare(x_BTI: torch.Tensor) -> _Reading:
    """Every sequence against the first: least-squares ratio per column, and whether it is exact.

    A column that is zero for all tokens cannot be judged by itself: it counts as unchanged where
    all the live ones are, else as not constant.
    """
    base = x_BTI[:1]
    power = (base * base).sum(1)
    ratio = (x_BTI * base).sum(1) / power.clamp_min(1e-30)
    largest = base.abs().amax(1)
    error = (x_BTI - ratio[:, None] * base).abs().amax(1)
    constant = error <= _TOLERANCE * largest * ratio.abs()
    live = power > 0
    ratio = torch.where(live, ratio, torch.ones_like(ratio))
    unchanged = ((ratio - 1).abs() < _TOLERANCE).all(1)
    judged = live.all(1) | (unchanged & live.any(1))
    return _Reading(ratio=ratio, constant=constant.all(1) & judged)


def _factors(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors [C] that together name a channel: its high and its low digit."""
    base = max(math.isqrt(max(channels - 1, 0)) + 1, 2)
    number = torch.arange(channels)
    digits = torch.stack([number // base, number % base]).double()
    high, low = (_LOWEST * _SPAN ** (digits / base)).float()
    return high, low


def _decode(high: torch.Tensor, low: torch.Tensor, channels: int) -> torch.Tensor | None:
    """The channels that the ratios name [I]; None if one lies between two factors."""
    base = max(math.isqrt(max(channels - 1, 0)) + 1, 2)
    digits = torch.log(torch.stack([high, low]) / _LOWEST) / math.log(_SPAN) * base
    nearest = digits.round()
    if bool(((digits - nearest).abs() > 0.2).any()):
        return None
    channel = (nearest[0] * base + nearest[1]).long()
    return channel if int(channel.min()) >= 0 and int(channel.max()) < channels else None


def _norms(drawn: nn.Module) -> list[_Candidate]:
    """Modules whose output is (offset + weight) * f(x) + bias with a vector as weight."""
    candidates = []
    for path, module in drawn.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 1 or len(list(module.children())) > 0:
            continue
        offset = _norm_offset(module, weight)
        if offset is not None:
            candidates.append(
                _Candidate(kind="norm", path=f"{path}.weight", size=len(weight), offset=offset)
            )
    return candidates


def _norm_offset(module: nn.Module, weight: nn.Parameter) -> float | None:
    """0 or 1, whichever the module adds to its weight; None if it is no such module."""
    bias = module._parameters.get("bias")
    size = len(weight)
    x = make_noise(4, size, seed=1)
    old_weight, old_bias = weight.detach().clone(), None if bias is None else bias.detach().clone()

    def output(w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        weight.copy_(w)
        if bias is not None and b is not None:
            bias.copy_(b)
        result = module(x)
        return result if isinstance(result, torch.Tensor) else torch.empty(0)

    with torch.no_grad():
        try:
            none = None if bias is None else torch.zeros_like(bias)
            first, second = old_weight, torch.flip(old_weight, [0]) * 2
            y, z = output(first, none), output(second, none)
            shifted = y if old_bias is None else output(first, old_bias) - old_bias
        # A module that takes more than hidden states fails in its own way: it is no plain norm.
        except Exception:
            return None
        finally:
            weight.copy_(old_weight)
            if bias is not None and old_bias is not None:
                bias.copy_(old_bias)
    if y.shape != x.shape or not torch.allclose(y, shifted, rtol=1e-4, atol=1e-5):
        return None
    for offset in (0.0, 1.0):
        if torch.allclose(z * (first + offset), y * (second + offset), rtol=1e-4, atol=1e-5):
            return offset
    return None


def _products(trace: BlockTrace) -> list[_Candidate]:
    """Every product of the block; of experts those of the first."""
    return [
        _Candidate(kind="rows", path=use.path, size=use.shape[0], use=use)
        for use in trace.uses
        if use.expert in (None, 0)
    ]


def _for_all_experts(group: Found, trace: BlockTrace) -> list[Found]:
    """The group with all experts as readers, or one copy per expert if it lies inside an expert."""
    # Layers may have several lists of experts, of different lengths.
    experts: dict[str, list[int]] = {}
    for use in trace.uses:
        if use.expert is not None:
            experts.setdefault(use.path, []).append(use.expert)
    inside = group.expert is not None
    copies = []
    for expert in sorted(experts[group.producer]) if inside else [None]:
        readers: list[Key] = []
        for path, number in group.readers:
            if number is None:
                readers.append((path, None))
            else:
                readers += [(path, e) for e in ([expert] if inside else sorted(experts[path]))]
        copies.append(
            Found(
                kind=group.kind,
                producer=group.producer,
                bias=group.bias,
                expert=expert,
                transposed=group.transposed,
                offset=group.offset,
                rows=group.rows,
                channel_map=group.channel_map,
                readers=tuple(readers),
            )
        )
    return copies
