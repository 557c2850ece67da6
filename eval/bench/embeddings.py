"""What quantization costs a real embedding model: cosines and nearest neighbours, by method.

    python -m tools.real_embeddings --download FOLDER --out MODEL
    embeddings.py MODEL [--methods rtn awq ...]
Calibration and held-out text are the English of the standard library that the demo uses.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

from quantkit.demo.corpus import english_documents

# Method, and the scheme if it is not the method's own.
METHODS = ("rtn", "awq", "gptq", "best", "rtn:w8a16_g128", "rtn:w8a8_row")


def main() -> None:
    options = _options()
    model = Path(options.model)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        train = [json.dumps({"text": d.text}) for d in english_documents("train")]
        (folder / "train.jsonl").write_text("\n".join(train) + "\n", encoding="utf-8")
        heldout = "\n\n".join(d.text for d in english_documents("heldout"))
        (folder / "heldout.txt").write_text(heldout, encoding="utf-8")
        outs = [str(_quantize(model, named, folder, options)) for named in options.methods]
        command = [
            sys.executable, "-m", "quantkit", "eval", str(model), *outs,
            "--text", str(folder / "heldout.txt"), "--out", str(folder / "report"), "--json",
        ]  # fmt: skip
        report = common.last_json(
            common.run(command, threads=options.threads).check(command).stdout
        )
    figures = {
        "model": model.name,
        "calibration": f"{options.samples} x {options.seq_len} tokens",
        "pooling": report["pooling"],
        "texts": report["text"]["texts"],
        "noise": {"dtype": report["noise"]["dtype"], **report["noise"]["vectors"]},
        "methods": [_row(candidate) for candidate in report["candidates"]],
    }
    common.write_result(options.name, figures)


def _quantize(model: Path, named: str, folder: Path, options: argparse.Namespace) -> Path:
    method, _, scheme = named.partition(":")
    out = folder / named.replace(":", "-")
    command = common.quantkit_command(
        model, out, "--method", method, "--calib", str(folder / "train.jsonl"),
        "--samples", str(options.samples), "--seq-len", str(options.seq_len),
        *(["--scheme", scheme] if scheme else []), "--allow-unreadable",
    )  # fmt: skip
    finished = common.run(command, threads=options.threads).check(command)
    print(f"{named}: {finished.seconds:.0f} s", file=sys.stderr, flush=True)
    return out


def _row(candidate: dict[str, Any]) -> dict[str, Any]:
    identity = candidate["identity"]
    return {
        "method": identity["method"],
        "scheme": identity["scheme"],
        "bytes": identity["weight_bytes"],
        "bits_per_weight": identity["bits_per_weight"],
        **candidate["vectors"],
    }


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="embeddings")
    parser.add_argument("model", help="directory that tools/real_embeddings.py has written")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=128)
    return parser.parse_args()


if __name__ == "__main__":
    main()
