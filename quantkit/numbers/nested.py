"""Block scales in 8 bits: the second level of double quantization.

Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023, "QLoRA" (https://arxiv.org/abs/2305.14314), section
3; the 8-bit code is the dynamic tree of Dettmers 2015 (https://arxiv.org/abs/1511.04561).  Every
step gives the bits that bitsandbytes 0.50 gives on a CPU.

Shapes: N block scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit_kernels.lazy import torch

from quantkit.numbers.tensor import NestedScale

if TYPE_CHECKING:
    from torch import Tensor

NESTED_BLOCK = 256
# bitsandbytes looks codes up in a table over [-1, 1] with this many steps.
_LOOKUP_STEPS = 65535


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The 256 sorted values in (-1, 1] of the signed dynamic 8-bit code, float32.

    Seven decades; decade e has 2**e values spaced evenly, as midpoints, between 0.1 and 1 times
    10**(e - 6) on either side of zero; with 0 and 1.0 added.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += (10 ** (decade - 6) * middles).tolist()
        values += (-(10 ** (decade - 6)) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def nest(scale: Tensor) -> NestedScale:
    """Block scales (float32, any shape, taken in row-major order) in 8 bits, mean kept apart.

    Deviation from the paper, shared with bitsandbytes: the last block of 256 may be shorter.
    """
    flat = scale.reshape(-1).to(torch.float32)
    offset = flat.mean()
    centered = flat - offset
    count = centered.numel()
    padded = torch.nn.functional.pad(centered, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = padded.abs().amax(1)
    table = dynamic_map(flat.device)
    unit = padded * torch.where(absmax > 0, 1.0 / absmax, 0.0)[:, None]
    index = ((unit + 1.0) * 0.5 * _LOOKUP_STEPS + 0.5).to(torch.int64).clamp_(0, _LOOKUP_STEPS)
    steps = torch.arange(_LOOKUP_STEPS + 1, dtype=torch.float64, device=flat.device)
    lookup = torch.bucketize(
        steps / _LOOKUP_STEPS * 2 - 1, (table[1:].double() + table[:-1].double()) / 2
    )
    codes = lookup.to(torch.uint8)[index]
    codes = torch.where((absmax > 0)[:, None], codes, torch.zeros_like(codes))
    return NestedScale(
        codes=codes.reshape(-1)[:count],
        table=table,
        absmax=absmax,
        offset=offset,
        shape=tuple(scale.shape),
        block=NESTED_BLOCK,
    )
