"""KL divergence and perplexity by `quantkit eval`, and by a script that shares no code with it.

    independent.py MODEL --text FILE [--methods rtn gptq awq int8] [--windows 40]
The script is `plain_figures`: transformers, torch, and its own decoding of compressed-tensors.
Exits with 1 if a figure differs by more than 1e-4, the perplexity's relatively.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What both ways measure of one quantized model; kl in nats, shares in 0..1."""

    kl: float
    perplexity_original: float
    perplexity_quantized: float
    same_top_token: float


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One method by both ways; `difference` is the larger of the KL's and the perplexities'."""

    method: str
    scheme: str
    quantkit: Figures
    plain: Figures
    difference: float


def plain_figures(model: str, quantized: str, text: str, seq_len: int, windows: int) -> Figures:
    """The ten-line script: logits of both models over the same windows, in float32."""
    ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)[:windows]
    p, q = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))
    q.load_state_dict({k: v.float() for k, v in decoded(Path(quantized)).items()}, strict=False)
    with torch.no_grad():
        pairs = [[m(row[None]).logits[0, :-1].log_softmax(-1) for m in (p, q)] for row in rows]
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in pairs])
    nll = [-torch.cat([x[k].gather(1, r[1:, None]) for x, r in zip(pairs, rows, strict=True)])
           for k in (0, 1)]  # fmt: skip
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs])
    return Figures(
        kl=kl.double().mean().item(),
        perplexity_original=math.exp(nll[0].double().mean().item()),
        perplexity_quantized=math.exp(nll[1].double().mean().item()),
        same_top_token=same.double().mean().item(),
    )


def decoded(folder: Path) -> dict[str, Tensor]:
    """A pack-quantized checkpoint's tensors, its weights as numbers [O, I]."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    for name in [n.removesuffix("_packed") for n in found if n.endswith("weight_packed")]:
        scale_OG = found.pop(f"{name}_scale").float()
        rows, columns = found.pop(f"{name}_shape").tolist()
        packed = found.pop(f"{name}_packed")
        bits = 32 * packed.shape[1] // columns
        codes_OI = _unpacked(packed, bits)[:, :columns]
        zero: Tensor | int = 2 ** (bits - 1)
        width = columns // scale_OG.shape[1]
        if (packed_zero := found.pop(f"{name}_zero_point", None)) is not None:
            zero = _unpacked(packed_zero.T, bits).T[:rows].repeat_interleave(width, 1)
        found[name] = (codes_OI - zero) * scale_OG.repeat_interleave(width, 1)
    return found


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Fields of `bits` bits of int32 words, the lowest first, along the last dimension."""
    parts = (packed[..., None] >> torch.arange(0, 32, bits)) & (2**bits - 1)
    return parts.flatten(-2)


def reported(report: dict[str, Any]) -> Figures:
    """The same figures out of a report.json with one quantized model."""
    measured = report["candidates"][0]["divergence"]
    return Figures(
        kl=measured["mean"],
        perplexity_original=report["perplexity"]["value"],
        perplexity_quantized=measured["perplexity"]["value"],
        same_top_token=measured["top1_agreement"],
    )


def difference(one: Figures, other: Figures) -> float:
    """The largest difference: absolute of the KL divergence, relative of the perplexities."""
    return max(
        abs(one.kl - other.kl),
        abs(one.perplexity_original / other.perplexity_original - 1),
        abs(one.perplexity_quantized / other.perplexity_quantized - 1),
    )


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    text = Path(options.text).read_text(encoding="utf-8")
    found = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        for method in options.methods:
            found.append(_agreement(method, Path(folder), text, options))
            print(f"{method}: differs by {found[-1].difference:.2g}", file=sys.stderr)
    figures = {
        "model": Path(options.model).name,
        "text": Path(options.text).name,
        "windows": options.windows,
        "seq_len": options.seq_len,
        "tolerance": TOLERANCE,
        "largest_difference": max(one.difference for one in found),
        "methods": found,
    }
    common.write_result(options.name, figures)
    sys.exit(int(any(one.difference > TOLERANCE for one in found)))


def _agreement(method: str, folder: Path, text: str, options: argparse.Namespace) -> Agreement:
    name, _, scheme = method.partition(":")
    out = folder / method.replace(":", "-")
    quantize = common.quantkit_command(
        options.model,
        out,
        *("--method", name, *(("--scheme", scheme) if scheme else ())),
        *("--calib", options.text, "--samples", "32", "--seq-len", str(options.seq_len)),
        *("--format", "compressed-tensors"),
    )
    common.run(quantize, threads=options.threads).check(quantize)
    evaluate = [
        *(sys.executable, "-m", "quantkit", "eval", options.model, str(out)),
        *("--text", options.text, "--seq-len", str(options.seq_len)),
        *("--windows", str(options.windows), "--prompts", "0", "--no-noise-floor"),
        *("--out", str(folder / "report"), "--json"),
    ]
    report = common.last_json(common.run(evaluate, threads=options.threads).check(evaluate).stdout)
    ours = reported(report)
    plain = plain_figures(options.model, str(out), text, options.seq_len, options.windows)
    return Agreement(
        method=name,
        scheme=report["candidates"][0]["identity"]["scheme"],
        quantkit=ours,
        plain=plain,
        difference=difference(ours, plain),
    )


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="independent")
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="text file")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["rtn", "rtn:w4a16_g128_asym", "gptq", "awq", "int8"],
        help="method, or method:scheme; weights only",
    )
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=256)
    return parser.parse_args()


if __name__ == "__main__":
    main()
