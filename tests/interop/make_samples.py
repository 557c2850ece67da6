"""Single weights as quantkit packs them, beside the numbers it decodes them to.

    ROOT/samples/SCHEME-OxI-DTYPE.safetensors   the packed tensors, and `decoded` in DTYPE; if
        the scheme rounds its input, float32 inputs `x` and what it makes of them, `rounded`
        metadata: `group`, the config group in JSON

compressed-tensors' own compressors decode and encode them in test_compressed_tensors.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantkit.formats._compressed_groups import FLOATS
from quantkit.formats.registry import make_format
from quantkit.numbers.activations import InputRounding
from quantkit.numbers.scheme import Scheme

sys.path.insert(0, str(Path(__file__).parents[1]))
from format_samples import planned, quantized

SCHEMES: tuple[str, ...] = (
    *(
        f"w{bits}a16_{group}{symmetry}"
        for bits in range(2, 9)
        for group in ("g32", "row")
        for symmetry in ("", "_asym")
    ),
    *("w4a8_g32", "w4a8_row", "w4afp8_g32"),
    *FLOATS,
)
SHAPES = ((40, 96), (7, 32), (130, 160), (200, 256))
DTYPES = (torch.float32, torch.bfloat16)


def write_samples(root: Path) -> None:
    """One file for each scheme, shape and dtype that compressed-tensors holds."""
    folder = root / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = make_format("compressed-tensors")
    for name in SCHEMES:
        scheme = Scheme.parse(name)
        for rows, columns in SHAPES:
            weight = planned("m.weight", (rows, columns), scheme)
            if columns % (scheme.group_size or 1) or chosen.supports_shape(weight) is not None:
                continue
            for dtype in DTYPES:
                tensor = quantized(scheme, (rows, columns), dtype)
                config = chosen.config([weight], model_type="llama", dtype=dtype)
                packed = chosen.pack(weight, tensor)
                label = str(dtype).removeprefix("torch.")
                x = torch.randn(5, columns, generator=torch.Generator().manual_seed(rows))
                rounded = InputRounding(scheme=scheme, scale=tensor.input_scale)
                inputs = {"x": x, "rounded": rounded(x)} if scheme.activation_bits != 16 else {}
                save_file(
                    {k.removeprefix("m."): v for k, v in packed.items()}
                    | {"decoded": tensor.dequantize()}
                    | inputs,
                    folder / f"{name}-{rows}x{columns}-{label}.safetensors",
                    metadata={"group": json.dumps(config["config_groups"]["group_0"])},
                )
