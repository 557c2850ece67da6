"""A full-precision model quantized straight into a GGUF file, block after block.

statistics of a block --solve_blocks--> packed rows in OUT.partial/.scratch --> journal line --> ...
--> model.gguf put together from them --> manifest --> rename.  Killed at any instant, the same
command goes on after the last block that was done.

Letters: N sequences, T tokens, O out features, I in features.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantkit.calibrated import BATCH_TOKENS
from quantkit.calibration import Calibration, CalibrationSource, load_calibration
from quantkit.checkpoint import open_source, refuse_quantized
from quantkit.disk import disk_errors, sync_directory, write_file
from quantkit.errors import RecipeError
from quantkit.gather import StatsBook, gather
from quantkit.gguf_blocks import BLOCK_TYPES, pack
from quantkit.gguf_container import PlannedTensor, import_gguf, write_gguf
from quantkit.gguf_export import (
    MODEL_FILE,
    OLLAMA_FILE,
    GgufExport,
    dense_tensor,
    general_entries,
    modelfile,
    place_tensors,
    row_order,
)
from quantkit.gguf_families import Family, family_of
from quantkit.gguf_metadata import describe
from quantkit.gguf_names import Place
from quantkit.gguf_recipe import RECIPES, Choice, Weight, check_recipe, choose_types
from quantkit.gguf_solve import solve_blocks
from quantkit.gguf_tokenizer import describe_tokenizer
from quantkit.hidden import HiddenStore
from quantkit.models import CausalModel, TapCallback
from quantkit.output import OutputDirectory, OutputState
from quantkit.refs import BlockCall, WeightRef
from quantkit.stats import Needs, Stats
from quantkit.tensorfile import tensor_bytes
from quantkit.tokenizer import load_tokenizer
from quantkit.version import __version__

METHODS = ("gptq", "rtn")
# Weights solved together: bounds memory, and a function of the shape alone.
_CHUNK = 1 << 23
_NEEDS = Needs(moments=True, gram=-1)


def quantize_gguf(
    model_path: str,
    out: str | os.PathLike[str],
    *,
    scheme: str,
    method: str = "gptq",
    calibration: CalibrationSource = "demo",
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    revision: str | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> GgufExport:
    """Writes `out` with model.gguf (embeddings and head quantized too) and a Modelfile.

    `scheme` is a recipe of gguf_recipe.py; method "rtn" needs no calibration text and takes nearest
    codes.  Holds one block, its Gram matrices and a chunk of rows.  Raises a QuantkitError before
    anything is written if the model, the recipe or the text does not do.
    """
    check_recipe(scheme)
    if method not in METHODS:
        raise RecipeError(f"method {method!r}: with --format gguf it is one of {METHODS}")
    import_gguf()
    source = open_source(model_path, revision=revision)
    refuse_quantized(source)
    model = CausalModel.open(source, trust_remote_code=False, dtype=torch.float32)
    config = model.text_config
    family = family_of(str(config.model_type))
    described = describe(family, config)
    tokens = None
    if method == "gptq":
        tokens = load_calibration(
            calibration,
            tokenizer=load_tokenizer(source),
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            max_length=getattr(config, "max_position_embeddings", None),
            vocab_size=config.vocab_size,
        )
    placed = place_tensors(source.names(), family, model.head_tied)
    types = _types(scheme, placed, model, family, config)
    tokenizer_entries = describe_tokenizer(source, config.vocab_size)
    fingerprint = {
        "model": source.fingerprint(),
        "format": "gguf",
        "scheme": scheme,
        "method": method,
        "calibration": "none" if tokens is None else tokens.fingerprint,
        "threads": str(torch.get_num_threads()),
        "torch version": torch.__version__,
        "quantkit version": __version__,
    }
    with OutputDirectory(Path(out)) as output, contextlib.ExitStack() as stack:
        fallbacks = tuple(
            f"{name}: {choice.fallback} does not divide its rows, {choice.type} is written"
            for name, choice in types.items()
            if choice.fallback is not None
        )
        labels = [choice.type for choice in types.values()]
        counts = {label: labels.count(label) for label in sorted(set(labels))}
        notes = described.notes + fallbacks
        result = GgufExport(out=output.out, types=counts, rounded=(), notes=notes)
        if output.state is OutputState.COMPLETE and not fresh:
            output.check_complete(fingerprint)
            return result
        journal = output.begin(fingerprint, fresh=fresh)
        done = {str(entry["step"]): entry for entry in journal.records()}
        work = _Work(model, tokens, types, placed, family, config, output.scratch, stack)
        with tqdm(total=len(work.steps), unit="step", disable=None if progress else True) as bar:
            for step in work.steps:
                if step not in done:
                    bar.set_description(step)
                    done[step] = {"step": step, "weights": work.run(step)}
                    journal.append(done[step])
                bar.update()
        tensors = [
            work.stored(target, types[target].type, members)
            if target in types and types[target].type in BLOCK_TYPES
            else dense_tensor(
                target, members, source, family, config, "F16" if target in types else None
            )
            for target, members in placed.items()
        ]
        if described.rope_factors is not None:
            factors = described.rope_factors
            data = factors.view(torch.uint8)
            shape = tuple(factors.shape)
            tensors.append(
                PlannedTensor(
                    name="rope_freqs.weight", type="F32", shape=shape, pieces=lambda: iter((data,))
                )
            )
        name = Path(model_path).resolve().name
        entries = (
            *general_entries(name, RECIPES[scheme][1]),
            *described.entries,
            *tokenizer_entries,
        )
        write_gguf(output.partial / MODEL_FILE, family.architecture, entries, tensors)
        report = {
            "method": method,
            "scheme": scheme,
            "calibration": None if tokens is None else tokens.record.to_dict(),
            "fingerprint": fingerprint,
            "types": {target: choice.type for target, choice in types.items()},
            "notes": list(notes),
            "weights": [entry for step in work.steps for entry in done[step]["weights"]],
        }
        with disk_errors(output.partial):
            (output.partial / "quantkit").mkdir(exist_ok=True)
            text = json.dumps(report, indent=2) + "\n"
            write_file(output.partial / "quantkit" / "report.json", text.encode())
            write_file(output.partial / OLLAMA_FILE, modelfile(source, entries).encode())
        output.finish()
        return result


def _types(
    scheme: str,
    placed: Mapping[str, list[tuple[str, Place]]],
    model: CausalModel,
    family: Family,
    config: Any,
) -> dict[str, Choice]:
    """The type of every matrix that is quantized: the blocks', the embedding, the head."""
    refs = [ref for index in range(model.num_blocks) for ref in model.weights(index)]
    shapes = {ref.name: ref.shape for ref in refs if ref.role != "router"}
    weights = []
    for target, members in placed.items():
        name, place = members[0]
        if place.stem in ("token_embd", "output") and target.endswith(".weight"):
            columns = model.source.info(name).shape[1]
        elif name in shapes:
            columns = shapes[name][1]
        else:
            continue
        block = int(target.split(".")[1]) if target.startswith("blk.") else -1
        weights.append(Weight(name=target, stem=place.stem, block=block, columns=columns))
    heads = getattr(config, "num_attention_heads", 1)
    return choose_types(
        scheme,
        weights,
        layers=getattr(config, family.block_count),
        heads=heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        experts=getattr(config, "num_local_experts", 0) if family.experts else 0,
        tied=model.head_tied,
    )


