"""One pass over the tensors of a checkpoint: what they hold, and how they compare with a source.

Memory is bounded by the largest tensor.  Letters: O out features, I in features, G groups per row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from quantkit.checkpoint.source import Source
from quantkit.checks.against import (
    Vectors,
    compare_copied,
    compare_quantized,
    compare_recast,
    compare_rescaled,
    same_numbers,
)
from quantkit.checks.coverage import Entry, Spelling
from quantkit.checks.result import Check, finite_problems, scale_problems, value_problems
from quantkit.errors import QuantkitError
from quantkit.model.decoded import Unpacked
from quantkit.numbers.tensor import QuantizedTensor


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The model that a checkpoint was made from.

    source      its tensors, decoded if they are quantized
    codes       the quantized source itself, where ours are its very numbers; else None
    rounded     weights that an export rounded: their numbers are near those of `codes`
    vectors     what transforms did to ours since
    optional    tensors that a checkpoint need not hold: a tied head, old buffers
    """

    source: Source
    codes: Unpacked | None
    rounded: Collection[str]
    vectors: Vectors
    optional: Collection[str]


def number_checks(
    view: Unpacked, entries: Sequence[Entry], reference: Reference | None, *, unties_head: bool
) -> Iterator[Check]:
    """The check of what all tensors hold and, with a reference, of what they were made from."""
    fates = {entry.name: entry.fate for entry in entries}
    numbers: list[str] = []
    against = None if reference is None else _Comparison(view=view, reference=reference)
    for name in view.names():
        try:
            if name in view.stored:
                tensor = view.quantized(name)
                numbers += value_problems(name, tensor)
                if against is not None:
                    against.quantized(name, tensor)
                continue
            if fates.get(name) != "copied":
                numbers += finite_problems(name, view)
            if against is not None:
                against.kept(name, fates.get(name))
        except QuantkitError as error:
            numbers.append(str(error))
    for name in view.cache_names:
        numbers += finite_problems(name, view.packed)
        numbers += scale_problems(name, view.packed)
    others = len(view.names()) - len(view.stored) + len(view.cache_names)
    yield Check(
        name="numbers",
        detail=f"scales and codes of {len(view.stored)} weights; {others} other tensors",
        problems=tuple(numbers),
    )
    if against is not None:
        yield against.check(fates, unties_head)


@dataclass(kw_only=True)
class _Comparison:
    """What the pass has found of the source so far."""

    view: Unpacked
    reference: Reference
    problems: list[str] = field(default_factory=list)
    worst: float = 0.0
    worst_name: str = ""

    def __post_init__(self) -> None:
        self._there = Spelling(self.reference.source.names())

    def quantized(self, name: str, tensor: QuantizedTensor) -> None:
        """A weight that was quantized, or holds the numbers of a quantized source."""
        reference = self.reference
        original = self._original(name, tensor.shape)
        if original is None:
            self.problems.append(f"{name}: the source has no such weight")
            return
        codes = reference.codes
        if codes is not None and original in codes.stored and name not in reference.rounded:
            if not same_numbers(tensor, codes.quantized(original)):
                self.problems.append(f"{name}: not the numbers of the source")
            return
        error, problems = compare_quantized(
            name, original, tensor, reference.source, reference.vectors
        )
        self.problems += problems
        if error > self.worst:
            self.worst, self.worst_name = error, name

    def kept(self, name: str, fate: str | None) -> None:
        """A tensor that is not quantized."""
        source, vectors = self.reference.source, self.reference.vectors
        original = self._there(name)
        if original is None:
            # What an untied head or a report has more than the source is told by `check`.
            return
        if self.view.recast:
            self.problems += compare_recast(name, original, self.view, source, vectors)
        elif fate == "rescaled" or vectors.change(name):
            self.problems += compare_rescaled(name, original, self.view, source, vectors)
        else:
            self.problems += compare_copied(name, original, self.view, source)

    def check(self, fates: Mapping[str, str], unties_head: bool) -> Check:
        """The check, once all tensors have been looked at."""
        self.problems += self._name_problems(fates, unties_head)
        worst = f"{self.worst:.4f} ({self.worst_name})" if self.worst_name else "0.0000"
        return Check(
            name="source",
            detail=f"largest relative error of a weight {worst}",
            problems=tuple(self.problems),
        )

    def _original(self, name: str, shape: tuple[int, ...]) -> str | None:
        """The source's name for a weight; of a head that was untied, the embedding's."""
        if (found := self._there(name)) is not None:
            return found
        source = self.reference.source
        alike = [other for other in source.names() if source.info(other).shape == shape]
        return alike[0] if len(alike) == 1 else None

    def _name_problems(self, fates: Mapping[str, str], unties_head: bool) -> Iterator[str]:
        """Tensors that only one side has: by the report's fates or, without any, by the files.

        A head that was untied is new.
        """
        told = "the report gives it no fate" if fates else "it is not in the checkpoint"
        ours = {
            name
            for name, fate in fates.items()
            if fate != "added" and not (unties_head and name in self.view.stored)
        }
        here = Spelling((*ours, *self.view.stored) if fates else self.view.names())
        theirs = set(self.reference.source.names())
        for name in sorted(theirs - set(self.reference.optional)):
            if here(name) is None:
                yield f"{name}: in the source, but {told}"
        for name in sorted(ours if fates else set(self.view.names()) - set(self.view.stored)):
            if self._there(name) is None and name not in self.reference.optional:
                where = "in the report" if fates else "in the checkpoint"
                yield f"{name}: {where}, but not in the source"
