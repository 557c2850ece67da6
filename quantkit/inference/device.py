"""Where to compute: a device by its name."""

from __future__ import annotations

import re

from quantkit_kernels.lazy import torch

from quantkit.errors import BackendError


def choose_device(name: str) -> str:
    """ "cpu", "cuda" or "cuda:N" as asked for; "auto" takes a GPU if torch sees one.

    Raises BackendError for any other name, and for a GPU that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", name)
    if match is None:
        raise BackendError(
            f"--device {name[:40]!r}: auto, cpu or cuda, or cuda:1 for the second GPU"
        )
    if name == "cpu":
        return name
    if not torch.cuda.is_available():
        raise BackendError(
            f"--device {name}: torch {torch.__version__} sees no GPU; use --device cpu"
        )
    if match[1] is not None and int(match[1]) >= torch.cuda.device_count():
        raise BackendError(
            f"--device {name}: torch sees {torch.cuda.device_count()} GPUs, counted from cuda:0"
        )
    return name
