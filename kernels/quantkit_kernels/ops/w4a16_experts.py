"""quantkit::w4a16_experts: 4-bit weights of many experts, each times the rows routed to it.

S sorted rows: those of expert e are offsets[e] to offsets[e + 1], and row s reads row source[s] of
x [T, K].  Rows that no expert has become zeros.  E experts, N rows of each weight; `packed`,
`scale` and `zero` are those of `w4a16.Packed`, stacked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from quantkit_kernels.ops import w4a16
from quantkit_kernels.ops.w4a16 import Packed

torch.library.define(
    "quantkit::w4a16_experts",
    "(Tensor x, Tensor source, Tensor offsets, Tensor packed, Tensor scale, Tensor? zero, "
    "int group_size, int out_features) -> Tensor",
)


def stack(weights: Iterable[Packed]) -> Packed:
    """The weights of all experts, of one shape and scheme, in tensors with E in front."""
    parts = list(weights)
    zeros = [part.zero for part in parts if part.zero is not None]
    return Packed(
        packed=torch.stack([part.packed for part in parts]),
        scale=torch.stack([part.scale for part in parts]),
        zero=torch.stack(zeros) if zeros else None,
        group_size=parts[0].group_size,
    )


def reference(
    x: Tensor,
    source: Tensor,
    offsets: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    """The op as a loop over experts, each decoded and multiplied in plain PyTorch."""
    out = x.new_zeros(source.shape[0], out_features)
    for expert in range(packed.shape[0]):
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
        own = None if zero is None else zero[expert]
        out[rows] = w4a16.reference(
            x[source[rows]], packed[expert], scale[expert], own, None, group_size, out_features
        )
    return out


def _cpu(
    x: Tensor,
    source: Tensor,
    offsets: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    if packed.dtype != torch.uint8:
        return reference(x, source, offsets, packed, scale, zero, group_size, out_features)
    out = x.new_zeros(source.shape[0], out_features)
    bounds = offsets.tolist()
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            out[start:stop] = torch.ops.quantkit.w4a16(
                x[source[start:stop]],
                packed[expert],
                scale[expert],
                None,
                None,
                group_size,
                out_features,
            )
    return out


def _cuda(
    x: Tensor,
    source: Tensor,
    offsets: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    from quantkit_kernels.gpu import experts as experts_triton
    from quantkit_kernels.gpu import tuning

    if source.shape[0] == 0:
        return x.new_empty(0, out_features)
    x_TK = x if x.stride(-1) == 1 else x.contiguous()
    problem = tuning.Problem(
        op="w4a16_experts",
        dtype=str(x.dtype).removeprefix("torch."),
        group=group_size,
        rows=out_features,
        columns=x.shape[1],
        tokens=source.shape[0],
    )
    tile = tuning.choose_experts(problem, packed.shape[0], x.device.index)
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device(x.device):
        return experts_triton.matmul(
            x_TK, source, offsets, packed, scale, zero, group_size, out_features, tile
        )


def _fake(
    x: Tensor,
    source: Tensor,
    offsets: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    out_features: int,
) -> Tensor:
    return x.new_empty(source.shape[0], out_features)


torch.library.impl("quantkit::w4a16_experts", "CPU", _cpu)
torch.library.impl("quantkit::w4a16_experts", "CUDA", _cuda)
torch.library.register_fake("quantkit::w4a16_experts", _fake)
