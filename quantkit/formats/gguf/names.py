"""Names of tensors: from a checkpoint's to a GGUF file's and back."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from quantkit.errors import FormatError
from quantkit.formats.gguf.families import Family

_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor goes: the full name, its stem without block and suffix, and which expert."""

    name: str
    stem: str
    expert: int | None = None


def place_of(family: Family, name: str) -> Place | None:
    """The place of a checkpoint's tensor; None for those that hold no weights.

    Raises FormatError if the family has no such tensor: nothing is left out silently.
    """
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
    stem = name.removesuffix(suffix)
    for spelled in (stem, _prefixed(family, stem)):
        if spelled in family.outside:
            return Place(name=family.outside[spelled] + suffix, stem=family.outside[spelled])
        if spelled.startswith(family.prefix):
            index, _, inner = spelled.removeprefix(family.prefix).partition(".")
            if inner in family.ignored or inner + suffix in family.ignored:
                return None
            if index.isdigit() and inner in family.block:
                short = family.block[inner]
                return Place(name=f"blk.{index}.{short}{suffix}", stem=short)
            for template, short in family.experts.items():
                pattern = re.escape(template).replace(re.escape("{e}"), r"(\d+)")
                if index.isdigit() and (match := re.fullmatch(pattern, inner)):
                    full = f"blk.{index}.{short}{suffix}"
                    return Place(name=full, stem=short, expert=int(match[1]))
    raise FormatError(
        f"{name}: gguf has no place for this tensor in a {family.architecture} model; remove it "
        "from the checkpoint or choose another --format"
    )


def note_unused(family: Family, unmapped: Collection[str]) -> tuple[str, ...]:
    """What to tell of tensors that no parameter of transformers' class takes, which are left out.

    Nothing of those that hold no weights, as old buffers do.
    """
    unused = [name for name in unmapped if not _is_ignored(family, name)]
    if not unused:
        return ()
    return (
        f"{len(unused)} tensors that {family.class_name} does not compute with are left out, as "
        f"prediction heads are: {unused[0]}",
    )


def checkpoint_names(family: Family, name: str) -> tuple[str, str] | None:
    """(template of the checkpoint's name with {e} for experts, stem) of a GGUF tensor, or None."""
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
    stem = name.removesuffix(suffix)
    for theirs, ours in family.outside.items():
        if ours == stem:
            return theirs + suffix, ours
    match = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)", stem, re.ASCII)
    if match is None:
        return None
    for table in (family.block, family.experts):
        for theirs, ours in table.items():
            if ours == match[2]:
                return f"{family.prefix}{match[1]}.{theirs}{suffix}", ours
    return None


def _is_ignored(family: Family, name: str) -> bool:
    try:
        return place_of(family, name) is None
    except FormatError:
        return False


def _prefixed(family: Family, stem: str) -> str:
    """The name as the whole model has it: GPT-2's checkpoints may lack `transformer.`."""
    return family.prefix.split(".")[0] + "." + stem
