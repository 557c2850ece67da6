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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantkit.calibration.gather import StatsBook, gather
from quantkit.calibration.hidden import HiddenStore
from quantkit.calibration.stream import BATCH_TOKENS
from quantkit.calibration.tokens import CalibrationSource
from quantkit.checkpoint.disk import disk_errors, sync_directory, write_file
from quantkit.checkpoint.manifest import RUN
from quantkit.checkpoint.memory import peak_rss, release_free_memory
from quantkit.checkpoint.output import OutputDirectory, OutputState
from quantkit.checkpoint.safetensors import tensor_bytes
from quantkit.formats.gguf.blocks import BLOCK_TYPES, pack
from quantkit.formats.gguf.names import Place
from quantkit.formats.gguf.solve import solve_blocks
from quantkit.formats.gguf.writer import PlannedTensor, write_gguf
from quantkit.methods.stats import Stats
from quantkit.model.causal import TapCallback
from quantkit.model.refs import BlockCall, WeightRef
from quantkit.pipeline.fold_vectors import keep_source_folds
from quantkit.pipeline.gguf_export import (
    MODEL_FILE,
    OLLAMA_FILE,
    GgufExport,
    dense_tensor,
    general_entries,
    modelfile,
    row_order,
)
from quantkit.pipeline.gguf_job import GgufJob, GgufRequest, dense_kind, prepare_gguf, recipe_type
from quantkit.pipeline.gguf_predict import CHUNK, NEEDS


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
    skip: Sequence[str] = (),
    head: str | None = None,
    max_ram: int | None = None,
    requantize: bool = False,
    fresh: bool = False,
    progress: bool = True,
) -> GgufExport:
    """Writes `out` with model.gguf (embeddings and head quantized too) and a Modelfile.

    `scheme` is a recipe of gguf_recipe.py; method "rtn" needs no calibration text and takes nearest
    codes.  Holds one block, its Gram matrices (in passes that fit `max_ram`) and a chunk of rows.
    Raises a QuantkitError before anything is written if the model, the recipe, the text or the
    memory does not do.
    """
    request = GgufRequest(
        scheme=scheme,
        method=method,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        revision=revision,
        skip=tuple(skip),
        head=head,
        max_ram=max_ram,
        requantize=requantize,
    )
    name = Path(model_path).resolve().name
    return run_gguf(prepare_gguf(model_path, request), out, name, fresh=fresh, progress=progress)


def run_gguf(
    job: GgufJob,
    out: str | os.PathLike[str],
    name: str,
    *,
    fresh: bool = False,
    progress: bool = True,
) -> GgufExport:
    """Does the job: goes on where a killed run stopped, leaves a complete output as it is.

    `name` is the model's, for the file's metadata.
    """
    began = time.monotonic()
    source, family, config = job.model.source, job.family, job.config
    with OutputDirectory(Path(out)) as output, contextlib.ExitStack() as stack:
        labels = [choice.type for choice in job.types.values()]
        counts = {label: labels.count(label) for label in sorted(set(labels))}
        result = GgufExport(out=output.out, types=counts, rounded=(), notes=job.notes)
        if output.state is OutputState.COMPLETE and not fresh:
            output.check_complete(job.fingerprint)
            return result
        journal = output.begin(job.fingerprint, fresh=fresh)
        done = {str(entry["step"]): entry for entry in journal.records()}
        resumed = len(done)
        work = _Work(job, output.scratch, stack)
        with tqdm(total=len(work.steps), unit="step", disable=None if progress else True) as bar:
            for step in work.steps:
                if step not in done:
                    bar.set_description(step)
                    done[step] = {"step": step, "weights": work.run(step)}
                    journal.append(done[step])
                    release_free_memory()
                bar.update()
        tensors = [
            work.stored(target, job.types[target].type, members)
            if target in job.types and job.types[target].type in BLOCK_TYPES
            else dense_tensor(
                target, members, source, family, config, dense_kind(job.types, target)
            )
            for target, members in job.placed.items()
        ]
        if job.described.rope_factors is not None:
            factors = job.described.rope_factors
            data = factors.view(torch.uint8)
            shape = tuple(factors.shape)
            tensors.append(
                PlannedTensor(
                    name="rope_freqs.weight", type="F32", shape=shape, pieces=lambda: iter((data,))
                )
            )
        entries = (
            *general_entries(name, recipe_type(job.request.scheme)),
            *job.described.entries,
            *job.tokenizer,
        )
        write_gguf(output.partial / MODEL_FILE, family.architecture, entries, tensors)
        report = {
            "method": job.request.method,
            "scheme": job.request.scheme,
            "calibration": None if job.tokens is None else job.tokens.record.to_dict(),
            "fingerprint": dict(job.fingerprint),
            "types": {target: choice.type for target, choice in job.types.items()},
            "notes": list(job.notes),
            "weights": [entry for step in work.steps for entry in done[step]["weights"]],
        }
        peak, predicted = peak_rss(), job.prediction.peak(job.request.max_ram)
        run = {
            "seconds": round(time.monotonic() - began, 3),
            "predicted_seconds": round(job.prediction.seconds, 1),
            "peak_rss_bytes": peak,
            "predicted_peak_bytes": predicted,
            "max_ram_bytes": job.request.max_ram,
            "steps_before_resume": resumed,
        }
        with disk_errors(output.partial):
            (output.partial / "quantkit").mkdir(exist_ok=True)
            for file, content in (("quantkit/report.json", report), (RUN, run)):
                write_file(output.partial / file, (json.dumps(content, indent=2) + "\n").encode())
            write_file(output.partial / OLLAMA_FILE, modelfile(source, entries).encode())
        keep_source_folds(source.home, output.partial)
        output.finish()
        return replace(result, peak_bytes=peak, predicted_bytes=predicted)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    start: int
    stop: int
    mask: Tensor | None


