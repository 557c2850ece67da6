"""What each number format loses end to end, beside the peers' own files of the same kind.

    formats.py MODEL --calib FILE --text FILE --llmcompressor PYTHON --modelopt PYTHON
KL divergence to the float32 model.  All files of a scheme are made of the same text and read by
quantkit, whose decoders the interop suite holds against the owners' bit for bit; all are scored in
one pass over the same windows, so that differences are paired, window by window.  No time is
measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from cache import scaled
from quantkit_eval.figures.measure import measure
from quantkit_eval.figures.perplexity import window_sequences
from quantkit_eval.figures.statistics import Interval, clustered_mean
from quantkit_eval.figures.stream import ModelStream
from quantkit_eval.sequences import Workload, make_workload
from quantkit_eval.windows import text_windows
from transformers import AutoTokenizer

from quantkit.formats.open import open_source
from quantkit.model.decoded import Unpacked, open_decoded

_PEERS = Path(__file__).parent / "peers"
# The last of our options where the cache's scales are to be ones, as a server's are without any.
_ONES = "--ones"


@dataclass(frozen=True, kw_only=True)
class Made:
    """A checkpoint to be made: by which tool, and with which options of its command."""

    tool: str
    name: str
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A scheme: ours, of which the first is held against each peer, and theirs."""

    scheme: str
    files: tuple[Made, ...]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """All files of a scheme."""

    scheme: str
    files: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """KL divergence in nats per token, with its 95 % interval over windows.

    against       ours less the peer's KL, in peers' rows: mean and paired 95 % interval
    no_worse      whether that interval reaches zero or below
    """

    tool: str
    name: str
    kl: float
    low: float
    high: float
    top1_agreement: float
    bits_per_weight: float
    against: tuple[float, float, float] | None
    no_worse: bool | None


def _ours(name: str, *options: str) -> Made:
    return Made(tool="quantkit", name=name, options=options)


def _llmcompressor(name: str, method: str, preset: str, *options: str) -> Made:
    return Made(
        tool="llm-compressor", name=name, options=("--method", method, "--preset", preset, *options)
    )


def _modelopt(name: str, preset: str) -> Made:
    return Made(tool="ModelOpt", name=name, options=("--preset", preset))


def _kind(scheme: str, *files: Made) -> Kind:
    return Kind(scheme=scheme, files=files)


def _nearest(scheme: str) -> Made:
    return _ours("nearest, absmax", "--method", "fp8", "--scheme", scheme)


def _solved(scheme: str) -> Made:
    return _ours("gptq", "--method", "gptq", "--scheme", scheme)


