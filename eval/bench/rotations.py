"""KL divergence to the float32 model of methods with and without a rotation.

    rotations.py MODEL --calib FILE --eval-text FILE [--only rtn gptq] [--untie]
Every row is one checkpoint: a method at a number of bits, with nothing rotated, the heads of values
alone, or the stream too; the same text for all.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from judging import Judge, Quality

# Method, bits, and what follows the size of groups in a scheme's name.
METHODS: tuple[tuple[str, int, str], ...] = (
    ("rtn", 4, ""),
    ("rtn", 3, ""),
    ("gptq", 4, ""),
    ("gptq", 3, ""),
    ("best", 4, ""),
    ("best", 4, "_asym"),
    ("best", 3, ""),
    ("best", 3, "_asym"),
)
# What is rotated, and the options of `quantkit quantize` that do.
ROTATIONS: tuple[tuple[str, str], ...] = (
    ("nothing", ""),
    ("heads", "--set rotation=hadamard --set rotation.stream=false"),
    ("stream and heads", "--set rotation=hadamard"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint: how it was made and what it lost."""

    name: str
    method: str
    scheme: str
    rotated: str
    options: str
    quality: Quality


def main() -> None:
    options = _options()
    judge = Judge.of(options)
    rows = {}
    for method, bits, symmetry in METHODS:
        scheme = f"w{bits}a16_g{options.group_size}{symmetry}"
        if options.only and not {method, f"{method} {scheme}"} & set(options.only):
            continue
        for rotated, text in ROTATIONS:
            if options.rotated and rotated not in options.rotated:
                continue
            row = _measured(method, scheme, rotated, text, judge, options)
            rows[row.name] = row
            print(f"{row.name:<44}{row.quality.kl_mean:.5f}", file=sys.stderr)
    setting = common.setting(options)
    measured: dict[str, Any] = {"rows": list(rows.values())}
    if options.update:
        measured = common.with_earlier(options.name, setting, "rows", "name", rows)
    measured["ratios"] = _ratios(common.to_json(measured["rows"]))
    common.write_result(options.name, {**setting, **measured})


def _measured(
    method: str, scheme: str, rotated: str, text: str, judge: Judge, options: argparse.Namespace
) -> Row:
    if options.untie and "rotation=" in text and "stream=false" not in text:
        text += " --set rotation.untie=true"
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        out = Path(folder) / "out"
        command = common.quantkit_command(
            options.model,
            out,
            *("--method", method, "--scheme", scheme, *shlex.split(text)),
            *common.calibrated(options),
            "--allow-unreadable",
        )
        common.run(command, threads=options.threads).check(command)
        return Row(
            name=f"{method} {scheme}, {rotated}",
            method=method,
            scheme=scheme,
            rotated=rotated,
            options=text,
            quality=judge(out),
        )


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The divergence of each rotated row in parts of the one with nothing rotated."""
    plain = {
        (row["method"], row["scheme"]): row["quality"]["kl_mean"]
        for row in rows
        if row["rotated"] == "nothing"
    }
    return [
        {"name": row["name"], "kl_mean": row["quality"]["kl_mean"] / plain[key]}
        for row in rows
        for key in ((row["method"], row["scheme"]),)
        if row["rotated"] != "nothing" and key in plain
    ]


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="rotations")
    parser.add_argument("model")
    common.calibration_arguments(parser, samples=128, seq_len=256)
    common.evaluation_arguments(parser)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--only", nargs="+", help="methods, or METHOD SCHEME")
    parser.add_argument("--rotated", nargs="+", help="what is rotated (default: all of it)")
    parser.add_argument("--untie", action="store_true", help="the model's head is tied")
    parser.add_argument(
        "--update", action="store_true", help="replace these rows of the results, keep the others"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
