"""Block types chosen tensor by tensor against the named mix of the same size.

    gguf_budget.py MODEL --calib FILE --eval-text FILE [--mixes q4_k_m q3_k_m]
For each mix the file that `--scheme MIX` writes, and the one that `--size` with as many bytes does,
by the same method on the same text.  Wanted: no larger, and a lower KL than the mix.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from judging import Judge, Quality

from quantkit.formats.gguf.container import MODEL_FILE
from quantkit.formats.gguf.file import read_gguf


@dataclass(frozen=True, kw_only=True)
class Row:
    """One file; `predicted_kl` is what the budget expected on calibration text."""

    name: str
    file_bytes: int
    types: dict[str, int]
    quality: Quality
    predicted_kl: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A mix and the budget of its size; `ratio` is of their KL, below 1 where the budget won."""

    mix: Row
    budget: Row
    ratio: float


def main() -> None:
    options = _options()
    judge = Judge.of(options)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:

        def written(name: str, *asked: str) -> Row:
            out = Path(folder) / name
            command = common.quantkit_command(
                options.model,
                out,
                *("--format", "gguf", *asked, *common.calibrated(options)),
            )
            done = common.run(command, threads=options.threads).check(command)
            told: dict[str, Any] = common.last_json(done.stdout)
            file = out / MODEL_FILE
            types = Counter(tensor.type for tensor in read_gguf(file).tensors.values())
            row = Row(
                name=name,
                file_bytes=file.stat().st_size,
                types=dict(sorted(types.items())),
                quality=judge(file),
                predicted_kl=(told.get("budget") or {}).get("predicted_kl"),
            )
            print(
                f"{name}: {row.file_bytes:,} bytes, KL {row.quality.kl_mean:.6f}", file=sys.stderr
            )
            return row

        found = []
        for mix in options.mixes:
            plain = written(mix, "--scheme", mix)
            chosen = written(f"budget of {mix}", "--size", str(plain.file_bytes))
            ratio = chosen.quality.kl_mean / plain.quality.kl_mean
            found.append(Comparison(mix=plain, budget=chosen, ratio=ratio))
    common.write_result(
        options.name,
        {
            "model": Path(options.model).name,
            "method": "gptq",
            "samples": options.samples,
            "seq_len": options.seq_len,
            "eval_tokens": options.eval_tokens,
            "comparisons": found,
        },
    )


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="gguf_budget")
    parser.add_argument("model")
    common.calibration_arguments(parser, samples=64, seq_len=256)
    common.evaluation_arguments(parser)
    parser.add_argument("--mixes", nargs="+", default=["q4_k_m", "q3_k_m"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
