"""quantkit_eval: paired measurements of a quantized model against its original.

What stands here measures live models with any recent transformers; `quantkit_eval.evaluation`
streams checkpoints and writes reports.
"""

from __future__ import annotations

from quantkit_eval.errors import EvaluationError
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
