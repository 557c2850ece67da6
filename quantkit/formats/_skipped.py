"""Modules that readers must leave alone, and what they would leave alone besides."""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.errors import FormatError
from quantkit.formats.format import PlannedWeight


def kept_modules(weights: Sequence[PlannedWeight], others: Sequence[TensorInfo]) -> list[str]:
    """Modules of kept weights outside experts, and of a model's other matrices: what to skip."""
    kept = {w.module: None for w in weights if w.scheme is None and not w.expert}
    modules = {weight.module for weight in weights}
    for info in others:
        module = info.name.removesuffix(".weight")
        if len(info.shape) == 2 and info.name != module and module not in modules:
            kept[module] = None
    return list(kept)


def kept_apart(
    weights: Sequence[PlannedWeight], others: Sequence[TensorInfo], *, substrings: bool = False
) -> list[str]:
    """`kept_modules`; FormatError if readers would skip a quantized one with them."""
    kept = kept_modules(weights, others)
    quantized = [weight for weight in weights if weight.scheme is not None]
    if (reason := skipped_too(kept, quantized, substrings=substrings)) is not None:
        raise FormatError(reason)
    return kept


def skipped_together(weights: Sequence[PlannedWeight], *, substrings: bool = False) -> str | None:
    """`skipped_too` of the kept and the quantized among these weights."""
    kept = [weight.module for weight in weights if weight.scheme is None and not weight.expert]
    quantized = [weight for weight in weights if weight.scheme is not None]
    return skipped_too(kept, quantized, substrings=substrings)


def skipped_too(
    skipped: Sequence[str], quantized: Sequence[PlannedWeight], *, substrings: bool = False
) -> str | None:
    """Which quantized module readers would skip with those to be skipped, and why; None if none.

    transformers matches the names to be skipped as patterns and as endings; vLLM takes AWQ's as
    `substrings`.
    """
    if not skipped:
        return None
    pattern = re.compile("|".join(f"(?:{name})(?:(?<=\\.)|(?=\\.|$))" for name in skipped))
    endings = tuple(skipped)
    for weight in quantized:
        if weight.expert:
            continue
        within = substrings and any(name in weight.module for name in skipped)
        if within or pattern.match(weight.module) or weight.module.endswith(endings):
            return (
                f"{weight.name}: readers would not take it for quantized, because a kept module's "
                f"name matches {weight.module!r} too; keep both, or use another format"
            )
    return None
