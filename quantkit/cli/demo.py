"""The demo: the embedded model quantized five ways, rated in one report, and asked for a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from quantkit.cli.compare import DEFAULT_METHODS, run_compare
from quantkit.demo import demo_path
from quantkit.inference.generate import generate_text
from quantkit.methods.recipe import load_recipe
from quantkit.pipeline.options import QuantizeOptions

_SAMPLES, _SEQ_LEN, _WINDOWS = 128, 256, 80
_QUESTIONS = 200
_TASKS = ("addition", "larger", "reverse", "sort")
_PROMPT = "The with statement is used to"


def run_demo(out: Path, method: str, say: Callable[[str], object]) -> None:
    """Quantizes the demo model below `out`, says what each method costs, and where the report is.

    `method` is one more to compare, and the one whose model writes a line.
    """
    methods = DEFAULT_METHODS.split(",")
    if method not in methods:
        methods.append(method)
    evaluated = run_compare(
        str(demo_path()),
        out,
        methods=methods,
        bits=[],
        options=QuantizeOptions(samples=_SAMPLES, seq_len=_SEQ_LEN, device="cpu"),
        evaluation={
            "tasks": tuple(f"demo:{task}" for task in _TASKS),
            "task_questions": _QUESTIONS,
            "windows": _WINDOWS,
            # As auto would choose, without advice on speed.
            "backend": "cpu",
            "prompts": 2,
            "original_name": "the demo model",
        },
        title="What quantization cost the demo model",
    )
    quantized = out / f"{method}-{load_recipe(method).scheme.name}"
    say(f"{method} writes: {generate_text(quantized, _PROMPT, 24)}")
    say("")
    say(evaluated.text())
