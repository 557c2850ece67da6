"""Importance matrices in the place of calibration: read for a run, or written by one of their own.

Letters: T tokens, I in features, E experts.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from quantkit.calibration.data.tokens import Calibration
from quantkit.calibration.stream import CalibrationStream
from quantkit.checkpoint.door import given_path
from quantkit.checkpoint.memory import release_free_memory
from quantkit.errors import FormatError, RecipeError
from quantkit.formats.gguf.families import family_of
from quantkit.formats.gguf.imatrix import Importance, read_imatrix, write_imatrix
from quantkit.formats.gguf.names import place_of
from quantkit.methods.recipe import Recipe
from quantkit.methods.stats import Needs, Stats
from quantkit.model.causal import CausalModel
from quantkit.model.refs import WeightRef
from quantkit.pipeline.plan import Plan

_PIECE = 1 << 20


class GivenStats:
    """What an imatrix tells of the inputs of a model's weights, as statistics."""

    def __init__(self, path: str | Path, model: CausalModel, recipe: Recipe) -> None:
        """Raises RecipeError if the recipe reads more than mean squares, or nothing,
        CheckpointError for a damaged file, FormatError for one of another model."""
        self.path = given_path(path)
        _check_recipe(recipe)
        self._family = family_of(str(model.text_config.model_type))
        self._entries = read_imatrix(self.path)
        refs = [ref for index in range(model.num_blocks) for ref in model.weights(index)]
        wanted = [ref for ref in refs if ref.role in ("linear", "expert")]
        found = sum(self.of(ref) is not None for ref in wanted)
        if not found:
            raise FormatError(
                f"--imatrix {self.path}: it has none of this model's weights: it names "
                f"{min(self._entries)}; it was made of another model"
            )
        self.note = (
            f"errors are weighed by {self.path.name}, which tells the inputs of {found} of "
            f"{len(wanted)} weights"
        )

    @property
    def fingerprint(self) -> str:
        """sha256 of the file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        return digest.hexdigest()

    def of(self, ref: WeightRef) -> Stats | None:
        """Mean squares of a weight's inputs; None if the file has no token there."""
        place = place_of(self._family, ref.name)
        entry: Importance | None = None if place is None else self._entries.get(place.name)
        if place is None or entry is None:
            return None
        mean_sq, count = entry.of(ref.name, ref.shape[1], place.expert)
        if count == 0:
            return None
        stats = Stats.empty(ref.shape[1], Needs(moments=True))
        stats.count = count
        stats.sum_sq = torch.from_numpy(mean_sq.astype(np.float64)) * count
        return stats

    def book(self, plan: Plan, index: int) -> dict[str, Stats]:
        """Statistics of a block's inputs, by their keys."""
        found = {key: self.of(refs[0]) for key, refs in plan.input_groups(index)}
        return {key: stats for key, stats in found.items() if stats is not None}


def _check_recipe(recipe: Recipe) -> None:
    """RecipeError unless mean squares of inputs are all the statistics that the recipe reads."""
    needs = Needs()
    for scheme in recipe.schemes:
        needs |= recipe.needs(scheme)
    more = recipe.transforms or recipe.target or recipe.refines or recipe.heals or recipe.kv
    if more or needs.gram or needs.sample or needs.drift or recipe.experts != "routed":
        raise RecipeError(
            f"--imatrix holds mean squares of inputs, and {recipe.method} reads more: use --method "
            "rtn, which weighs errors by them, or leave --imatrix out and calibrate on text"
        )
    if not needs:
        raise RecipeError(
            f"--imatrix: nothing of {recipe.method} reads it: use --method rtn, or a range that "
            "weighs errors, as --set range.name=weighted_mse does"
        )


def measure_imatrix(
    model: CausalModel,
    calibration: Calibration,
    path: Path,
    *,
    dataset: str,
    device: str = "cpu",
    progress: bool = True,
) -> int:
    """Writes what the original model's weights read on the text; returns the number of tensors.

    Memory: one block; hidden states lie in a temporary folder.  FormatError where llama.cpp has no
    such model.
    """
    family = family_of(str(model.text_config.model_type))
    sums: dict[str, dict[int, tuple[Tensor, int]]] = {}
    with torch.no_grad(), TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        stream = CalibrationStream(
            model, calibration, device=device, scratch=Path(scratch), gram_budget=None, stack=stack
        )
        stream.embed()
        for index in tqdm(
            range(model.num_blocks), unit="block", disable=None if progress else True
        ):
            block = model.load_block(index)
            refs = [r for r in model.weights(index) if r.role in ("linear", "expert", "router")]
            book = stream.gather(
                index,
                block,
                {ref.input: Needs(moments=True) for ref in refs},
                {ref.input: ref.shape[1] for ref in refs},
                stream="original",
                write=True,
            )
            for ref in refs:
                if (place := place_of(family, ref.name)) is not None and ref.input in book:
                    stats = book.get(ref.input)
                    told = stats.sum_sq.float().cpu(), stats.count
                    sums.setdefault(place.name, {})[place.expert or 0] = told
            del block, book
            release_free_memory()
    tokens, length = int(calibration.mask.sum()), calibration.ids.shape[1]
    write_imatrix(
        path,
        {name: _stacked(found) for name, found in sums.items()},
        dataset=dataset,
        chunks=-(-tokens // length),
        chunk_size=length,
    )
    return len(sums)


def _stacked(
    found: dict[int, tuple[Tensor, int]],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Sums [E, I] and counts [E, 1], experts in order; zeros for those that had no token."""
    experts = range(max(found) + 1)
    none = torch.zeros_like(next(iter(found.values()))[0])
    squares = torch.stack([found[e][0] if e in found else none for e in experts])
    counts = torch.tensor([[float(found[e][1]) if e in found else 0.0] for e in experts])
    return squares.numpy(), counts.numpy()
