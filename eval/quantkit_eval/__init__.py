"""quantkit_eval: paired measurements of a quantized model against its original.

What stands here measures live models with any recent transformers; `quantkit_eval.evaluation`
streams checkpoints and writes reports.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from quantkit_eval.errors import EvaluationError

if TYPE_CHECKING:
    from quantkit_eval.figures.divergence import Divergence
    from quantkit_eval.figures.live import (
        compare_tasks,
        measure_accuracy,
        measure_divergence,
        measure_perplexity,
    )
    from quantkit_eval.figures.perplexity import Perplexity
    from quantkit_eval.tasks.accuracy import TaskComparison
    from quantkit_eval.windows import Protocol, Windows, text_windows, token_windows

__all__ = [
    "Divergence",
    "EvaluationError",
    "Perplexity",
    "Protocol",
    "TaskComparison",
    "Windows",
    "compare_tasks",
    "measure_accuracy",
    "measure_divergence",
    "measure_perplexity",
    "text_windows",
    "token_windows",
]
_MODULE_OF = {
    "Divergence": "figures.divergence",
    "Perplexity": "figures.perplexity",
    "Protocol": "windows",
    "TaskComparison": "tasks.accuracy",
    "Windows": "windows",
    "compare_tasks": "figures.live",
    "measure_accuracy": "figures.live",
    "measure_divergence": "figures.live",
    "measure_perplexity": "figures.live",
    "text_windows": "windows",
    "token_windows": "windows",
}


def __getattr__(name: str) -> object:
    # torch takes a second to import; what is wrong with a limit shows before.
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