KINDS = (
    _kind(
        "nvfp4a16",
        _solved("nvfp4a16"),
        _nearest("nvfp4a16"),
        _llmcompressor("nearest, absmax", "rtn", "NVFP4A16"),
        _llmcompressor("GPTQ", "gptq", "NVFP4A16"),
        _modelopt("max", "W4A16_NVFP4_CFG"),
    ),
    _kind(
        "nvfp4a4",
        _solved("nvfp4a4"),
        _nearest("nvfp4a4"),
        _llmcompressor("nearest, absmax", "rtn", "NVFP4", "--calibrated"),
        _llmcompressor("GPTQ", "gptq", "NVFP4"),
        _modelopt("max", "NVFP4_DEFAULT_CFG"),
    ),
    _kind(
        "mxfp4a16",
        _solved("mxfp4a16"),
        _nearest("mxfp4a16"),
        _llmcompressor("nearest, absmax", "rtn", "MXFP4A16"),
        _llmcompressor("GPTQ", "gptq", "MXFP4A16"),
    ),
    _kind(
        "mxfp8a16",
        _nearest("mxfp8a16"),
        _llmcompressor("nearest, absmax", "rtn", "MXFP8A16"),
    ),
    _kind(
        "mxfp8a8",
        _nearest("mxfp8a8"),
        _llmcompressor("nearest, absmax", "rtn", "MXFP8"),
        _modelopt("max", "MXFP8_DEFAULT_CFG"),
    ),
    _kind(
        "fp8a8_row",
        _nearest("fp8a8_row"),
        _llmcompressor("nearest, absmax", "rtn", "FP8_DYNAMIC"),
        _modelopt("max", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    ),
    _kind(
        "fp8a8_tensor",
        _nearest("fp8a8_tensor"),
        _llmcompressor("nearest, absmax", "rtn", "FP8", "--calibrated"),
        _modelopt("max", "FP8_DEFAULT_CFG"),
    ),
    _kind(
        "fp8a8_b128",
        _nearest("fp8a8_b128"),
        _llmcompressor("nearest, absmax", "rtn", "FP8_BLOCK"),
        _modelopt("max", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
    ),
    _kind(
        "w8a8_row",
        _solved("w8a8_row"),
        _ours("nearest, absmax", "--method", "int8", "--scheme", "w8a8_row"),
        _llmcompressor("nearest, absmax", "rtn", "W8A8"),
        _llmcompressor("GPTQ", "gptq", "W8A8"),
    ),
    _kind(
        "w4a8_g128",
        _solved("w4a8_g128"),
        _llmcompressor("GPTQ", "gptq", "W4A8"),
    ),
    _kind(
        "w4afp8_g128",
        _solved("w4afp8_g128"),
        _llmcompressor("GPTQ", "gptq", "W4AFP8"),
    ),
    _kind(
        "int8 weights, kv fp8",
        _ours("calibrated", "--method", "int8", "--kv", "fp8"),
        _ours("scales of 1", "--method", "int8", "--kv", "fp8", _ONES),
        _llmcompressor("calibrated", "rtn", "W8A16", "--cache", "--calibrated"),
    ),
)


def main() -> None:
    """Measures, prints and writes."""
    options = _options()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = text_windows(
        Path(options.text).read_text(encoding="utf-8"),
        tokenizer,
        seq_len=options.eval_seq_len,
        max_windows=options.windows,
    )
    workload = make_workload(window_sequences(windows))
    setting = {
        "model": Path(options.model).name,
        "calibration": {"samples": options.samples, "seq_len": options.seq_len},
        "evaluation": {
            "text": Path(options.text).name,
            "windows": len(workload.sequences),
            "seq_len": options.eval_seq_len,
        },
    }
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for kind in KINDS:
            if options.only and kind.scheme not in options.only:
                continue
            files = _measured(
                kind, workload, Path(scratch) / kind.scheme.replace(" ", "-"), options
            )
            found[kind.scheme] = common.to_json(Scored(scheme=kind.scheme, files=tuple(files)))
            # After each: hours of peers' runs are not lost with the last of them.
            measured: dict[str, Any] = {"schemes": list(found.values())}
            if options.update:
                measured = common.with_earlier(options.name, setting, "schemes", "scheme", found)
            common.write_result(
                options.name,
                {**setting, **measured},
                pythons={"llm-compressor": options.llmcompressor, "ModelOpt": options.modelopt},
            )


def _measured(
    kind: Kind, workload: Workload, scratch: Path, options: argparse.Namespace
) -> list[Row]:
    """All files of a kind, scored together."""
    paths = [_write(made, scratch / str(n), options) for n, made in enumerate(kind.files)]
    with ExitStack() as open_:

        def stream(name: str, path: Path | str, *, original: bool) -> ModelStream:
            source = open_source(path) if original else open_decoded(open_source(path))
            states = scratch / f"states-{name}"
            states.mkdir(parents=True)
            return open_.enter_context(ModelStream(name, source, workload, states))

        base = stream("original", options.model, original=True)
        others = [stream(str(n), path, original=False) for n, path in enumerate(paths)]
        found = measure(base, others, [None] * len(others), head_bytes=None, progress=False)
    rows = []
    for made, path, pair in zip(kind.files, paths, found.pairs, strict=True):
        mean, interval = _mean(pair.kl, workload)
        against = None
        if made.tool != "quantkit":
            change, around = _mean(found.pairs[0].kl.double() - pair.kl.double(), workload)
            against = change, around.low, around.high
        agreed = float((found.base.best == pair.scores.best).double().mean())
        rows.append(
            Row(
                tool=made.tool,
                name=made.name,
                kl=mean,
                low=interval.low,
                high=interval.high,
                top1_agreement=agreed,
                bits_per_weight=_bits(path),
                against=against,
                no_worse=None if against is None else against[1] <= 0,
            )
        )
        _show(kind.scheme, rows[-1])
    return rows


def _mean(kl_S: torch.Tensor, workload: Workload) -> tuple[float, Interval]:
    """Mean over tokens, and its interval over windows."""
    count = len(workload.sequences)
    sums = torch.stack([kl_S[workload.slice(k)].double().sum() for k in range(count)])
    return clustered_mean(sums, torch.tensor([s.count for s in workload.sequences]))


def _write(made: Made, out: Path, options: argparse.Namespace) -> Path:
    """The checkpoint; exits with its command's last lines if that fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    ones = _ONES in made.options
    if made.tool == "quantkit":
        command = common.quantkit_command(
            options.model,
            out,
            *(option for option in made.options if option != _ONES),
            *common.calibrated(options),
            "--allow-unreadable",
        )
    else:
        known = made.tool.replace("-", "").lower()
        script = _PEERS / f"{known}_quantize.py"
        sizes = ("--samples", str(options.samples), "--seq-len", str(options.seq_len))
        command = [
            *(getattr(options, known), str(script), options.model, str(out)),
            *("--calib-text", options.calib, *sizes, *made.options),
        ]
    common.run(command, threads=options.threads).check(command)
    return scaled(out, None) if ones else out


def _bits(path: Path) -> float:
    """Bits per quantized weight, scales included."""
    source = open_source(path)
    view = Unpacked.open(source)
    numbers = sum(weight.shape[0] * weight.shape[1] for weight in view.stored.values())
    tensors = {name for weight in view.stored.values() for name in weight.tensors}
    return 8 * sum(source.info(name).nbytes for name in tensors) / numbers


def _show(scheme: str, row: Row) -> None:
    held = "" if row.no_worse is None else "no worse" if row.no_worse else "WORSE"
    print(
        f"{scheme:<22}{row.tool:<16}{row.name:<18}{row.kl:.6f} [{row.low:.6f}, {row.high:.6f}]"
        f" {row.bits_per_weight:.2f} {held}",
        file=sys.stderr,
        flush=True,
    )


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="formats")
    parser.add_argument("model")
    common.calibration_arguments(parser, samples=64, seq_len=256)
    parser.add_argument("--text", required=True, help="file that no calibration reads")
    parser.add_argument("--windows", type=int, default=160)
    parser.add_argument("--eval-seq-len", type=int, default=256)
    parser.add_argument("--llmcompressor", required=True, help="a Python that has it")
    parser.add_argument("--modelopt", required=True, help="a Python that has it")
    parser.add_argument("--only", nargs="+", help="schemes")
    parser.add_argument("--update", action="store_true", help="keep the result's other schemes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
