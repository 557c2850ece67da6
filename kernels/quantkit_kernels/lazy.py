"""torch, imported when something of it is asked for.

The import takes a second of CPU time, which commands that read headers, and errors that need no
model, do without: modules on their way take `torch` from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name):
            import torch

            return getattr(torch, name)

    torch = _Torch()
