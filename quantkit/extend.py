"""What quantkit promises to packages that extend it: names that stay where they are.

    from quantkit.extend import GroupRange, Needs, Scheme, Stats

The rooms behind these names may be rearranged; this face is not.  Modules that pages of earlier
releases named (`quantkit.parts`, `quantkit.scheme`, ...) go on being importable for one release,
with a DeprecationWarning: `MOVED` says where each lies now.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit.checkpoint.safetensors import TensorInfo
    from quantkit.checkpoint.source import Source
    from quantkit.errors import (
        CheckpointError,
        FormatError,
        QuantkitError,
        RecipeError,
        SchemeError,
        ShapeError,
    )
    from quantkit.formats._skipped import skipped_too
    from quantkit.formats.format import (
        Format,
        FormatReader,
        PlannedWeight,
        StoredWeight,
        check_divides,
        check_stored,
        named_as_weight,
    )
    from quantkit.formats.stored import round_scale, stored_scale
    from quantkit.methods.extent import (
        Extent,
        aligned,
        chunks,
        extent_of,
        group_range,
        scale_and_zero,
    )
    from quantkit.methods.parts import (
        GroupRange,
        Range,
        Reader,
        Retargeted,
        Rotation,
        Rounded,
        Rounding,
        Target,
        Transform,
    )
    from quantkit.methods.rounding.nearest import nearest_codes
    from quantkit.methods.search import both_ends, search_range, shrink_factors
    from quantkit.methods.stats import Needs, Stats
    from quantkit.numbers.grid import grid_of
    from quantkit.numbers.scheme import Scheme
    from quantkit.numbers.tensor import PlainScale, QuantizedTensor, decode_rows

__all__ = [
    "CheckpointError",
    "Extent",
    "Format",
    "FormatError",
    "FormatReader",
    "GroupRange",
    "Needs",
    "PlainScale",
    "PlannedWeight",
    "QuantizedTensor",
    "QuantkitError",
    "Range",
    "Reader",
    "RecipeError",
    "Retargeted",
    "Rotation",
    "Rounded",
    "Rounding",
    "Scheme",
    "SchemeError",
    "ShapeError",
    "Source",
    "Stats",
    "StoredWeight",
    "Target",
    "TensorInfo",
    "Transform",
    "aligned",
    "both_ends",
    "check_divides",
    "check_stored",
    "chunks",
    "decode_rows",
    "extent_of",
    "grid_of",
    "group_range",
    "named_as_weight",
    "nearest_codes",
    "round_scale",
    "scale_and_zero",
    "search_range",
    "shrink_factors",
    "skipped_too",
    "stored_scale",
]

# Where the names above lie; looked up when one is asked for: torch takes a second to import.
_HOMES = (
    "errors",
    "numbers.scheme",
    "numbers.grid",
    "numbers.tensor",
    "checkpoint.safetensors",
    "checkpoint.source",
    "methods.parts",
    "methods.stats",
    "methods.extent",
    "methods.rounding.nearest",
    "methods.search",
    "formats.format",
    "formats._skipped",
    "formats.stored",
)

# Old module below `quantkit` -> where it lies now.  To be deleted with version 0.3.
MOVED: Mapping[str, str] = {
    "api": "pipeline.api",
    "extent": "methods.extent",
    "format": "formats.format",
    "grid": "numbers.grid",
    "hf": "inference.hf",
    "loading": "inference.load",
    "nearest": "methods.rounding.nearest",
    "nested": "numbers.nested",
    "parts": "methods.parts",
    "ranges": "methods.ranges",
    "readers": "formats.readers",
    "recipe": "methods.recipe",
    "rounding": "methods.rounding",
    "scheme": "numbers.scheme",
    "search": "methods.search",
    "source": "checkpoint.source",
    "stats": "methods.stats",
    "stored": "formats.stored",
    "tensor": "numbers.tensor",
    "tensorfile": "checkpoint.safetensors",
    "transforms": "methods.transforms",
    "version": "checkpoint.version",
}


def __getattr__(name: str) -> object:
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"quantkit.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class MovedModules(MetaPathFinder, Loader):
    """Imports `quantkit.OLD` as the very module that lies at `quantkit.NEW` now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module that has moved; None for every other."""
        return ModuleSpec(fullname, self) if self._new(fullname) is not None else None

    def exec_module(self, module: ModuleType) -> None:
        """Puts the module of the new name in the place of the old one, with a warning."""
        new = self._new(module.__name__)
        assert new is not None
        warnings.warn(
            f"{module.__name__} has moved to {new} and will be gone in quantkit 0.3; packages "
            "that extend quantkit import from quantkit.extend",
            DeprecationWarning,
            stacklevel=2,
        )
        # What stands here when this returns is what the import statement gets.
        sys.modules[module.__name__] = importlib.import_module(new)

    def _new(self, fullname: str) -> str | None:
        package, _, rest = fullname.partition(".")
        head, dot, tail = rest.partition(".")
        return (
            f"quantkit.{MOVED[head]}{dot}{tail}"
            if package == "quantkit" and head in MOVED
            else None
        )
