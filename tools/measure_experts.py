"""Measures what statistics of all tokens do for the experts of a trained mixture.

    python -m tools.measure_experts --minutes 5 --out eval/results/experts.json

Trains the mixture of `tools.toys` (some minutes of CPU), or takes the one that lies in --model.  It
is quantized on more and more windows of text, with statistics of each expert from the tokens that
the router sends there and from all, and compared with the original on held-out English.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit.methods.recipe import load_recipe
from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.session import run
from tools.toys import (
    LENGTH,
    divergence,
    heldout_windows,
    log_probabilities,
    train,
    training_tokens,
)

_WINDOWS = 16
_METHODS = (("gptq", "w4a16_g64"), ("best", "w3a16_g64"))
# Calibration text, its windows and their length.  Tasks alone do not reach English's experts.
_TEXTS = (
    ("English and tasks", 1, 64),
    ("English and tasks", 1, 256),
    ("English and tasks", 4, 512),
    ("English and tasks", 32, 512),
    ("tasks", 4, 512),
    ("tasks", 32, 512),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="of CPU")
    parser.add_argument("--model", type=Path, help="the mixture lies here, or is written here")
    parser.add_argument("--out", type=Path, default=Path("eval/results/experts.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        model = arguments.model
        if model is None:
            model = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "mixture"
        if not (model / "training.json").exists():
            train("mixture", arguments.minutes, model)
        names = ("quantkit", "torch", "transformers")
        result = {
            "command": f"python -m tools.measure_experts --minutes {arguments.minutes:g}",
            "versions": {name: version(name) for name in names},
            "windows": _WINDOWS,
            "length": LENGTH,
            "training": json.loads((model / "training.json").read_text()),
            "runs": measured(model),
        }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def measured(model_dir: Path) -> list[dict[str, Any]]:
    """One record for each method, amount of text, and kind of statistics."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = heldout_windows(tokenizer, LENGTH, _WINDOWS)
    texts = {
        "English and tasks": training_tokens(tokenizer, seed=11),
        "tasks": training_tokens(tokenizer, seed=11, english=False),
    }
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    wanted = log_probabilities(plain, ids)
    runs = []
    for method, scheme in _METHODS:
        for kind, windows, length in _TEXTS:
            text = texts[kind]
            # From all over the text, which is in the order of its documents.
            step = (len(text) - length) // windows
            starts = range(step // 2, len(text) - length, step)
            some = torch.stack([text[s : s + length] for s in starts][:windows])
            for experts in ("routed", "all"):
                asked = {"method": method, "scheme": scheme, "experts": experts}
                asked |= {"calibration": kind, "windows": windows, "window_length": length}
                runs.append(asked | _run(model_dir, asked, some, ids, wanted))
                print(json.dumps(runs[-1]), flush=True)
    return runs


def _run(
    model_dir: Path, asked: dict[str, Any], text: Tensor, ids: Tensor, wanted: Tensor
) -> dict[str, Any]:
    """Divergence from the original (KL, nats per token) and how many tokens experts were sent."""
    recipe = load_recipe(
        asked["method"],
        scheme=asked["scheme"],
        experts=asked["experts"],
        samples=len(text),
        seq_len=text.shape[1],
    )
    with tempfile.TemporaryDirectory() as name:
        request = QuantizeOptions(
            recipe=recipe, device="cpu", allow_unreadable=True, calibration=text
        )
        out = Path(name) / "out"
        run(prepare(str(model_dir), request), out, progress=False)
        report = json.loads((out / "quantkit/report.json").read_bytes())
        found = log_probabilities(quantkit.load(out, dtype=torch.float32, backend="reference"), ids)
    _, told = divergence(wanted, found)
    tokens = [count for layer in report["experts"] for count in layer["tokens"]]
    return {
        **told,
        "experts_without_tokens": tokens.count(0),
        "least_tokens": min(tokens),
        "median_tokens": sorted(tokens)[len(tokens) // 2],
        "experts_in_all": len(tokens),
    }


if __name__ == "__main__":
    main()
