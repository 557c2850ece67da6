"""What quantization did to every weight and block, measured on the original's own activations.

Shapes: S sampled tokens, O out features, I in features, B sequences, T tokens, H hidden size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checks.against import Vectors
from quantkit.model.causal import CausalModel, WeightRef
from quantkit.model.decoded import Decoded
from quantkit.numbers.tensor import QuantizedTensor
from quantkit_eval.subjects import Subject

# Sampled tokens at every input; experts get fewer each, because there are many of them.
SAMPLED_TOKENS = 512
_EXPERT_TOKENS = 64
# Rounding to centroids shrinks an output by its relative error, clipping by somewhat more.
_GAIN_SLACK, _GAIN_PER_ERROR = 0.02, 1.5
# A channel and its quantized form correlate by 0.98 at 3 bits, strangers by about 0.  Where most
# channels correlate less than the second number, as at 2 bits, a single one tells nothing.
_CORRELATION, _USUAL_CORRELATION = 0.5, 0.95
# Channels with less than this share of the mean energy tell nothing.
_FAINT_ROW, _FAINT_COLUMN = 0.01, 0.1


@dataclass(frozen=True, kw_only=True)
class WeightCost:
    """What became of one quantized weight.

    block, role    where it is: for the heat map; experts share a role
    error          ‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖² on sampled tokens X of the evaluation text, transforms
                   divided out; over the weights alone for an expert that no token reached
    gain           <XWᵀ, XŴᵀ> / ‖XWᵀ‖²: 1 unless the weight as a whole is too large or too small
    recorded_error, clipped, degraded
                   from the quantization report: the error on the calibration text, the share of
                   weights beyond the grid's range, what had to be done instead of the recipe
    defect         what cannot come from rounding, or None
    """

    name: str
    block: int
    role: str
    scheme: str
    error: float
    gain: float
    recorded_error: float | None
    clipped: float | None
    degraded: str | None
    defect: str | None


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """Relative error of what one block adds to the hidden states, given the original's input."""

    index: int
    error: float


