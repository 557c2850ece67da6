"""Measures what weights that feed a state carried along the sequence lose, on trained hybrids.

    python -m tools.measure_recurrences --minutes 4 --out eval/results/recurrences.json

Trains the hybrids of `tools.toys` (at most 10 minutes of CPU in all), or takes those that lie in
--models.  Each is quantized with the recurrences treated as all other weights, in 8 bits, and kept;
and, as a contrast, with each other group of weights that share an input in 8 bits instead.  All are
compared with the original on held-out English, by where in the window a token stands.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit.formats.open import open_source
from quantkit.methods.recipe import KEEP, Recipe, load_recipe
from quantkit.methods.rules import Rule
from quantkit.model.causal import CausalModel
from quantkit.model.fitting import shared_inputs
from quantkit.numbers.scheme import Scheme
from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.session import run
from tools.toys import LENGTH, divergence, heldout_windows, log_probabilities, train

HYBRIDS = ("gated_delta", "mamba2")
_WINDOWS = 24
_METHODS = (("rtn", "w4a16_g64"), ("best", "w4a16_g64"))
# Tokens of a window from start to stop.
_PLACES = ((0, 32), (32, 128), (128, 256), (256, 384), (384, LENGTH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4.0, help="of CPU for each hybrid")
    parser.add_argument("--models", type=Path, help="hybrids lie here, or are written here")
    parser.add_argument("--out", type=Path, default=Path("eval/results/recurrences.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with _folder(arguments.models) as folder:
        found = [_hybrid(kind, folder / kind, arguments.minutes) for kind in HYBRIDS]
    names = ("quantkit", "torch", "transformers")
    result = {
        "command": f"python -m tools.measure_recurrences --minutes {arguments.minutes:g}",
        "versions": {name: version(name) for name in names},
        "windows": _WINDOWS,
        "length": LENGTH,
        "hybrids": found,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _hybrid(kind: str, model_dir: Path, minutes: float) -> dict[str, Any]:
    if not (model_dir / "training.json").exists():
        train(kind, minutes, model_dir)
    with torch.no_grad():
        return {
            "kind": kind,
            "training": json.loads((model_dir / "training.json").read_text()),
            **_measured(model_dir),
        }


def _measured(model_dir: Path) -> dict[str, Any]:
    ids = heldout_windows(AutoTokenizer.from_pretrained(model_dir), LENGTH, _WINDOWS)
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    wanted = log_probabilities(plain, ids)
    loss = -wanted[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()
    model = CausalModel.open(open_source(str(model_dir)))
    fed = {name for index in range(model.num_blocks) for name in model.fed(index)}
    groups: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for index in range(model.num_blocks):
        for shared in shared_inputs(model.weights(index)):
            groups.setdefault(shared[0].input, []).extend(ref.name for ref in shared)
            sizes |= {ref.name: ref.shape[0] * ref.shape[1] for ref in shared}
    runs = []
    for method, scheme in _METHODS:
        recipe = load_recipe(method, scheme=scheme, samples=48, seq_len=LENGTH)
        eight = dataclasses.replace(Scheme.parse(scheme), bits=8)

        of_fed = sum(sizes[n] for names in groups.values() if fed & {*names} for n in names)
        changes = [
            ("nothing", recipe, 0),
            ("recurrences kept", dataclasses.replace(recipe, recurrent=KEEP), of_fed),
        ]
        for key, names in groups.items():
            feeds = ", which feeds a state," if fed & {*names} else ""
            rules = tuple(Rule(match=name, scheme=eight) for name in names)
            changed = dataclasses.replace(recipe, rules=rules)
            changes.append((f"{key}{feeds} in 8 bits", changed, sum(sizes[n] for n in names)))
        for what, changed, parameters in changes:
            told = {"method": method, "scheme": scheme, "changed": what, "parameters": parameters}
            runs.append(told | _run(model_dir, changed, ids, wanted))
            print(json.dumps(runs[-1]), flush=True)
    return {
        "loss": round(loss, 4),
        "feeds_a_state": sorted({name.split(".", 3)[-1] for name in fed}),
        "runs": runs,
    }


def _run(model_dir: Path, recipe: Recipe, ids: Tensor, wanted: Tensor) -> dict[str, Any]:
    """The divergence (KL, nats per token) from the original, in all and by place."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        request = QuantizeOptions(
            recipe=recipe, device="cpu", allow_unreadable=True, calibration="demo"
        )
        job = prepare(str(model_dir), request)
        run(job, out, progress=False)
        found = log_probabilities(quantkit.load(out, dtype=torch.float32, backend="reference"), ids)
    kl_BT, told = divergence(wanted, found)
    by_place = {f"{a}-{b}": float(f"{kl_BT[:, a:b].mean():.4g}") for a, b in _PLACES}
    return {
        "bits_per_weight": round(_bits(job.plan.fates), 4),
        **told,
        "kl_by_place": by_place,
    }


def _bits(fates: Sequence[Any]) -> float:
    """Stored bits per parameter of the blocks' matrices."""
    some = [f for f in fates if f.block is not None and len(f.shape) == 2]
    return 8 * sum(f.num_bytes for f in some) / sum(f.parameters for f in some)


if __name__ == "__main__":
    main()
