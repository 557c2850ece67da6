"""Random weights for each scheme: what an op multiplies by, and the same numbers in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from quantkit_kernels.gpu import tuning
from quantkit_kernels.gpu.weight import Weight
from quantkit_kernels.ops import e2m1, fp8a8, fp8a16, nf4, w4a16, w4a16_experts, w8a8, w8a16
from quantkit_kernels.ops.codebook import E2M1, NF4
from torch import Tensor

SCHEMES = ("w4a16_g128", "w4a16_g128_asym", "w4a16_g64", "w4a16_g32", "w4a16_row")
SCHEMES += ("w8a16_row", "w8a16_g128", "w8a8_row", "nf4_b64")
SCHEMES += ("fp8a16_row", "fp8a16_g128", "fp8a8_row", "mxfp4a16", "nvfp4a16")
# Experts of `w4a16_experts`, and how many each token goes to.
EXPERTS, CHOSEN = 8, 2


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A weight [N, K] under one scheme.

    multiply  x [M, K] -> [M, N], by the op
    exact     the same in float64 from the definition; with a8, of quantized activations
    nbytes    what the op reads of the weight
    """

    multiply: Callable[[Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    nbytes: int


def schemes(device: torch.device) -> tuple[str, ...]:
    """Those that a device can run."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return tuple(name for name in SCHEMES if name != "fp8a8_row")
    return SCHEMES


def make(scheme: str, shape: tuple[int, int], device: torch.device, seed: int) -> Sample:
    """A random weight of shape (N, K) on a device."""
    draw = torch.Generator(device=device).manual_seed(seed)
    if scheme.startswith("fp8"):
        return _fp8(scheme, shape, device, draw)
    if scheme.startswith("nf4"):
        return _nf4(shape, device, draw)
    if scheme in ("mxfp4a16", "nvfp4a16"):
        return _e2m1(scheme, shape, device, draw)
    bits = int(scheme[1])
    size = scheme.split("_")[1]
    group = None if size == "row" else int(size[1:])
    codes = torch.randint(0, 2**bits, shape, generator=draw, device=device, dtype=torch.uint8)
    groups = 1 if group is None else shape[1] // group
    scale = torch.rand(shape[0], groups, generator=draw, device=device) * 0.01 + 0.005
    scale = scale.bfloat16().float()
    zero = None
    if scheme.endswith("asym"):
        zero = torch.randint(1, 16, scale.shape, generator=draw, device=device, dtype=torch.uint8)
    offset = torch.full_like(scale, 2 ** (bits - 1)) if zero is None else zero.float()

    def weight() -> Tensor:
        wide = [part.double().repeat_interleave(shape[1] // groups, 1) for part in (scale, offset)]
        return (codes.double() - wide[1]) * wide[0]

    if scheme.startswith("w8a8"):
        packed8, padded = w8a8.pack(codes, scale.view(-1))

        def exact(x: Tensor) -> Tensor:
            x_codes, x_scale = w8a8.quantize_rows(x)
            return (x_codes.double() * x_scale.double()) @ weight().t()

        def multiply8(x: Tensor) -> Tensor:
            if device.type == "cuda":
                found: Tensor = w8a8.product(x, packed8, padded, None, shape[0])
                return found
            from quantkit_kernels.gpu import w8a8 as w8a8_triton

            return w8a8_triton.matmul(x, packed8, padded, None, shape[0], _tile(x, shape, 0))

        return Sample(
            multiply=multiply8,
            exact=exact,
            nbytes=packed8.nbytes + padded.nbytes,
        )
    if bits == 8:
        eight = w8a16.pack(codes, scale, group, "triton")
        size8, words8, scale8 = eight.group_size, eight.packed, eight.scale
        return Sample(
            multiply=_multiply(
                lambda x: w8a16.product(x, words8, scale8, None, size8, shape[0]),
                {"kind": "int8", "packed": words8, "scale": scale8, "zero": None, "group": size8},
                shape,
            ),
            exact=lambda x: x.double() @ weight().t(),
            nbytes=words8.nbytes + scale8.nbytes,
        )
    four = w4a16.pack(codes, scale, zero, group, "triton")
    size4, words4, scale4, zero4 = four.group_size, four.packed, four.scale, four.zero
    return Sample(
        multiply=_multiply(
            lambda x: w4a16.product(x, words4, scale4, zero4, None, size4, shape[0]),
            {"kind": "int4", "packed": words4, "scale": scale4, "zero": zero4, "group": size4},
            shape,
        ),
        exact=lambda x: x.double() @ weight().t(),
        nbytes=sum(part.nbytes for part in (words4, scale4, zero4) if part is not None),
    )


def _multiply(
    call: Callable[[Tensor], Tensor], parts: dict[str, Any], shape: tuple[int, int]
) -> Callable[[Tensor], Tensor]:
    """The op on a GPU; on a CPU its kernels in the interpreter, dispatched by the same rule."""
    if parts["packed"].device.type == "cuda":
        return call

    def interpreted(x: Tensor) -> Tensor:
        from quantkit_kernels.gpu import fused as fused_triton

        weight = Weight(**parts)
        if x.shape[0] > tuning.decode_rows("w4a16"):
            decoded = fused_triton.dequantize(weight, shape, x.dtype, use_asm=False)
            return torch.nn.functional.linear(x, decoded)
        tile = _tile(x, shape, parts["group"])
        return fused_triton.matmul(x, weight, None, shape[0], tile, use_asm=False)

    return interpreted


def _tile(x: Tensor, shape: tuple[int, int], group: int) -> tuning.Tile:
    problem = tuning.Problem(
        op="w4a16",
        dtype=str(x.dtype),
        group=group,
        rows=shape[0],
        columns=shape[1],
        tokens=x.shape[0],
    )
    return tuning.heuristic(problem, 132, 90)


def _fp8(
    scheme: str, shape: tuple[int, int], device: torch.device, draw: torch.Generator
) -> Sample:
    group = None if scheme.endswith("row") else int(scheme.split("_g")[1])
    codes = torch.randint(0, 256, shape, generator=draw, device=device, dtype=torch.uint8)
    # The two codes that are no numbers.
    codes[(codes & 0x7F) == 0x7F] = 0
    groups = 1 if group is None else shape[1] // group
    scale = torch.rand(shape[0], groups, generator=draw, device=device) * 0.01 + 0.005
    scale = scale.bfloat16().float()

    def weight() -> Tensor:
        wide = scale.double().repeat_interleave(shape[1] // groups, 1)
        return codes.view(torch.float8_e4m3fn).double() * wide

    if scheme.startswith("fp8a16"):
        packed = fp8a16.pack(codes, scale, group, "triton")
        size, words, stored = packed.group_size, packed.packed, packed.scale
        return Sample(
            multiply=_multiply(
                lambda x: fp8a16.product(x, words, stored, None, size, shape[0]),
                {"kind": "fp8", "packed": words, "scale": stored, "zero": None, "group": size},
                shape,
            ),
            exact=lambda x: x.double() @ weight().t(),
            nbytes=words.nbytes + stored.nbytes,
        )
    both, padded = fp8a8.pack(codes, scale.view(-1))

    def exact(x: Tensor) -> Tensor:
        numbers, x_scale = fp8a8.quantize_rows(x)
        return (numbers.double() * x_scale.double()) @ weight().t()

    def multiply(x: Tensor) -> Tensor:
        if device.type == "cuda":
            found: Tensor = fp8a8.product(x, both, padded, None, shape[0])
            return found
        from quantkit_kernels.gpu import fp8 as fp8_triton

        return fp8_triton.matmul(x, both, padded, None, shape[0], _tile(x, shape, 0))

    return Sample(multiply=multiply, exact=exact, nbytes=both.nbytes + padded.nbytes)


def experts(shape: tuple[int, int], device: torch.device, seed: int) -> Sample:
    """Random 4-bit weights of EXPERTS experts; `multiply` gives CHOSEN rows for each row of x."""
    draw = torch.Generator(device=device).manual_seed(seed)
    size = (EXPERTS, *shape)
    codes = torch.randint(0, 16, size, generator=draw, device=device, dtype=torch.uint8)
    groups = shape[1] // 64
    scale = torch.rand(EXPERTS, shape[0], groups, generator=draw, device=device) * 0.01 + 0.005
    scale = scale.bfloat16().float()
    stacked = w4a16_experts.stack(
        w4a16.pack(codes[expert], scale[expert], None, 64, "triton") for expert in range(EXPERTS)
    )
    parts = (stacked.packed, stacked.scale, None, 64, shape[0])

    def route(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """(source, expert, offsets) of every row; the last expert gets none."""
        index = torch.arange(CHOSEN * tokens, device=device) % (EXPERTS - 1)
        expert, order = torch.sort(index, stable=True)
        edges = torch.arange(EXPERTS + 1, device=device)
        return order // CHOSEN, expert, torch.searchsorted(expert, edges, out_int32=True)

    def exact(x: Tensor) -> Tensor:
        source, expert, _ = route(x.shape[0])
        out = torch.empty(len(source), shape[0], dtype=torch.float64, device=device)
        for number in range(EXPERTS):
            wide = scale[number].double().repeat_interleave(64, 1)
            weight = (codes[number].double() - 8) * wide
            out[expert == number] = x[source[expert == number]].double() @ weight.t()
        return out

    def multiply(x: Tensor) -> Tensor:
        source, _, offsets = route(x.shape[0])
        if device.type == "cuda":
            found: Tensor = torch.ops.quantkit.w4a16_experts(x, source, offsets, *parts)
            return found
        from quantkit_kernels.gpu import experts as experts_triton

        tile = _tile(x, shape, 64)
        return experts_triton.matmul(x, source, offsets, *parts, tile, use_asm=False)

    return Sample(
        multiply=multiply, exact=exact, nbytes=stacked.packed.nbytes + stacked.scale.nbytes
    )


def _nf4(shape: tuple[int, int], device: torch.device, draw: torch.Generator) -> Sample:
    codes = torch.randint(0, 16, shape, generator=draw, device=device, dtype=torch.uint8)
    groups = shape[1] // nf4.BLOCK
    scale = torch.rand(shape[0], groups, generator=draw, device=device) * 0.1 + 0.01
    packed = nf4.pack(codes, scale, "triton")
    words, stored = packed.packed, packed.scale
    values = scale.double().repeat_interleave(nf4.BLOCK, 1)
    book = torch.tensor(NF4, device=device, dtype=torch.float64)
    return Sample(
        multiply=_multiply(
            lambda x: nf4.product(x, words, stored, *packed.nest, None, shape[0]),
            {"kind": "nf4", "packed": words, "scale": stored, "zero": None, "group": nf4.BLOCK},
            shape,
        ),
        exact=lambda x: x.double() @ (book[codes.long()] * values).t(),
        nbytes=words.nbytes + stored.nbytes,
    )


def _e2m1(
    scheme: str, shape: tuple[int, int], device: torch.device, draw: torch.Generator
) -> Sample:
    group, outer = (32, None) if scheme == "mxfp4a16" else (16, torch.tensor(0.01, device=device))
    codes = torch.randint(0, 16, shape, generator=draw, device=device, dtype=torch.uint8)
    count = (shape[0], shape[1] // group)
    scale = torch.exp2(torch.randint(-8, -4, count, generator=draw, device=device).float())
    if outer is not None:
        scale = scale * torch.randint(8, 16, count, generator=draw, device=device)
    packed = e2m1.pack(codes, scale, outer, group, "triton")
    words, stored, factor = packed.packed, packed.scale, packed.outer
    values = scale.double().repeat_interleave(group, 1) * (1.0 if outer is None else outer.double())
    book = torch.tensor(E2M1, device=device, dtype=torch.float64)
    return Sample(
        multiply=_multiply(
            lambda x: e2m1.product(x, words, stored, factor, None, group, shape[0]),
            {
                **{"kind": "e2m1", "packed": words, "scale": stored, "zero": None},
                **{"group": group, "outer": factor},
            },
            shape,
        ),
        exact=lambda x: x.double() @ (book[codes.long()] * values).t(),
        nbytes=words.nbytes + stored.nbytes,
    )
