"""The embedded demo: a small trained model, the text it knows, and tasks with known answers."""

from __future__ import annotations

from quantkit.demo.corpus import Document, calibration_text, documents, heldout_text
from quantkit.demo.files import demo_path
from quantkit.demo.outliers import plant_outliers_, write_planted
from quantkit.demo.tasks import TASKS, Example, examples

__all__ = [
    "TASKS",
    "Document",
    "Example",
    "calibration_text",
    "demo_path",
    "documents",
    "examples",
    "heldout_text",
    "plant_outliers_",
    "write_planted",
]
