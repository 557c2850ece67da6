"""What rounding activations to int8 costs (backend cpu-int8), beside what W8A8 costs.

    rounded_input.py MODEL --text FILE [--methods rtn:w4a16_g32 ...] [--windows 64]
Each quantized checkpoint runs through its kernels: the reference in float32, backend cpu in
bfloat16, backend cpu-int8 in float32 and bfloat16.  W8A8 is a checkpoint of its own whose weights
are those of int8, so its activations' cost is the KL divergence between the two; so with FP8's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One way to multiply by a checkpoint's weights; KL divergences in nats, shares in 0..1.

    kl_to_exact compares with the same weights and float32 activations, kl_to_original with the
    unquantized model; top_same is how often the likeliest token is that of the exact product.
    """

    method: str
    way: str
    kl_to_exact: float
    kl_to_original: float
    top_same: float


@torch.no_grad()
def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    text = Path(options.text).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(options.model)(text, return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // options.seq_len * options.seq_len].view(-1, options.seq_len)
    rows = rows[: options.windows]
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    wanted = logits(original, rows)
    found: list[Cost] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for method in options.methods:
            out = _quantize(method, Path(scratch), options)
            exact = _logits_of(out, rows, "reference", torch.float32)
            ways = [("reference, float32", exact)]
            for backend, dtype in (
                ("cpu", torch.bfloat16),
                ("cpu-int8", torch.float32),
                ("cpu-int8", torch.bfloat16),
            ):
                name = f"{backend}, {str(dtype).removeprefix('torch.')}"
                ways.append((name, _logits_of(out, rows, backend, dtype)))
            found += [_cost(method, name, exact, ours, wanted) for name, ours in ways]
            print(*found[-len(ways) :], sep="\n", file=sys.stderr, flush=True)
        for method, eight in (("int8", "int8:w8a8_row"), ("fp8:fp8a16_row", "fp8:fp8a8_row")):
            weights = _logits_of(_quantize(method, Path(scratch), options), rows, "reference")
            both = _logits_of(_quantize(eight, Path(scratch), options), rows, "reference")
            way = f"{eight.partition(':')[2].removesuffix('_row')}, per token, float32"
            found.append(_cost(method, way, weights, both, wanted))
    figures = {
        "model": Path(options.model).name,
        "text": Path(options.text).name,
        "windows": len(rows),
        "seq_len": options.seq_len,
        "costs": found,
    }
    common.write_result(options.name, figures)


def logits(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """Log-probabilities float32 [windows, positions, vocabulary]."""
    return torch.cat([model(row[None]).logits.float().log_softmax(-1) for row in rows])


def _logits_of(out: Path, rows: Tensor, backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return logits(quantkit.load(out, backend=backend, dtype=dtype), rows)


def _cost(method: str, way: str, exact: Tensor, found: Tensor, original: Tensor) -> Cost:
    return Cost(
        method=method,
        way=way,
        kl_to_exact=_divergence(exact, found),
        kl_to_original=_divergence(original, found),
        top_same=(exact.argmax(-1) == found.argmax(-1)).double().mean().item(),
    )


def _divergence(wanted: Tensor, found: Tensor) -> float:
    return (wanted.exp() * (wanted - found)).sum(-1).double().mean().item()


def _quantize(method: str, folder: Path, options: argparse.Namespace) -> Path:
    name, _, scheme = method.partition(":")
    out = folder / method.replace(":", "-")
    if not out.exists():
        line = common.quantkit_command(
            options.model,
            out,
            *("--method", name, *(("--scheme", scheme) if scheme else ())),
            *("--calib", options.calib, "--samples", "64", "--seq-len", str(options.seq_len)),
        )
        common.run(line, threads=options.threads).check(line)
    return out


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="rounded_input")
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="text that calibration did not see")
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["rtn:w4a16_g32", "gptq", "awq", "int8", "nf4", "fp8:fp8a16_row"],
        help="method, or method:scheme",
    )
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    return parser.parse_args()


if __name__ == "__main__":
    main()
