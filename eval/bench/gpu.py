"""Quantizing on a GPU: the demo model against the CPU's result, then a random 8 B Llama, timed.

    PYTHONPATH=.:eval:kernels python3 eval/bench/gpu.py --json FILE [--only agree speed]
        [--methods gptq awq best rtn:nvfp4a16] [--layers 32] [--deadline SECONDS]

A method is NAME or NAME:SCHEME.  `agree` quantizes the model that quantkit carries on both devices
and compares what the results lose; `speed` writes a random model of the 8 B Llama's shapes and
quantizes it, method by method, imports not counted.  What would run past the deadline is stopped at
a block's end, and says how many blocks it did.  The file is whole at any time.  Without a GPU,
`--self-test` runs the same code with a tiny model on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import common

sys.path.append(str(common.ROOT / "kernels" / "bench"))
from deadline import Report

_RANDOM = Path(__file__).parent / "peers" / "random_llama.py"
STAGES = ("agree", "speed")
METHODS = ("gptq", "awq", "rtn:nvfp4a16", "best")
# Arguments of random_llama.py: the shapes of an 8 B Llama, and of one that a CPU is done with.
EIGHT_BILLION = {
    "hidden": 4096,
    "intermediate": 14336,
    "heads": 32,
    "kv-heads": 8,
    "vocab": 128256,
}
TINY = {"hidden": 256, "intermediate": 640, "heads": 4, "kv-heads": 2, "vocab": 2304}
# How far losses of the two devices may lie apart: they add up in different orders.
AGREEMENT = 0.05
# What bfloat16 activations lose of the demo model by themselves, and more.
ROUNDED = 0.002
# Seconds that a run needs to end after its last block.
_CLOSING = 10


def main() -> None:
    """Runs what was asked for; exits 1 if a run failed or the devices do not agree."""
    options = _options()
    device = "cpu" if options.self_test else "cuda"
    report = Report(
        options.json,
        options.deadline,
        command=common.shown(["python", *sys.argv]),
        versions=common.versions(sys.executable),
        hardware=common.hardware(),
        samples=options.samples,
        seq_len=options.seq_len,
    )
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        if "agree" in options.only:
            report.fill("agree", _agree(options.methods, scratch, device))
        if "speed" in options.only:
            model = scratch / "model"
            report.fields["model"] = _random_model(model, options, device)
            report.write()
            report.fill("speed", _speed(model, scratch, options, device, report))
    rows = [*report.fields.get("agree", ()), *report.fields.get("speed", ())]
    if wrong := [row for row in rows if row.get("wrong")]:
        sys.exit("\n".join(f"{row['method']} on {row['device']}: {row['wrong']}" for row in wrong))


def _agree(methods: Sequence[str], scratch: Path, device: str) -> Iterator[dict[str, Any]]:
    """The loss of the demo model quantized on the CPU and on the device, method by method.

    Decoded weights run in float32; the last row's are those of the device, multiplied by kernels.
    """
    import torch
    from quantkit_eval import measure_divergence, text_windows
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import quantkit
    from quantkit.demo import demo_path, heldout_text

    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    windows = text_windows(heldout_text(), tokenizer, seq_len=256, max_tokens=16384)
    original = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).to(device)
    for method in methods:
        name, _, scheme = method.partition(":")
        first: float | None = None
        for place, backend in (("cpu", "reference"), (device, "reference"), (device, "auto")):
            started = time.perf_counter()
            row: dict[str, Any] = {"method": method, "device": place, "backend": backend}
            try:
                out = scratch / f"agree-{place}"
                if backend == "reference":
                    quantkit.quantize(
                        str(demo_path()),
                        out=out,
                        method=name,
                        scheme=scheme or None,
                        device=place,
                        fresh=True,
                        samples=64,
                        seq_len=256,
                        progress=False,
                    )
                row["quantize_seconds"] = time.perf_counter() - started
                dtype = torch.float32 if backend == "reference" else torch.bfloat16
                loaded = quantkit.load(out, device=device, backend=backend, dtype=dtype)
                row["kl"] = measure_divergence(original, loaded, windows).mean
            except Exception as error:  # a failure is a result; the other methods follow
                row["wrong"] = "".join(traceback.format_exception(error)[-4:])
            else:
                first = row["kl"] if first is None else first
                if abs(row["kl"] - first) > AGREEMENT * first + ROUNDED * (backend == "auto"):
                    row["wrong"] = f"loses {row['kl']:.5f}, on the CPU {first:.5f}"
            row["seconds"] = time.perf_counter() - started
            print(common.to_json(row), flush=True)
            yield row


def _speed(
    model: Path, scratch: Path, options: argparse.Namespace, device: str, report: Report
) -> Iterator[dict[str, Any]]:
    text = scratch / "text.txt"
    _write_text(text, options.samples * options.seq_len)
    for method in options.methods:
        left = report.left() - _CLOSING
        row = _timed(method, model, text, scratch, options, device, left)
        print(common.to_json(row), flush=True)
        yield row


def _timed(
    method: str,
    model: Path,
    text: Path,
    scratch: Path,
    options: argparse.Namespace,
    device: str,
    left: float,
) -> dict[str, Any]:
    """One run: seconds, and those of its blocks and their phases; stopped after `left` seconds."""
    from quantkit.errors import StoppedError
    from quantkit.pipeline.job import prepare
    from quantkit.pipeline.options import QuantizeOptions
    from quantkit.pipeline.session import run

    trace, out = scratch / "trace.json", scratch / "out"
    name, _, scheme = method.partition(":")
    row: dict[str, Any] = {"method": method, "device": device, "whole": True}
    asked = QuantizeOptions(
        name,
        scheme=scheme or None,
        calibration=str(text),
        samples=options.samples,
        seq_len=options.seq_len,
        device=device,
    )
    deadline = None if left == float("inf") else time.monotonic() + left
    started = time.perf_counter()
    try:
        job = prepare(str(model), asked, out=out)
        row["prepare_seconds"] = time.perf_counter() - started
        run(job, out, fresh=True, progress=False, profile=trace, deadline=deadline)
    except StoppedError:
        row["whole"] = False
    except Exception as error:  # a failure is a result; the other methods follow
        row["wrong"] = "".join(traceback.format_exception(error)[-4:])
    row["seconds"] = time.perf_counter() - started
    if "wrong" in row:
        return row
    blocks, phases = _of_trace(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])
    row |= {"blocks": len(blocks), "seconds_per_block": statistics.median(blocks or [0.0])}
    row |= {"first_blocks": blocks[:3], "phases": phases}
    # Opening, checking and hashing what was written.
    row["finish_seconds"] = row["seconds"] - row["prepare_seconds"] - sum(phases.values())
    if row["whole"]:
        taken = json.loads((out / "quantkit" / "run.json").read_text(encoding="utf-8"))
        kept = ("predicted_seconds", "peak_rss_bytes", "predicted_peak_bytes", "peak_vram_bytes")
        row |= {key: taken[key] for key in kept if key in taken}
        told = json.loads((out / "quantkit" / "report.json").read_text(encoding="utf-8"))
        notes = [one["degraded"] for one in told["weights"] if one.get("degraded")]
        row |= {"weights_degraded": len(notes), "degraded": sorted(set(notes))[:3]}
    return row


def _of_trace(events: Sequence[Mapping[str, Any]]) -> tuple[list[float], dict[str, float]]:
    """Seconds of each block, and of each phase of all blocks without the phases inside it."""
    from quantkit.calibration.spans import Phase

    phases_known = get_args(Phase)
    blocks = [event["dur"] / 1e6 for event in events if event["name"].startswith("block ")]
    phases: dict[str, float] = {}
    # Events come in the order of their ends: what lies inside one has been seen before it.
    seen: list[tuple[float, float]] = []
    for event in events:
        start, length = event["ts"], event["dur"]
        inside = [span for span in seen if span[0] >= start]
        seen = [span for span in seen if span[0] < start] + [(start, length)]
        name = event["name"] if event["name"] in phases_known else "other"
        own = length - sum(span[1] for span in inside)
        phases[name] = phases.get(name, 0.0) + own / 1e6
    return blocks, phases


def _write_text(path: Path, tokens: int) -> None:
    """More text than that many tokens: a token of the demo's tokenizer is up to 16 bytes."""
    from quantkit.demo import calibration_text

    texts = list(calibration_text())
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < 16 * tokens:
            for text in texts:
                written += file.write(text + "\n")


def _random_model(out: Path, options: argparse.Namespace, device: str) -> dict[str, Any]:
    from quantkit.demo import demo_path

    shape = TINY if options.self_test else EIGHT_BILLION
    layers = 2 if options.self_test else options.layers
    started = time.perf_counter()
    command = [sys.executable, str(_RANDOM), str(out), "--tokenizer", str(demo_path())]
    command += ["--layers", str(layers), "--device", device]
    for name, size in shape.items():
        command += [f"--{name}", str(size)]
    finished = common.run(command).check(command)
    seconds = time.perf_counter() - started
    return {**shape, "layers": layers, **common.last_json(finished.stdout), "seconds": seconds}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--deadline", type=float, help="seconds in which all has ended")
    parser.add_argument("--scratch", help="directory for models (default: the system's)")
    parser.add_argument("--self-test", action="store_true")
    options = parser.parse_args()
    if options.self_test:
        options.samples, options.seq_len = min(options.samples, 4), min(options.seq_len, 128)
    return options


if __name__ == "__main__":
    main()
