"""The errors a user can cause: exit code 2, `VerifyError` 1; `UnsoundError`: 70, `StoppedError`
and `LostError`: 3.

QuantkitError
├── SchemeError        a scheme name or field that is not allowed
├── ShapeError         a weight's shape does not fit the scheme
├── CheckpointError    a file that is missing, damaged, refused or not a checkpoint
├── ModelError         a model type or structure that cannot be handled
├── CalibrationError   calibration data that is missing, too short or unusable
├── RecipeError        a recipe, rule or override that cannot be followed
├── FormatError        an on-disk format that cannot hold or serve the result
├── BudgetError        memory or disk too small for the plan
├── ResumeError        an unfinished output that belongs to another run
├── OutputError        an output directory that holds something else, or cannot be written
├── NumericsError      NaN or infinity in a weight or an activation
├── BackendError       a kernel backend that is unknown or cannot run here
├── VerifyError        a finished checkpoint that fails a check
├── UnsoundError       what a run wrote fails a check, before anything is finished
├── RanksError         processes that do not go together, or cannot find each other
├── LostError          another process of the run that ended or was lost
└── StoppedError       a run that ended at --until, to be gone on with
"""

from __future__ import annotations


class QuantkitError(Exception):
    """A mistake the user can mend; the message says what was given, what is allowed, what to do."""

    exit_code = 2


class SchemeError(QuantkitError):
    """A scheme name or field that is not allowed."""


class ShapeError(QuantkitError):
    """A weight whose shape does not fit the scheme."""


class CheckpointError(QuantkitError):
    """A file that is missing, damaged, refused or not a checkpoint."""


class ModelError(QuantkitError):
    """A model type or structure that cannot be handled."""


class CalibrationError(QuantkitError):
    """Calibration data that is missing, too short or unusable."""


class RecipeError(QuantkitError):
    """A recipe, rule or override that cannot be followed."""


class FormatError(QuantkitError):
    """An on-disk format that cannot hold or serve the result."""


class BudgetError(QuantkitError):
    """Memory or disk too small for the plan."""


class ResumeError(QuantkitError):
    """An unfinished output that belongs to another run."""


class OutputError(QuantkitError):
    """An output directory that holds something else, or cannot be written."""


class NumericsError(QuantkitError):
    """NaN or infinity in a weight or an activation."""


class BackendError(QuantkitError):
    """A kernel backend that is unknown or cannot run here."""


class VerifyError(QuantkitError):
    """A finished checkpoint that fails a check."""

    exit_code = 1


class UnsoundError(QuantkitError):
    """What a run wrote would not pass `verify`: a fault of quantkit's, or of the disk."""

    exit_code = 70


class StoppedError(QuantkitError):
    """A run that ended at its `--until`: no mistake, and the same command goes on."""

    exit_code = 3


class RanksError(QuantkitError):
    """Processes started to share a run that do not go together, or cannot find each other."""


class LostError(QuantkitError):
    """Another process of the run ended or was lost; its own code if it told one."""

    exit_code = 3

    def __init__(self, message: str, *, exit_code: int = 3) -> None:
        super().__init__(message)
        self.exit_code = exit_code
