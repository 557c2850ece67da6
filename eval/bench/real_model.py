"""The README's commands on a real language model: times, sizes, peaks, tasks and KL divergence.

    python -m tools.real_model --download FOLDER --out MODEL
    real_model.py MODEL [--methods awq int8]
Calibration and held-out text are the English of the standard library that the demo uses.  The
model's weights lie on a 4-bit grid already (see tools/real_model.py), so what this says about the
divergence of 4-bit methods is flattering: the result holds that sentence beside the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

from quantkit.demo.corpus import english_documents

CAVEAT = (
    "The weights of this model already lie on a 4-bit grid in blocks of 32, so the KL divergence "
    "of 4-bit methods on it is flattering and ranks nobody."
)
_CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
    "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Cuba": "Havana",
    "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest",
    "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Denmark": "Copenhagen",
    "Finland": "Helsinki", "Canada": "Ottawa", "Peru": "Lima", "Chile": "Santiago",
    "Kenya": "Nairobi", "Iran": "Tehran", "Iraq": "Baghdad", "Thailand": "Bangkok",
}  # fmt: skip
_OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "early": "late", "light": "dark", "open": "closed",
    "fast": "slow", "high": "low", "young": "old", "rich": "poor", "wet": "dry", "full": "empty",
    "happy": "sad", "hard": "soft", "long": "short", "strong": "weak", "thick": "thin",
    "true": "false", "left": "right", "buy": "sell", "win": "lose", "begin": "end",
}  # fmt: skip


_TASK_KEYS = ("task", "count", "right_original", "right_quantized", "lost", "gained")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the README; peak_bytes is the operating system's peak RSS."""

    command: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method on the model; `schemes` counts weights, KL is to the original in float32."""

    method: str
    schemes: dict[str, int]
    fitted: str | None
    bytes: int
    smaller: float
    bits_per_quantized_weight: float
    kl: float
    kl_interval: list[float]
    top_kept: float
    tasks: list[dict[str, Any]]
    continuation: str
    steps: list[Step]


def main() -> None:
    options = _options()
    model = Path(options.model)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        _write_texts(folder)
        rows = []
        for method in options.methods:
            rows.append(_measure(model, method, folder, options))
            print(rows[-1], file=sys.stderr, flush=True)
    figures = {
        "model": model.name,
        "caveat": CAVEAT,
        "threads": options.threads,
        "calibration": f"{options.samples} x {options.seq_len} tokens",
        "windows": options.windows,
        "methods": rows,
    }
    common.write_result(options.name, figures)


def _measure(model: Path, method: str, folder: Path, options: argparse.Namespace) -> Method:
    out, report = folder / f"out-{method}", folder / f"report-{method}"
    steps: list[Step] = []

    def step(*line: str) -> str:
        command = [sys.executable, "-m", "quantkit", *line]
        finished = common.run(command, threads=options.threads).check(command)
        steps.append(
            Step(command=line[0], seconds=finished.seconds, peak_bytes=finished.peak_bytes)
        )
        return finished.stdout

    how = ["--method", method, "--calib", str(folder / "my-text.jsonl")]
    how += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    planned = common.last_json(step("plan", str(model), *how, "--json"))
    made = common.last_json(
        step("quantize", str(model), *how, "--out", str(out), "--max-ram", "6GiB", "--json")
    )
    step("verify", str(out), "--against", str(model))
    evaluated = common.last_json(
        step(
            "eval", str(model), str(out), "--text", str(folder / "heldout.txt"),
            "--tasks", str(folder / "questions.jsonl"), "--windows", str(options.windows),
            "--seq-len", str(options.seq_len), "--out", str(report), "--json",
        )
    )  # fmt: skip
    continued = step("generate", str(out), "--prompt", "Once upon a time").strip()
    candidate = evaluated["candidates"][0]
    schemes = [t["scheme"] for t in planned["tensors"] if t["scheme"]]
    return Method(
        method=method,
        schemes={name: schemes.count(name) for name in sorted(set(schemes))},
        fitted=planned["fitted"],
        bytes=made["size"]["bytes"],
        smaller=made["size"]["source_bytes"] / made["size"]["bytes"],
        bits_per_quantized_weight=made["size"]["bits_per_quantized_weight"],
        kl=candidate["divergence"]["mean"],
        kl_interval=list(candidate["divergence"]["mean_interval"].values()),
        top_kept=candidate["divergence"]["top1_agreement"],
        tasks=[{key: task[key] for key in _TASK_KEYS} for task in candidate["tasks"]],
        continuation=continued,
        steps=steps,
    )


def _write_texts(folder: Path) -> None:
    """my-text.jsonl, heldout.txt and questions.jsonl, as a user of the README has them."""
    train = [json.dumps({"text": d.text}) for d in english_documents("train")]
    (folder / "my-text.jsonl").write_text("\n".join(train) + "\n", encoding="utf-8")
    heldout = "\n\n".join(d.text for d in english_documents("heldout"))
    (folder / "heldout.txt").write_text(heldout, encoding="utf-8")
    lines = [json.dumps(question) for question in _questions()]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _questions() -> Iterator[dict[str, object]]:
    """Questions with four choices each, the wrong ones from the answers of others."""
    for task, prompt, answers in (
        ("capitals", "The capital of {} is", _CAPITALS),
        ("opposites", "The opposite of the word {} is the word", _OPPOSITES),
    ):
        words = list(answers.values())
        for place, (word, answer) in enumerate(answers.items()):
            others = [words[(place + shift) % len(words)] for shift in (3, 7, 11)]
            choices = sorted(f" {choice}" for choice in (answer, *others))
            yield {
                "prompt": prompt.format(word), "choices": choices, "answer": f" {answer}",
                "task": task,
            }  # fmt: skip


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="real_model")
    parser.add_argument("model", help="directory that tools/real_model.py has written")
    parser.add_argument("--methods", nargs="+", default=["awq", "int8"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4)
    return parser.parse_args()


if __name__ == "__main__":
    main()
