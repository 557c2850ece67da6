"""The demo: the embedded model quantized, measured before and after, and asked for a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from quantkit.demo import demo_path
from quantkit.generation import generate_text
from quantkit.job import Request, prepare
from quantkit.pipeline import run
from quantkit.recipe import load_recipe
from quantkit.summary import outcome_text

_SEQ_LEN = 256
_WINDOWS = 64
_EXAMPLES = 200
_TASKS = ("addition", "larger", "reverse", "sort")
_PROMPT = "The with statement is used to"


def run_demo(out: Path, method: str, say: Callable[[str], object]) -> None:
    """Quantizes the demo model to `out` and says what it cost."""
    # The one import of quantkit_eval: it is a package above this one.
    from quantkit_eval.command import run_evaluation
    from quantkit_eval.setting import EvaluationRequest

    model_path = demo_path()
    recipe = load_recipe(method, samples=128, seq_len=_SEQ_LEN)
    job = prepare(str(model_path), Request(recipe=recipe))
    outcome = run(job, out)
    say(outcome_text(job, outcome))
    request = EvaluationRequest(
        model=str(model_path),
        quantized=(str(out),),
        tasks=tuple(f"demo:{task}" for task in _TASKS),
        task_questions=_EXAMPLES,
        seq_len=_SEQ_LEN,
        windows=_WINDOWS,
        title="What quantization cost the demo model",
    )
    say("")
    say(run_evaluation(request, out.with_name(f"{out.name}-report")).text())
    say("")
    say(f"It writes: {generate_text(out, _PROMPT, 24)}")
