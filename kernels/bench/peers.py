"""Products of torch itself and of other libraries on random weights, where they can run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Who else multiplies: `make(rows, columns, device)` gives a function of x in bfloat16.

    `least_rows` is the fewest rows of x that it takes.
    """

    make: Callable[[int, int, torch.device], Call]
    bytes_per_weight: float
    least_rows: int = 1


def available() -> dict[str, Peer]:
    """By name; they need a GPU."""
    if not torch.cuda.is_available():
        return {}
    # Scales of groups of 128 or blocks of 64 are counted.
    found = {
        "torch int4 g128": Peer(make=_tinygemm, bytes_per_weight=0.5 + 4 / 128),
        "torch _int_mm, x ready": Peer(make=_int_mm, bytes_per_weight=1, least_rows=17),
    }
    if torch.cuda.get_device_capability() >= (8, 9):
        found["torch _scaled_mm, x ready"] = Peer(make=_scaled_mm, bytes_per_weight=1)
    others = {
        "bitsandbytes": Peer(make=_nf4, bytes_per_weight=0.5 + 4 / 64),
        "torchao": Peer(make=_int4, bytes_per_weight=0.5 + 4 / 128),
        "gemlite": Peer(make=_gemlite, bytes_per_weight=0.5 + 4 / 128),
    }
    return found | {name: peer for name, peer in others.items() if importlib.util.find_spec(name)}


def _tinygemm(rows: int, columns: int, device: torch.device) -> Call:
    codes = torch.randint(0, 256, (rows, columns // 2), device=device, dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(columns // 128, rows, 2, device=device).bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales)


def _int_mm(rows: int, columns: int, device: torch.device) -> Call:
    weight = torch.randint(-127, 128, (rows, columns), device=device, dtype=torch.int8)
    ready = _Ready(lambda x: (x * 32).clamp(-127, 127).to(torch.int8))
    return lambda x: torch._int_mm(ready(x), weight.t())


def _scaled_mm(rows: int, columns: int, device: torch.device) -> Call:
    weight = torch.randn(rows, columns, device=device).to(torch.float8_e4m3fn)
    scale = torch.rand(1, rows, device=device)
    ready = _Ready(lambda x: x.to(torch.float8_e4m3fn))

    def call(x: Tensor) -> Tensor:
        rounded = ready(x)
        one = torch.ones(len(rounded), 1, device=device)
        found: Tensor = torch._scaled_mm(
            rounded, weight.t(), scale_a=one, scale_b=scale, out_dtype=torch.bfloat16
        )
        return found

    return call


class _Ready:
    """x as a peer wants it, made once: that is not what is timed."""

    def __init__(self, make: Call) -> None:
        self.make = make
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.last is None or self.last[0] is not x:
            self.last = (x, self.make(x))
        return self.last[1]


def _nf4(rows: int, columns: int, device: torch.device) -> Call:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    moved: Call = layer.to(device)
    return moved


def _int4(rows: int, columns: int, device: torch.device) -> Call:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16)
    # The packing of torch's own int4 kernel; the default one wants another library.
    quantize_(layer, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return layer


def _gemlite(rows: int, columns: int, device: torch.device) -> Call:
    from gemlite.helper import A16Wn

    codes = torch.randint(0, 16, (rows, columns), device=device, dtype=torch.uint8)
    scale = torch.rand(rows, columns // 128, device=device).bfloat16()
    zero = torch.full_like(scale, 8)
    found: Call = A16Wn(device=str(device)).from_weights(codes, scale, zero, 4, 128)
    return found