@dataclass(frozen=True, kw_only=True)
class _Batch:
    start: int
    stop: int
    mask: Tensor | None


class _Work:
    """The steps "embed", "block 0"..., "head" and "embedding"; holds one block at a time."""

    def __init__(
        self,
        model: CausalModel,
        tokens: Calibration | None,
        types: Mapping[str, Choice],
        placed: Mapping[str, list[tuple[str, Place]]],
        family: Family,
        config: Any,
        scratch: Path,
        stack: contextlib.ExitStack,
    ) -> None:
        self.model, self.tokens, self.scratch = model, tokens, scratch
        self.family, self.config = family, config
        self.packed = scratch / "packed"
        self.packed.mkdir(exist_ok=True)
        self.chosen = {
            name: (types[target].type, place)
            for target, members in placed.items()
            for name, place in members
            if target in types
        }
        self.steps = [f"block {index}" for index in range(model.num_blocks)]
        self.steps += ["head"] if model.head_tied else ["head", "embedding"]
        self.hidden: HiddenStore | None = None
        self.batches: list[_Batch] = []
        self.calls: dict[int, tuple[BlockCall, ...]] = {}
        if tokens is not None:
            self.steps.insert(0, "embed")
            with torch.no_grad():
                first, _ = model.calls(tokens.ids[:1])
            shape = (*tokens.ids.shape, first.shape[-1])
            self.hidden = stack.enter_context(HiddenStore(scratch, shape, first.dtype))
            size = max(1, BATCH_TOKENS["cpu"] // tokens.ids.shape[1])
            for start in range(0, len(tokens.ids), size):
                mask = tokens.mask[start : start + size]
                whole = bool(mask.all())
                self.batches.append(
                    _Batch(start=start, stop=start + len(mask), mask=None if whole else mask)
                )

    def run(self, step: str) -> list[dict[str, Any]]:
        """Does a step and returns what it tells of its weights; its files are on the disk."""
        with torch.no_grad():
            if step == "embed":
                assert self.tokens is not None and self.hidden is not None
                for batch in self.batches:
                    ids = self.tokens.ids[batch.start : batch.stop]
                    self.hidden.write(0, batch.start, self.model.calls(ids, batch.mask)[0])
                self.hidden.sync(0)
                return []
            if step == "head":
                return [self._head()]
            if step == "embedding":
                name = next(
                    n for n, (_, place) in self.chosen.items() if place.stem == "token_embd"
                )
                return [self._solve(name, self.model.source.read(name).float(), None)[0]]
            return self._block(int(step.removeprefix("block ")))

    def stored(self, target: str, kind: str, members: list[tuple[str, Place]]) -> PlannedTensor:
        """The tensor whose rows lie packed in the scratch directory."""
        rows, columns = self._shapes[members[0][0]]
        experts = (len(members),) if members[0][1].expert is not None else ()

        def pieces() -> Iterator[Tensor]:
            for name, _ in members:
                with (self.packed / f"{name}.bin").open("rb") as file:
                    while data := file.read(1 << 24):
                        yield torch.frombuffer(bytearray(data), dtype=torch.uint8)

        return PlannedTensor(name=target, type=kind, shape=(*experts, rows, columns), pieces=pieces)

    @property
    def _shapes(self) -> dict[str, tuple[int, int]]:
        found = {
            ref.name: ref.shape
            for index in range(self.model.num_blocks)
            for ref in self.model.weights(index)
        }
        for name, (_, place) in self.chosen.items():
            if place.stem in ("token_embd", "output"):
                shape = self.model.source.info(name).shape
                found[name] = (shape[0], shape[1])
        return found

    def _block(self, index: int) -> list[dict[str, Any]]:
        block = self.model.load_block(index)
        groups: dict[str, list[WeightRef]] = {}
        for ref in self.model.weights(index):
            if ref.name in self.chosen and self.chosen[ref.name][0] in BLOCK_TYPES:
                groups.setdefault(ref.input, []).append(ref)
        book = self._gather(index, block, groups)
        told = []
        for key, refs in groups.items():
            stats = book.get(key) if book is not None and key in book else None
            for ref in refs:
                weight = self.model.weight(block, ref).float()
                entry, value = self._solve(ref.name, weight, stats)
                self.model.set_weight_(block, ref, value)
                told.append(entry)
        if self.hidden is not None:
            self._forward(index, block, None)
            self.hidden.sync(index + 1)
        return told

    def _gather(
        self, index: int, block: nn.Module, groups: Mapping[str, list[WeightRef]]
    ) -> StatsBook | None:
        if self.hidden is None:
            return None
        return gather(
            dict.fromkeys(groups, _NEEDS),
            {key: refs[0].shape[1] for key, refs in groups.items()},
            lambda _first, callback: self._forward(index, block, callback),
            directory=self.scratch,
            budget=None,
            stream="quantized",
            device="cpu",
            label=self.model.block_path(index),
        )

    def _forward(self, index: int, block: nn.Module, callback: TapCallback | None) -> None:
        """Runs the block over all batches; without a callback, stores what it gives."""
        assert self.hidden is not None
        for batch in self.batches:
            hidden = self.hidden.read(index, batch.start, batch.stop)
            with contextlib.ExitStack() as modes:
                if callback is not None:
                    modes.enter_context(self.model.tap(index, block, batch.mask, callback))
                out = self.model.run(block, hidden, self._call(index, batch))
            if callback is None:
                self.hidden.write(index + 1, batch.start, out)

    def _call(self, index: int, batch: _Batch) -> BlockCall:
        assert self.tokens is not None
        ids = self.tokens.ids[batch.start : batch.stop]
        if batch.mask is not None:
            return self.model.calls(ids, batch.mask)[1][index]
        if len(ids) not in self.calls:
            self.calls[len(ids)] = self.model.calls(ids, None)[1]
        return self.calls[len(ids)][index]

    def _head(self) -> dict[str, Any]:
        head = self.model.head
        stats = None
        if self.hidden is not None:
            stats = Stats.empty(head.shape[1], _NEEDS)
            for batch in self.batches:
                hidden = self.hidden.read(self.model.num_blocks, batch.start, batch.stop)
                x = self.model.head_hidden(hidden)
                stats.update_(
                    x[batch.mask] if batch.mask is not None else x.flatten(0, 1), name="head"
                )
            stats.finish_()
        return self._solve(head.name, self.model.source.read(head.name).float(), stats)[0]

    def _solve(
        self, name: str, weight_OI: Tensor, stats: Stats | None
    ) -> tuple[dict[str, Any], Tensor]:
        """Writes the packed rows; (what to tell of the weight, its decoded values [O, I])."""
        label, place = self.chosen[name]
        order = row_order(self.family, place, self.config)
        if label not in BLOCK_TYPES:
            return {"name": name, "type": label, "error": 0.0, "degraded": None}, weight_OI
        kind = BLOCK_TYPES[label]
        rows, columns = weight_OI.shape
        value = torch.empty_like(weight_OI)
        packed = torch.empty(rows, columns // kind.size * kind.num_bytes, dtype=torch.uint8)
        degraded = None
        step = max(1, _CHUNK // columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            solved = solve_blocks(weight_OI[part].contiguous(), kind, stats)
            packed[part] = pack(solved.blocks).view(-1, packed.shape[1])
            value[part] = solved.dequantize()
            degraded = solved.degraded
        if order is not None:
            packed = packed[order]
        path = self.packed / f"{name}.bin"
        with disk_errors(path, packed.nbytes):
            with path.open("wb") as file:
                file.write(tensor_bytes(packed.contiguous()))
                file.flush()
                os.fsync(file.fileno())
            sync_directory(self.packed)
        delta = weight_OI - value
        if stats is not None and stats.count and stats.gram is not None:
            error, size = ((d @ stats.gram * d).sum() for d in (delta, weight_OI))
        else:
            error, size = delta.square().sum(), weight_OI.square().sum()
        relative = float(error / size) if float(size) > 0 else 0.0
        told = {"name": name, "type": label, "error": float(f"{relative:.6g}")}
        return told | {"degraded": degraded}, value
