"""Whether a checkpoint holds all of its model's tensors, and nothing else.

quantkit's report tells it, entry by entry; without one, the model's own parameters do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.record import FATES, REPORT
from quantkit.checks.result import Check
from quantkit.errors import CheckpointError, ModelError
from quantkit.formats.format import StoredWeight
from quantkit.model import skeleton
from quantkit.model.decoded import Unpacked
from quantkit.model.names import check_complete, map_names


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the report says about one tensor of the source."""

    name: str
    fate: str
    scheme: str | None
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    output: tuple[str, ...]


def read_entries(report: Mapping[str, Any]) -> tuple[Entry, ...]:
    """The report's tensors.  Raises CheckpointError if they have another form."""
    try:
        found = tuple(
            Entry(
                name=str(tensor["name"]),
                fate=str(tensor["fate"]),
                scheme=None if tensor["scheme"] is None else str(tensor["scheme"]),
                shape=tuple(int(size) for size in tensor["shape"]),
                dtype=str(tensor["dtype"]),
                num_bytes=int(tensor["bytes"]),
                output=tuple(str(name) for name in tensor["output"]),
            )
            for tensor in report.get("tensors") or ()
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{REPORT}: its tensors cannot be read ({error!r})") from error
    if unknown := [entry for entry in found if entry.fate not in FATES]:
        raise CheckpointError(f"{REPORT}: {unknown[0].name}: unknown fate {unknown[0].fate!r}")
    return found


class Spelling:
    """How two checkpoints of one model name a tensor: one of GPT-2 may lack `transformer.`."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._longer = {name.partition(".")[2]: name for name in names}

    def __call__(self, name: str) -> str | None:
        """The name here of a tensor that is called `name` there; None if it is not here."""
        shorter = name.partition(".")[2]
        for known in (name, shorter, self._longer.get(name)):
            if known in self._names:
                return known
        return None


def respelled(entries: Sequence[Entry], view: Unpacked) -> tuple[Entry, ...]:
    """The entries by the names that the checkpoint's own file has."""
    here = Spelling((*view.names(), *view.packed.names()))
    return tuple(
        dataclasses.replace(
            entry,
            name=here(entry.name) or entry.name,
            output=tuple(here(name) or name for name in entry.output),
        )
        for entry in entries
    )


def by_report(view: Unpacked, entries: Sequence[Entry], *, unties_head: bool) -> Check:
    """Every tensor in the files belongs to one entry of the report, as the report says.

    `unties_head`: a head that the source ties to the embeddings has a weight of its own here.
    """
    stored, names = view.stored, set(view.packed.names())
    problems: list[str] = []
    claimed: dict[str, str] = {}
    for entry in entries:
        weight = stored.get(entry.name)
        shared = weight is not None and weight.expert is not None
        for name in entry.output:
            # Experts in one tensor share it.
            if name in claimed and not shared:
                problems.append(f"{name}: claimed by {claimed[name]} and by {entry.name}")
            claimed[name] = entry.name
        missing = [name for name in entry.output if name not in names]
        if missing:
            problems.append(f"{entry.name}: {entry.fate}, but {missing[0]} is not in the files")
        elif entry.fate != "left out":
            problems += _entry_problems(entry, view, weight)
    for name in sorted(set(stored) - {entry.name for entry in entries}):
        if not unties_head:
            problems.append(f"{name}: quantized, but not in the report")
        claimed.update(dict.fromkeys(stored[name].tensors, name))
    problems += [f"{name}: in no entry of the report" for name in sorted(names - set(claimed))]
    counts = {fate: sum(entry.fate == fate for entry in entries) for fate in FATES}
    detail = ", ".join(f"{count} {fate}" for fate, count in counts.items() if count)
    return Check(name="coverage", detail=detail, problems=tuple(problems))


def _entry_problems(entry: Entry, view: Unpacked, weight: StoredWeight | None) -> Iterator[str]:
    """What is wrong with a tensor whose files are all there."""
    source = view.packed
    stored_bytes = sum(source.num_bytes(name) for name in entry.output)
    if weight is not None and weight.expert is not None:
        # Its slice of tensors for all experts.
        stored_bytes = sum(source.num_bytes(n) // source.info(n).shape[0] for n in entry.output)
    if stored_bytes != entry.num_bytes:
        yield f"{entry.name}: {stored_bytes} bytes stored, the report says {entry.num_bytes}"
    if entry.fate != "quantized":
        if weight is not None:
            yield f"{entry.name}: quantized in the files, {entry.fate} in the report"
            return
        info = source.info(entry.name)
        dtype = entry.dtype if source.recast else str(info.dtype).removeprefix("torch.")
        if (info.shape, dtype) != (entry.shape, entry.dtype):
            yield (
                f"{entry.name}: {dtype} {list(info.shape)} stored, the report says {entry.dtype} "
                f"{list(entry.shape)}"
            )
        return
    if weight is None:
        yield f"{entry.name}: not quantized in the files, though the report says so"
        return
    if entry.scheme not in _names(weight):
        yield f"{entry.name}: stored as {weight.scheme.name}, the report says {entry.scheme}"
    if entry.shape not in (weight.shape, weight.shape[::-1]):
        yield f"{entry.name}: stored as {weight.shape}, the report says {entry.shape}"
    if sorted(weight.tensors) != sorted(entry.output):
        yield f"{entry.name}: stored in {weight.tensors}, the report says {entry.output}"


def _names(weight: StoredWeight) -> tuple[str, ...]:
    """The scheme that a weight is read under, and another that it may have been written under."""
    if not weight.centered:
        return (weight.scheme.name,)
    return weight.scheme.name, dataclasses.replace(weight.scheme, symmetric=False).name


def by_model(view: Unpacked, model: PreTrainedModel) -> Check:
    """Every parameter of the model has a tensor, and every tensor of a file is one's.

    A directory of another tool may hold more than the model's class takes, as heads that predict
    further tokens: those are counted.  `model` is the view's, without weights.
    """
    view.transposed = skeleton.conv1d_names(model, view.names())
    names = map_names(model, view)
    detail = f"{len(view.names())} tensors for the parameters of a {view.config['model_type']}"
    problems = []
    if not isinstance(view.packed, FileSource):
        problems += [f"{name}: no parameter of the model takes it" for name in names.unmapped]
    elif names.unmapped:
        detail += f", {len(names.unmapped)} that no parameter takes"
    try:
        check_complete(names, [name for name, _ in model.named_parameters()])
    except (CheckpointError, ModelError) as error:
        problems.append(str(error))
    return Check(name="coverage", detail=detail, problems=tuple(problems))
