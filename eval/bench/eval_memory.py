"""Peak RSS of evaluating a large model against its 4-bit version under --max-ram.

    eval_memory.py MODEL --text FILE [--max-ram 1.5GiB] [--windows 4]
MODEL is a 2 GB random Llama of peers/random_llama.py, or any other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import common


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One evaluation; `tokens` were scored."""

    model: str
    original_bytes: int
    quantized_bytes: int
    max_ram_bytes: int
    peak_bytes: int
    within: bool
    tokens: int
    kl_mean: float
    seconds: float


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        out = Path(folder) / "out"
        quantize = common.quantkit_command(options.model, out, "--method", "rtn")
        common.run(quantize, threads=options.threads).check(quantize)
        command = [
            *(sys.executable, "-m", "quantkit", "eval", options.model, str(out)),
            *("--text", options.text, "--seq-len", str(options.seq_len)),
            *("--windows", str(options.windows), "--max-ram", options.max_ram),
            *("--out", str(Path(folder) / "report"), "--json"),
        ]
        finished = common.run(command, threads=options.threads).check(command)
        report = common.last_json(finished.stdout)
    candidate = report["candidates"][0]
    figures = Measured(
        model=Path(options.model).name,
        original_bytes=report["original"]["weight_bytes"],
        quantized_bytes=candidate["identity"]["weight_bytes"],
        max_ram_bytes=report["max_ram_bytes"],
        peak_bytes=finished.peak_bytes,
        within=finished.peak_bytes <= report["max_ram_bytes"],
        tokens=report["text"]["protocol"]["scored_tokens"],
        kl_mean=candidate["divergence"]["mean"],
        seconds=finished.seconds,
    )
    common.write_result(options.name, figures)


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="eval_memory")
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--max-ram", default="1.5GiB")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    return parser.parse_args()


if __name__ == "__main__":
    main()
