"""What a cache of keys and values in float8 costs, by what its scales are, and a packed one.

    cache.py MODEL --calib FILE --text FILE [--calibrations 16x128 128x256] [--windows 160]
The weights are of `int8`, which lose next to nothing.  Each checkpoint's scales hold twice the
largest number that calibration saw; beside them the same weights with scales that hold just that
(`absmax`), and with ones, which servers take where a file has none.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from quantkit_eval.command import run_evaluation
from quantkit_eval.setting import EvaluationRequest
from safetensors.torch import load_file, save_file

import quantkit

_LEAVES = (".k_scale", ".v_scale")
# What needs no scales from the checkpoint: no cache, and quantkit's own.
_WITHOUT = ("none", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint; KL divergence to the float32 model, in nats, with its 95 % interval."""

    cache: str
    scales: str
    calibration: str
    kl: float
    low: float
    high: float
    top1_agreement: float


def main() -> None:
    """Measures, prints and writes."""
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        rows = list(_rows(options, Path(scratch)))
    common.write_result(
        options.name,
        {
            "model": Path(options.model).name,
            "text": Path(options.text).name,
            "windows": options.windows,
            "seq_len": options.seq_len,
            "rows": rows,
        },
    )


def _rows(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    first = True
    for calibration in options.calibrations:
        samples, seq_len = (int(part) for part in calibration.split("x"))
        for cache in ("fp8", "fp8_head"):
            out = scratch / f"{cache}-{calibration}"
            quantkit.quantize(
                options.model,
                "int8",
                out=out,
                kv=cache,
                calibration=options.calib,
                samples=samples,
                seq_len=seq_len,
                progress=False,
            )
            for plain in _WITHOUT if first else ():
                yield _measured(out, plain, "", "", options, scratch)
            variants = {"twice absmax": out, "absmax": scaled(out, 0.5)}
            if cache == "fp8" and first:
                variants["ones"] = scaled(out, None)
            for scales, folder in variants.items():
                said = "" if scales == "ones" else calibration
                yield _measured(folder, cache, scales, said, options, scratch)
            first = False


def scaled(out: Path, factor: float | None) -> Path:
    """The checkpoint with its cache's scales times a factor, or ones."""
    copy = out.with_name(f"{out.name}-{factor}")
    shutil.copytree(out, copy)
    tensors = load_file(copy / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(_LEAVES):
            tensors[name] = torch.ones_like(tensor) if factor is None else tensor * factor
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def _measured(
    folder: Path,
    cache: str,
    scales: str,
    calibration: str,
    options: argparse.Namespace,
    scratch: Path,
) -> Row:
    request = EvaluationRequest(
        model=options.model,
        quantized=(str(folder),),
        text=options.text,
        seq_len=options.seq_len,
        windows=options.windows,
        prompts=0,
        noise_floor=False,
        kv=cache if cache in _WITHOUT else "stored",
    )
    with tempfile.TemporaryDirectory(dir=scratch) as work:
        done = run_evaluation(request, Path(work) / "report", progress=False)
    found = done.report.candidates[0].divergence
    row = Row(
        cache=cache,
        scales=scales,
        calibration=calibration,
        kl=found.mean,
        low=found.mean_interval.low,
        high=found.mean_interval.high,
        top1_agreement=found.top1_agreement,
    )
    print(f"{cache:<9}{scales:<14}{calibration:<9}{row.kl:.6f}", file=sys.stderr)
    return row


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="cache")
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibrations", nargs="+", default=["16x128", "128x256"])
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=160)
    return parser.parse_args()


if __name__ == "__main__":
    main()
