"""4-bit layers of other libraries on random weights, for those that can be imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

# (rows, columns, device) -> a function of x
Make = Callable[[int, int, torch.device], Callable[[Tensor], Tensor]]


def available() -> dict[str, Make]:
    """Name -> maker of a layer, for the libraries that are installed; they need a GPU."""
    if not torch.cuda.is_available():
        return {}
    known: dict[str, Make] = {"bitsandbytes": _nf4, "torchao": _int4, "gemlite": _gemlite}
    return {name: make for name, make in known.items() if importlib.util.find_spec(name)}


def _nf4(rows: int, columns: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    moved: Callable[[Tensor], Tensor] = layer.to(device)
    return moved


def _int4(rows: int, columns: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = _linear(rows, columns, device)
    # The packing of torch's own int4 kernel; the default one wants another library.
    quantize_(layer, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return layer


def _gemlite(rows: int, columns: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    from gemlite.helper import A16Wn

    codes = torch.randint(0, 16, (rows, columns), device=device, dtype=torch.uint8)
    scale = torch.rand(rows, columns // 128, device=device).bfloat16()
    zero = torch.full_like(scale, 8)
    found: Callable[[Tensor], Tensor] = A16Wn(device=str(device)).from_weights(
        codes, scale, zero, 4, 128
    )
    return found


def _linear(rows: int, columns: int, device: torch.device) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16)
