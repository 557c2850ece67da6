"""Peak RSS, as the operating system counts it, of quantizing a large model under --max-ram.

    memory.py MODEL --calib FILE [--max-ram 2GiB] [--methods rtn nf4 gptq ...]
MODEL is the 4 GB random Llama of peers/random_llama.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One method's run; predicted_bytes is what the plan said before the run."""

    method: str
    peak_bytes: int
    predicted_bytes: int
    max_ram_bytes: int
    within: bool
    seconds: float
    output_bytes: int


def main() -> None:
    options = _options()
    measured: list[Measured] = []
    for method in options.methods:
        measured.append(_measure(method, options))
        print(
            f"{method}: peak {measured[-1].peak_bytes / 2**30:.2f} GiB, "
            f"{measured[-1].seconds:.0f} s",
            file=sys.stderr,
        )
        # After each method: a run of hours that is cut short has measured something.
        setting = {
            "model": Path(options.model).name,
            "model_bytes": _weights(Path(options.model)),
            "max_ram_bytes": measured[0].max_ram_bytes,
            "samples": options.samples,
            "seq_len": options.seq_len,
            "threads": options.threads,
        }
        figures: dict[str, Any] = {"methods": measured}
        if options.update:
            new = {one.method: one for one in measured}
            figures = common.with_earlier(options.name, setting, "methods", "method", new)
        common.write_result(options.name, {**setting, **figures})


def _measure(method: str, options: argparse.Namespace) -> Measured:
    name, _, scheme = method.partition(":")
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        out = Path(folder) / "out"
        command = common.quantkit_command(
            options.model,
            out,
            *("--method", name, "--max-ram", options.max_ram),
            *(("--scheme", scheme) if scheme else ()),
            # Methods without calibration ignore these.
            *common.calibrated(options),
        )
        finished = common.run(command, threads=options.threads).check(command)
        summary = common.last_json(finished.stdout)["run"]
        return Measured(
            method=method,
            peak_bytes=finished.peak_bytes,
            predicted_bytes=summary["predicted_peak_bytes"],
            max_ram_bytes=summary["max_ram_bytes"],
            within=finished.peak_bytes <= summary["max_ram_bytes"],
            seconds=finished.seconds,
            output_bytes=_weights(out),
        )


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="memory")
    parser.add_argument("model")
    parser.add_argument("--max-ram", default="2GiB")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["rtn", "int8", "int8:w8a8_row", "nf4", "gptq", "awq", "smoothquant", "best"],
        help="method, or method:scheme",
    )
    parser.add_argument(
        "--update", action="store_true", help="replace these rows of the results, keep the others"
    )
    common.calibration_arguments(parser, samples=16, seq_len=512)
    return parser.parse_args()


if __name__ == "__main__":
    main()
