"""KL divergence of every method, and of peers, to the float32 model, with seconds of each command.

    accuracy.py MODEL --calib FILE --eval-text FILE
        [--peer NAME=DIR] [--peer-run "NAME=PYTHON SCRIPT OPTIONS..."] [--reader NAME=PYTHON]
Calibration is --samples x --seq-len tokens from the start of the text, for every tool.  A peer's
checkpoint is read by transformers, in the interpreter that made it or that --reader names, or with
`--reader NAME=quantkit` by quantkit.  The peers of `RATIOS` go by the names they have there, as in
    --peer-run "AutoRound 200, 3 bit=PYTHON eval/bench/peers/autoround_quantize.py --bits 3"
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

# Label, then options of `quantkit quantize`.
METHODS: tuple[tuple[str, str], ...] = (
    ("rtn", "--method rtn"),
    ("rtn asymmetric", "--method rtn --scheme w4a16_g128_asym"),
    ("gptq", "--method gptq"),
    ("gptq, plain ranges", "--method gptq --set range=minmax"),
    ("gptq asymmetric", "--method gptq --scheme w4a16_g128_asym"),
    ("awq", "--method awq"),
    ("awq, no clip", "--method awq --set range=minmax"),
    ("best", "--method best"),
    ("best symmetric", "--method best --scheme w4a16_g128"),
    ("nf4", "--method nf4"),
    ("gptq_nf4", "--method gptq_nf4"),
    ("int8", "--method int8"),
    ("int8 w8a8", "--method int8 --scheme w8a8_row"),
    ("smoothquant", "--method smoothquant"),
    ("rtn 3 bit", "--method rtn --scheme w3a16_g128"),
    ("gptq 3 bit", "--method gptq --scheme w3a16_g128"),
    ("best 3 bit", "--method best --scheme w3a16_g128_asym"),
    ("best symmetric 3 bit", "--method best --scheme w3a16_g128"),
    ("best 2 bit", "--method best --scheme w2a16_g128_asym"),
    ("best symmetric 2 bit", "--method best --scheme w2a16_g128"),
)
# The peer that a method's divergence and seconds are held against, by label.
RATIOS = {
    "best": "AutoRound 200",
    "best symmetric": "AutoRound 200",
    "best 3 bit": "AutoRound 200, 3 bit",
    "best symmetric 3 bit": "AutoRound 200, 3 bit",
    "best 2 bit": "AutoRound 200, 2 bit",
    "best symmetric 2 bit": "AutoRound 200, 2 bit",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint: who made it, how, how long the whole command took, and what it lost."""

    name: str
    tool: str
    options: str
    seconds: float | None
    peak_bytes: int | None
    bits_per_weight: float | None
    quality: Quality


def main() -> None:
    options = _options()
    readers = common.named_paths(options.reader)
    judge = Judge.of(options)
    rows: list[Row] = []
    pythons = {name: python for name, python in readers.items() if python != "quantkit"}
    for name, text in METHODS:
        if not options.only or name in options.only:
            rows.append(_ours(name, text, judge, options))
            _show(rows[-1])
    for name, folder in common.named_paths(options.peer).items():
        rows.append(_peer(name, folder, readers.get(name), judge))
        _show(rows[-1])
    for name, text in common.named_paths(options.peer_run).items():
        python, script, *more = shlex.split(text)
        pythons[name] = python
        rows.append(_peer_run(name, python, script, more, readers.get(name), judge, options))
        _show(rows[-1])
    setting = common.setting(options)
    measured: dict[str, Any] = {"rows": rows}
    if options.update:
        new = {row.name: row for row in rows}
        measured = common.with_earlier(options.name, setting, "rows", "name", new)
    measured["ratios"] = _ratios(common.to_json(measured["rows"]))
    common.write_result(options.name, {**setting, **measured}, pythons=pythons)


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Divergence and seconds of the methods in `RATIOS` in parts of their peers'."""
    by_name = {row["name"]: row for row in rows}
    return [
        {
            "name": name,
            "peer": peer,
            "kl_mean": by_name[name]["quality"]["kl_mean"] / by_name[peer]["quality"]["kl_mean"],
            "seconds": by_name[name]["seconds"] / by_name[peer]["seconds"],
        }
        for name, peer in RATIOS.items()
        if name in by_name and peer in by_name
    ]


def _ours(name: str, text: str, judge: Judge, options: argparse.Namespace) -> Row:
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        out = Path(folder) / "out"
        command = common.quantkit_command(
            options.model,
            out,
            *shlex.split(text),
            *common.calibrated(options),
            "--allow-unreadable",
        )
        finished = common.run(command, threads=options.threads).check(command)
        summary = common.last_json(finished.stdout)
        return Row(
            name=name,
            tool="quantkit",
            options=text,
            seconds=finished.seconds,
            peak_bytes=finished.peak_bytes,
            bits_per_weight=summary["size"]["bits_per_quantized_weight"],
            quality=judge(out),
        )


def _peer(name: str, folder: str, reader: str | None, judge: Judge) -> Row:
    return Row(
        name=name,
        tool=name,
        options=Path(folder).name,
        seconds=None,
        peak_bytes=None,
        bits_per_weight=None,
        quality=_judged(judge, folder, reader),
    )


def _peer_run(
    name: str,
    python: str,
    script: str,
    more: list[str],
    reader: str | None,
    judge: Judge,
    options: argparse.Namespace,
) -> Row:
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        out = Path(folder) / "out"
        command = [
            *(python, script, options.model, str(out), "--calib-text", options.calib),
            *("--samples", str(options.samples), "--seq-len", str(options.seq_len), *more),
        ]
        finished = common.run(command, threads=options.threads).check(command)
        return Row(
            name=name,
            tool=name,
            options=common.shown([script, *more]),
            seconds=finished.seconds,
            peak_bytes=finished.peak_bytes,
            bits_per_weight=None,
            quality=_judged(judge, _checkpoint(out), reader or python),
        )


def _judged(judge: Judge, folder: Path | str, reader: str | None) -> Quality:
    if reader == "quantkit":
        return judge(folder)
    return judge(folder, python=reader, reader="transformers")


def _checkpoint(out: Path) -> Path:
    # AutoRound makes a folder of its own below the one it is given.
    found = [out, *sorted(path for path in out.iterdir() if path.is_dir())]
    return next(path for path in found if (path / "config.json").exists())


def _show(row: Row) -> None:
    taken = "" if row.seconds is None else f"{row.seconds:7.1f} s"
    measured = row.quality
    print(
        f"{row.name:<28}{measured.kl_mean:.5f} [{measured.kl_low:.5f}, {measured.kl_high:.5f}]"
        f"  {100 * measured.top1_agreement:.2f} % {taken}",
        file=sys.stderr,
    )


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="accuracy")
    parser.add_argument("model")
    common.calibration_arguments(parser, samples=128, seq_len=256)
    common.evaluation_arguments(parser)
    parser.add_argument("--only", nargs="+", help="labels of the methods to run (default: all)")
    parser.add_argument(
        "--update", action="store_true", help="replace these rows of the results, keep the others"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--peer-run", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--reader", action="append", default=[], metavar="NAME=PYTHON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