class _Work:
    """The steps "embed", "block 0"..., "head" and "embedding"; holds one block at a time."""

    def __init__(self, job: GgufJob, scratch: Path, stack: contextlib.ExitStack) -> None:
        self.model, self.tokens, self.scratch = job.model, job.tokens, scratch
        self.family, self.config = job.family, job.config
        self.budget = job.prediction.gram_budget(job.request.max_ram)
        self.packed = scratch / "packed"
        self.packed.mkdir(exist_ok=True)
        self.chosen = {
            name: (job.types[target].type, place)
            for target, members in job.placed.items()
            for name, place in members
            if target in job.types
        }
        model, tokens = job.model, job.tokens
        self.steps = [f"block {index}" for index in range(model.num_blocks)]
        if model.head.name in self.chosen:
            self.steps.append("head")
        if not model.head_tied and self._embedding() is not None:
            self.steps.append("embedding")
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
                name = self._embedding()
                assert name is not None
                return [self._solve(name, self._shapes[name], self._read(name), None)]
            return self._block(int(step.removeprefix("block ")))

    def _embedding(self) -> str | None:
        """The checkpoint's name of the table of embeddings, if it is to be quantized."""
        found = (n for n, (_, place) in self.chosen.items() if place.stem == "token_embd")
        return next(found, None)

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
                weight = self.model.weight(block, ref)
                read = weight.__getitem__
                told.append(self._solve(ref.name, ref.shape, read, stats, keep=weight))
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
            dict.fromkeys(groups, NEEDS),
            {key: refs[0].shape[1] for key, refs in groups.items()},
            lambda _first, callback: self._forward(index, block, callback),
            directory=self.scratch,
            budget=self.budget,
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
            stats = Stats.empty(head.shape[1], NEEDS)
            for batch in self.batches:
                hidden = self.hidden.read(self.model.num_blocks, batch.start, batch.stop)
                x = self.model.head_hidden(hidden)
                stats.update_(
                    x[batch.mask] if batch.mask is not None else x.flatten(0, 1), name="head"
                )
            stats.finish_()
        return self._solve(head.name, head.shape, self._read(head.name), stats)

    def _read(self, name: str) -> Callable[[slice], Tensor]:
        """Rows of a matrix outside the blocks, read as they are needed."""
        return lambda part: self.model.source.read_rows(name, part.start, part.stop)

    def _solve(
        self,
        name: str,
        shape: tuple[int, int],
        read: Callable[[slice], Tensor],
        stats: Stats | None,
        keep: Tensor | None = None,
    ) -> dict[str, Any]:
        """Solves a weight, rows in chunks, and writes it packed; what to tell of it.

        `keep` [O, I] receives the decoded values.
        """
        label, place = self.chosen[name]
        if label not in BLOCK_TYPES:
            return {"name": name, "type": label, "error": 0.0, "degraded": None}
        kind, (rows, columns) = BLOCK_TYPES[label], shape
        packed = torch.empty(rows, columns // kind.size * kind.num_bytes, dtype=torch.uint8)
        degraded, error, size = None, 0.0, 0.0
        step = max(1, CHUNK // columns)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            weight = read(part).to(torch.float32).contiguous()
            solved = solve_blocks(weight, kind, stats)
            packed[part] = pack(solved.blocks).view(-1, packed.shape[1])
            value, degraded = solved.dequantize(), solved.degraded
            if keep is not None:
                keep[part] = value
            error += _cost(weight - value, stats)
            size += _cost(weight, stats)
        order = row_order(self.family, place, self.config)
        path = self.packed / f"{name}.bin"
        with disk_errors(path, packed.nbytes):
            with path.open("wb") as file:
                file.write(tensor_bytes(packed if order is None else packed[order]))
                file.flush()
                os.fsync(file.fileno())
            sync_directory(self.packed)
        relative = float(f"{error / size if size > 0 else 0.0:.6g}")
        return {"name": name, "type": label, "error": relative, "degraded": degraded}


def _cost(delta_OI: Tensor, stats: Stats | None) -> float:
    """What a difference of weights costs at the output; of the weights alone without statistics."""
    if stats is None or not stats.count or stats.gram is None:
        return float(delta_OI.square().sum())
    return float((delta_OI @ stats.gram).mul_(delta_OI).sum())
