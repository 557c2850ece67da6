"""Random quantized weights and float64 references that the kernel tests share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def int_weight(
    shape: tuple[int, int], group: int | None, *, bits: int = 4, asym: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes uint8 [N, K], scales [N, G] that bfloat16 holds, zeros uint8 [N, G] or None."""
    rows, columns = shape
    groups = columns // (group or columns)
    draw = generator(seed)
    codes = torch.randint(0, 2**bits, shape, generator=draw, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=draw) * 0.02 + 0.01).bfloat16().float()
    zero = None
    if asym:
        zero = torch.randint(1, 2**bits, (rows, groups), generator=draw, dtype=torch.uint8)
    return codes, scale, zero


def float8_weight(
    shape: tuple[int, int], group: int | None, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, K] of e4m3, scales [N, G] that bfloat16 holds, and the weight in float64."""
    rows, columns = shape
    groups = columns // (group or columns)
    draw = generator(seed)
    codes = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x7E
    scale = (torch.rand(rows, groups, generator=draw) * 0.02 + 0.01).bfloat16().float()
    numbers = codes.view(torch.float8_e4m3fn).double()
    return codes, scale, numbers * scale.double().repeat_interleave(columns // groups, dim=1)


def decoded(codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int = 4) -> Tensor:
    """The weight in float64, straight from the definition."""
    per_group = codes.shape[1] // scale.shape[1]
    offset = torch.full_like(scale, 2 ** (bits - 1)) if zero is None else zero
    wide = [t.double().repeat_interleave(per_group, dim=1) for t in (scale, offset)]
    return (codes.double() - wide[1]) * wide[0]


def activations(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def expected(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias in float64."""
    out = x.double() @ weight.t()
    return out if bias is None else out + bias.double()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference in units of the largest wanted value; NaN stays NaN."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills the memory that launchers allocate with NaN: what a kernel leaves out shows."""
    plain = torch.empty

    def poisoned(*size: object, **options: object) -> Tensor:
        made: Tensor = plain(*size, **options)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr("torch.empty", poisoned)
