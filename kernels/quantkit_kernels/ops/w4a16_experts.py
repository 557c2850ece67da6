"""quantkit::w4a16_experts: 4-bit weights of many experts, each times the rows routed to it.

S sorted rows: those of expert e are offsets[e] to offsets[e + 1], and row s reads row source[s] of
x [T, K].  Rows that no expert has become zeros.  E experts, N rows of each weight; `packed`,
`scale` and `zero` are those of `w4a16.Packed`, stacked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.cpu.tiled import wide_dtype
from quantkit_kernels.ops import w4a16
from quantkit_kernels.ops.product import check_input
from quantkit_kernels.ops.w4a16 import Packed

_WEIGHT = "Tensor packed, Tensor scale, Tensor? zero"
torch.library.define(
    "quantkit::w4a16_experts",
    f"(Tensor x, Tensor source, Tensor offsets, {_WEIGHT}, int group_size, int out_features) "
    "-> Tensor",
)
# The gradient of the rows of x that were read, from that of the product.
torch.library.define(
    "quantkit::w4a16_experts_back",
    f"(Tensor grad, Tensor offsets, {_WEIGHT}, int group_size, int in_features) -> Tensor",
)


_one_expert = torch.ops.quantkit.w4a16_fixed.default


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
    _check(x, source, offsets, packed, group_size, out_features)
    if packed.dtype != torch.uint8:
        return reference(x, source, offsets, packed, scale, zero, group_size, out_features)
    out = x.new_zeros(source.shape[0], out_features)
    bounds = offsets.tolist()
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            out[start:stop] = _one_expert(
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

    _check(x, source, offsets, packed, group_size, out_features)
    if source.shape[0] == 0:
        return x.new_empty(0, out_features)
    x_TK = x if x.stride(-1) == 1 else x.contiguous()
    problem = tuning.problem_of(
        "w4a16_experts", x.dtype, group_size, out_features, x.shape[1], source.shape[0]
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
    _check(x, source, offsets, packed, group_size, out_features)
    return x.new_empty(source.shape[0], out_features)


def _check(
    x: Tensor, source: Tensor, offsets: Tensor, packed: Tensor, group_size: int, out_features: int
) -> None:
    columns = w4a16.columns(packed[0], group_size, out_features)
    check_input("w4a16_experts", x, packed.device, *columns)
    if x.ndim != 2 or not source.device == offsets.device == x.device:
        raise ValueError(
            f"quantkit::w4a16_experts: x is {list(x.shape)} on {x.device}, source on "
            f"{source.device}, offsets on {offsets.device}; allowed: two dimensions, one device"
        )


def _back(
    grad: Tensor,
    offsets: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    in_features: int,
) -> Tensor:
    """[S, K]: each row of the gradient [S, N] times its expert's weight, one expert at a time."""
    out = grad.new_zeros(grad.shape[0], in_features)
    dtype = wide_dtype(grad.dtype) if grad.device.type == "cpu" else grad.dtype
    for expert, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        if start < stop:
            weight = torch.ops.quantkit.w4a16_decode(
                packed[expert],
                scale[expert],
                None if zero is None else zero[expert],
                group_size,
                grad.shape[1],
                in_features,
                dtype,
            )
            out[start:stop] = grad[start:stop].to(dtype) @ weight
    return out


def _fake_back(
    grad: Tensor,
    offsets: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    in_features: int,
) -> Tensor:
    return grad.new_empty(grad.shape[0], in_features)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, source, *weight, group_size, _ = inputs
    ctx.save_for_backward(source, *weight)
    ctx.x_shape, ctx.group_size = x.shape, group_size


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    source, *weight = ctx.saved_tensors
    tokens, columns = ctx.x_shape
    rows = torch.ops.quantkit.w4a16_experts_back(grad, *weight, ctx.group_size, columns)
    # A token's experts are added up in float32.
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros(tokens, columns, dtype=wide, device=grad.device)
    return total.index_add(0, source, rows.to(wide)).to(grad.dtype), *[None] * 7


def _remember_back(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, *weight, ctx.group_size, _ = inputs
    ctx.save_for_backward(*weight)
    ctx.rows, ctx.out_features = grad.shape


def _gradient_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    every = torch.arange(ctx.rows, device=grad.device)
    rest = (*ctx.saved_tensors, ctx.group_size, ctx.out_features)
    return torch.ops.quantkit.w4a16_experts(grad, every, *rest), *[None] * 6


torch.library.impl("quantkit::w4a16_experts", "CPU", _cpu)
torch.library.impl("quantkit::w4a16_experts", "CUDA", _cuda)
torch.library.register_fake("quantkit::w4a16_experts", _fake)
torch.library.register_autograd("quantkit::w4a16_experts", _gradient, setup_context=_remember)
for _device in ("CPU", "CUDA"):
    torch.library.impl("quantkit::w4a16_experts_back", _device, _back)
torch.library.register_fake("quantkit::w4a16_experts_back", _fake_back)
torch.library.register_autograd(
    "quantkit::w4a16_experts_back", _gradient_back, setup_context=_remember_back
)