class Sampler:
    """Keeps evenly spaced tokens of every input of a block while it runs over `batches` batches."""

    def __init__(self, batches: int, experts: frozenset[str]) -> None:
        self._batches, self._experts = max(batches, 1), experts
        self._parts: dict[str, list[Tensor]] = {}

    def __call__(self, key: str, x_TI: Tensor) -> None:
        """Takes its share of the tokens x."""
        wanted = _EXPERT_TOKENS if key in self._experts else SAMPLED_TOKENS
        share = -(-wanted // self._batches)
        parts = self._parts.setdefault(key, [])
        left = wanted - sum(len(part) for part in parts)
        count = min(share, left, len(x_TI))
        if count > 0:
            step = len(x_TI) // count
            parts.append(x_TI[: count * step : step].to("cpu", torch.float32, copy=True))

    def rows(self) -> dict[str, Tensor]:
        """Input key -> sampled tokens float32 [S, I]."""
        return {key: torch.cat(parts) for key, parts in self._parts.items() if parts}


def expert_inputs(refs: tuple[WeightRef, ...]) -> frozenset[str]:
    """Keys of the inputs that only experts read."""
    return frozenset(ref.input for ref in refs if ref.role == "expert")


def weigh_block(
    model: CausalModel, block: nn.Module, index: int, samples: Mapping[str, Tensor], other: Subject
) -> Iterator[WeightCost]:
    """The cost of every weight of the original's block that `other` has quantized."""
    assert isinstance(other.source, Decoded) and other.recorded is not None
    recorded = {weight["name"]: weight for weight in other.recorded.get("weights", ())}
    for ref in model.weights(index):
        if ref.name not in other.source.stored:
            continue
        original_OI = model.weight(block, ref).to("cpu", torch.float32)
        quantized = other.source.quantized(ref.name)
        effective_OI = unfolded(ref.name, quantized, other.vectors)
        yield _cost(
            ref,
            original_OI,
            effective_OI,
            samples.get(ref.input),
            quantized.scheme.name,
            recorded.get(ref.name, {}),
        )


def unfolded(name: str, tensor: QuantizedTensor, vectors: Vectors) -> Tensor:
    """The weight float32 [O, I] with what transforms folded into it taken out again."""
    weight = tensor.dequantize(torch.float32)
    if (columns := vectors.columns(name)) is not None:
        weight /= columns
    if (rows := vectors.rows(name)) is not None:
        weight *= rows[:, None]
    return weight


def block_error(before_BTH: Tensor, after_BTH: Tensor, other_BTH: Tensor) -> float:
    """‖other - after‖² / ‖after - before‖²: the error of what the block adds to its input."""
    added = (after_BTH.float() - before_BTH.float()).square().sum(dtype=torch.float64)
    wrong = (other_BTH.float() - after_BTH.float()).square().sum(dtype=torch.float64)
    return float(wrong / added) if float(added) > 0 else 0.0 if float(wrong) == 0 else math.inf


def role_of(name: str) -> str:
    """A weight's place within its block: its name after the block's number, experts as `*`."""
    found = re.search(r"\.\d+\.(.*)", name)
    inner = found[1] if found else name
    return re.sub(r"\.\d+\.", ".*.", inner).removesuffix(".weight")


def _cost(
    ref: WeightRef,
    original_OI: Tensor,
    effective_OI: Tensor,
    sample_SI: Tensor | None,
    scheme: str,
    recorded: Mapping[str, Any],
) -> WeightCost:
    if sample_SI is None:
        # Without tokens every input channel counts the same.
        out_SO, got_SO = original_OI.T, effective_OI.T
        importance_I = torch.ones(original_OI.shape[1])
    else:
        out_SO, got_SO = sample_SI @ original_OI.T, sample_SI @ effective_OI.T
        importance_I = sample_SI.square().mean(0)
    size = out_SO.square().sum(dtype=torch.float64)
    wrong = (got_SO - out_SO).square().sum(dtype=torch.float64)
    shared = (got_SO * out_SO).sum(dtype=torch.float64)
    error = float(wrong / size) if float(size) > 0 else 0.0
    gain = float(shared / size) if float(size) > 0 else 1.0
    return WeightCost(
        name=ref.name,
        block=ref.block if ref.block is not None else -1,
        role=role_of(ref.name),
        scheme=scheme,
        error=error,
        gain=gain,
        recorded_error=recorded.get("error"),
        clipped=recorded.get("clipped"),
        degraded=recorded.get("degraded"),
        defect=_defect(original_OI, effective_OI, out_SO, got_SO, importance_I, error, gain),
    )


def _defect(
    original_OI: Tensor,
    effective_OI: Tensor,
    out_SO: Tensor,
    got_SO: Tensor,
    importance_I: Tensor,
    error: float,
    gain: float,
) -> str | None:
    """What is wrong with a weight beyond rounding: zeros, a wrong scale, foreign channels."""
    if not bool(effective_OI.any()) and bool(original_OI.any()):
        return "all its values are zero"
    if not math.isfinite(error):
        return "its output is not finite"
    row = _stranger(out_SO, got_SO, torch.ones(out_SO.shape[1]), _FAINT_ROW)
    if row is not None:
        return f"output channel {row} has nothing in common with the original's"
    column = _stranger(original_OI, effective_OI, importance_I, _FAINT_COLUMN)
    if column is not None:
        return f"input channel {column} has nothing in common with the original's"
    rounding = max(error - (gain - 1) ** 2, 0.0)
    if abs(gain - 1) > _GAIN_SLACK + _GAIN_PER_ERROR * rounding:
        return f"its output is {gain:.3f} times the original's: its scales are off"
    return None


def _stranger(mine_NK: Tensor, its_NK: Tensor, weight_K: Tensor, faint: float) -> int | None:
    """The first column that does not correlate with its original, leaving out the faint ones."""
    energy_K = mine_NK.square().sum(0) * weight_K
    loud = energy_K > faint * energy_K.mean()
    norms = mine_NK.norm(dim=0) * its_NK.norm(dim=0)
    correlation_K = (mine_NK * its_NK).sum(0) / norms.clamp_min(1e-30)
    if not bool(loud.any()) or float(correlation_K[loud].median()) < _USUAL_CORRELATION:
        return None
    bad = ((correlation_K < _CORRELATION) & loud).nonzero()
    return int(bad[0]) if len(bad) else None
