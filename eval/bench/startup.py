"""Processor seconds before work begins: lists, headers, errors, and the plan of a 30-layer model.

    startup.py [--runs 5]
Each command runs several times, in turn with the others, in one thread; processor seconds are the
process's own, user and system, which other work on the machine moves little.  The model has the
shapes of SmolLM2-135M and random weights.  Exits with 1 if a median is over its goal.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import common

# SmolLM2-135M's.
_SHAPES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
# Processor seconds: of what needs no torch, of a container's header, of a plan beyond importing it.
_PLAIN, _CONTAINER, _PLANNED = 0.7, 1.0, 4.0
_TORCH = "import torch"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command line of quantkit, or code; with `beyond` the seconds of that other case are taken
    off before they are held against the goal."""

    name: str
    line: tuple[str, ...]
    code: int = 0
    goal_seconds: float | None = None
    beyond: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians of a case; `cpu_seconds` are the whole process's, `own_seconds` less what is taken
    off."""

    name: str
    command: str
    exit_code: int
    cpu_seconds: float
    lowest_cpu_seconds: float
    seconds: float
    own_seconds: float
    goal_seconds: float | None
    beyond: str | None
    within: bool


def main() -> None:
    options = _options()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        cases = _cases(Path(folder))
        runs: dict[str, list[common.Finished]] = {case.name: [] for case in cases}
        for number in range(options.runs + 1):
            for case in cases:
                finished = common.run([sys.executable, *case.line], threads=options.threads)
                if finished.returncode != case.code:
                    raise SystemExit(f"{case.name}: exit code {finished.returncode}")
                # The first run reads files that the others find in memory.
                if number:
                    runs[case.name].append(finished)
    rows = _rows(cases, runs)
    figures = {
        "runs": options.runs,
        "threads": options.threads,
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "model": "30 layers of SmolLM2-135M's shapes",
        "rows": rows,
    }
    common.write_result(options.name, figures)
    sys.exit(int(not all(row.within for row in rows)))


def _rows(cases: Sequence[Case], runs: dict[str, list[common.Finished]]) -> list[Measured]:
    cpu = {name: [each.cpu_seconds for each in found] for name, found in runs.items()}
    middle = {name: statistics.median(found) for name, found in cpu.items()}
    rows = []
    for case in cases:
        own = middle[case.name] - (0.0 if case.beyond is None else middle[case.beyond])
        rows.append(
            Measured(
                name=case.name,
                command=common.shown(["python", *case.line]),
                exit_code=case.code,
                cpu_seconds=middle[case.name],
                lowest_cpu_seconds=min(cpu[case.name]),
                seconds=statistics.median(each.seconds for each in runs[case.name]),
                own_seconds=own,
                goal_seconds=case.goal_seconds,
                beyond=case.beyond,
                within=case.goal_seconds is None or own <= case.goal_seconds,
            )
        )
    return rows


def _cases(folder: Path) -> list[Case]:
    """All cases, with the model and the outputs that they look at made."""
    from quantkit.demo.files import demo_path

    demo, model, out = str(demo_path()), str(_random_model(folder / "model")), folder / "out"
    for name, more in (("safetensors", ()), ("gguf", ("--format", "gguf"))):
        line = common.quantkit_command(demo, folder / name, "--method", "rtn", *more)
        common.run(line, threads=1).check(line)
    gguf = next((folder / "gguf").glob("*.gguf"))

    def case(name: str, *line: str, goal: float | None = _PLAIN, code: int = 0) -> Case:
        return Case(name=name, line=("-m", "quantkit", *line), goal_seconds=goal, code=code)

    def planned(method: str, *more: str) -> Case:
        return Case(
            name=f"plan --method {method}",
            line=("-m", "quantkit", "plan", model, "--method", method, *more),
            goal_seconds=_PLANNED,
            beyond=_TORCH,
        )

    quantize = ("quantize", model, "--out", str(out))
    return [
        Case(name=_TORCH, line=("-c", _TORCH)),
        Case(name="import quantkit", line=("-c", "import quantkit")),
        case("--help", "--help"),
        case("methods", "methods"),
        case("formats", "formats"),
        case("inspect", "inspect", str(folder / "safetensors")),
        case("inspect a GGUF file", "inspect", str(gguf), goal=_CONTAINER),
        case("an unknown method", *quantize, "--method", "none", code=2),
        case("an unknown scheme", *quantize, "--scheme", "w9", code=2),
        case("a model that is not there", "plan", str(folder / "nowhere"), code=2),
        # What fits is known once the model is.
        Case(
            name="a group size that does not fit",
            line=("-m", "quantkit", *quantize, "--method", "rtn", "--scheme", "w4a16_g100"),
            code=2,
            beyond=_TORCH,
        ),
        planned("rtn"),
        planned("gptq", "--samples", "8", "--seq-len", "256"),
        planned("awq", "--samples", "8", "--seq-len", "256"),
    ]


def _random_model(directory: Path) -> Path:
    """The model, with the embedded demo's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from quantkit.demo.files import demo_path

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_SHAPES)).to(torch.bfloat16)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_path() / name, directory / name)
    return directory


def _options() -> argparse.Namespace:
    parser = common.arguments(__doc__, name="startup", threads=1)
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
