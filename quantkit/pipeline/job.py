"""From what a user asks for to a job that is planned, checked and ready to run."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.calibration.data.images import holds_inputs
from quantkit.calibration.data.tokens import (
    Calibration,
    ImageReader,
    holds_token_ids,
    load_calibration,
)
from quantkit.calibration.processes.ranks import ALONE, Planned, World
from quantkit.calibration.processes.tree import ORDER
from quantkit.checkpoint.dtypes import dtype_of
from quantkit.checkpoint.files import refuse_quantized
from quantkit.checkpoint.memory import release_free_memory
from quantkit.checkpoint.output import earlier_fingerprint
from quantkit.checkpoint.processor import load_processor
from quantkit.checkpoint.sidefiles import MODULES
from quantkit.checkpoint.source import Reader, Source
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.checkpoint.version import __version__
from quantkit.errors import FormatError, RecipeError
from quantkit.formats.format import Format
from quantkit.formats.registry import code_of
from quantkit.methods.rules import PartSpec
from quantkit.methods.stats import has_bf16_units
from quantkit.model.causal import CausalModel
from quantkit.model.decoded import Unpacked
from quantkit.model.rotations.rotating import rotate
from quantkit.model.split_experts import split_experts
from quantkit.pipeline.asked import device_of, open_asked, whole_format
from quantkit.pipeline.budget.choose import Choice, choose
from quantkit.pipeline.decide import with_roles
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import make_plan
from quantkit.pipeline.predict import predict
from quantkit.pipeline.session import Job, checkpoint_beside
from quantkit.pipeline.work.imatrix import GivenStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VERSIONED = ("torch", "transformers", "numpy")
# The field of the fingerprint that holds what a budget chose.
_CHOICE = "budget"


def prepare(
    given: str | PreTrainedModel | Reader,
    request: QuantizeOptions,
    *,
    tokenizer: Any = None,
    out: Path | None = None,
    world: World = ALONE,
) -> Job:
    """The job for a request; reads configuration and calibration text, weights for a budget only.

    With a budget, what an earlier run to `out` chose is taken again.  `world`: who will share the
    work; each rank prepares the same job.

    Raises the QuantkitError of whatever does not work out, before anything is written.
    """
    (job,) = prepare_all(given, [request], tokenizer=tokenizer, out=out, world=world)
    return job


def prepare_all(
    given: str | PreTrainedModel | Reader,
    requests: Sequence[QuantizeOptions],
    *,
    tokenizer: Any = None,
    out: Path | None = None,
    world: World = ALONE,
) -> list[Job]:
    """The jobs of several requests that differ in recipe and format only.

    They share the opened model (`given` may be what `open_asked` gave) and, if any
    recipe is calibrated, one calibration.
    """
    first = requests[0]
    device = world.device(device_of(requests))
    source, model = _opened(given, requests, tokenizer, device)
    requests = [
        dataclasses.replace(request, recipe=with_roles(request.loaded, model, request.format))
        for request in requests
    ]
    shared: Calibration | None = None
    budgets: list[Choice | None] = [None] * len(requests)
    if any(request.has_budget for request in requests):
        shared = _calibration(model, source, first, tokenizer)
        if shared.pictured is None:
            model.check_replay(shared.ids[:1, :64])
        # Others of a run that is planned only are not there.
        sharing = ALONE if isinstance(world, Planned) else world
        earlier: dict[str, str] = {}
        if out is not None and not first.fresh:
            earlier = sharing.first(lambda: _earlier(out))
        budgets = [
            None
            if not request.has_budget
            else choose(
                model,
                request,
                shared,
                device=device,
                earlier=earlier.get(_CHOICE),
                world=sharing,
            )
            for request in requests
        ]
        requests = [
            request
            if choice is None
            else dataclasses.replace(request, recipe=choice.applied(request.loaded))
            for request, choice in zip(requests, budgets, strict=True)
        ]
    plans = [
        make_plan(
            model,
            request.loaded,
            format_name=request.format,
            max_shard_bytes=request.max_shard_bytes,
            allow_unreadable=request.allow_unreadable,
        )
        for request in requests
    ]
    given_stats = [_given(model, request) for request in requests]
    calibrated = next(
        (
            r
            for r, told in zip(requests, given_stats, strict=True)
            if told is None and r.loaded.calibrated
        ),
        None,
    )
    if calibrated is not None and shared is None:
        shared = _calibration(model, source, calibrated, tokenizer)
        if shared.pictured is None:
            model.check_replay(shared.ids[:1, :64])
    jobs = []
    for request, plan, choice, told in zip(requests, plans, budgets, given_stats, strict=True):
        if told is not None:
            plan = dataclasses.replace(plan, notes=(*plan.notes, told.note))
        if request.reader is not None and (reason := plan.readers[request.reader]) is not None:
            raise FormatError(f"--for {request.reader}: {reason}")
        calibration = shared if request.loaded.calibrated and told is None else None
        prediction = predict(
            model, plan, calibration, device=device, processes=world.size, here=world.here
        )
        prediction.check(request.max_ram_bytes)
        max_vram = request.max_vram_bytes if device.startswith("cuda") else None
        prediction.check_vram(max_vram)
        jobs.append(
            Job(
                model=model,
                plan=plan,
                calibration=calibration,
                prediction=prediction,
                fingerprint={
                    **_fingerprint(source, request, calibration, plan.format, device),
                    **_chosen(choice),
                    **({} if told is None else {"imatrix": told.fingerprint}),
                },
                given=told,
                budget=choice,
                max_ram=request.max_ram_bytes,
                max_vram=max_vram,
                device=device,
                world=world,
            )
        )
    if shared is not None and shared.pictured is not None:
        # Last, as it takes the memory that was predicted.
        ids = shared.ids[:1, : shared.pictured.lengths[0]]
        with model.towers.loaded():
            model.check_replay(ids, shared.pictured.inputs(0))
        release_free_memory()
    return jobs


def prepare_text(given: str, request: QuantizeOptions) -> tuple[CausalModel, Calibration, str]:
    """The model, the calibration text, and the device, for what only looks at activations."""
    device = device_of([request])
    source, model = _opened(given, [request], None, device)
    calibration = _calibration(model, source, request, None)
    if calibration.pictured is None:
        model.check_replay(calibration.ids[:1, :64])
    return model, calibration, device


def _opened(
    given: str | PreTrainedModel | Reader,
    requests: Sequence[QuantizeOptions],
    tokenizer: Any,
    device: str,
) -> tuple[Source, CausalModel]:
    """The source as quantized weights are named in it, and its model without weights."""
    source: Source
    if isinstance(given, Reader):
        source = given
    else:
        source = open_asked(given, requests, tokenizer=tokenizer)
    first = requests[0]
    if first.requantize and isinstance(source.config.get("quantization_config"), dict):
        source = Unpacked.open(source, trust_remote_code=first.trust_remote_code)
    refuse_quantized(source)
    source = split_experts(source, trust_remote_code=first.trust_remote_code)
    model = CausalModel.open(
        source,
        trust_remote_code=first.trust_remote_code,
        dtype=_compute_dtype(device, requests),
        device=device,
    )
    if (rotation := _rotation(requests)) is not None:
        part = first.loaded.make_rotation()
        assert part is not None
        model = rotate(model, part, rotation, trust_remote_code=first.trust_remote_code)
    return source, model


def _given(model: CausalModel, request: QuantizeOptions) -> GivenStats | None:
    """The imatrix that a request names.  RecipeError with a format or option that it is not for."""
    if request.imatrix is None:
        return None
    if whole_format(request) is None or request.has_budget:
        raise RecipeError(
            "--imatrix is for --format gguf with a named scheme: its names are those of a GGUF; "
            "leave it out"
        )
    if request.loaded.rotation is not None:
        raise RecipeError(
            "--imatrix is of the model as it is, and the recipe's rotation changes what weights "
            "read; leave one of them out"
        )
    return GivenStats(Path(request.imatrix), model, request.loaded)


def _earlier(out: Path) -> dict[str, str]:
    """The fingerprint of what lies at `out`, or is on its way there; empty if nothing does."""
    return earlier_fingerprint(out) or earlier_fingerprint(checkpoint_beside(out))


def _rotation(requests: Sequence[QuantizeOptions]) -> PartSpec | None:
    """The rotation of all recipes.  RecipeError where they differ: jobs share a model."""
    asked = list(dict.fromkeys(request.loaded.rotation for request in requests))
    if len(asked) > 1:
        listed = ", ".join("none" if spec is None else spec.name for spec in asked)
        raise RecipeError(
            f"methods with different rotations ({listed}) cannot be compared in one run: they "
            "share the model's statistics; quantize with each"
        )
    return asked[0]


def _chosen(choice: Choice | None) -> dict[str, str]:
    """What a budget adds to the fingerprint, where a run that goes on finds the choice."""
    if choice is None:
        return {}
    return {"bits": choice.asked, _CHOICE: json.dumps(choice.to_dict(), sort_keys=True)}


def _calibration(
    model: CausalModel, source: Source, request: QuantizeOptions, tokenizer: Any
) -> Calibration:
    text_config = model.text_config
    trusted = request.trust_remote_code
    given = tokenizer if hasattr(tokenizer, "image_processor") else None
    tokenizer = tokenizer if given is None else given.tokenizer
    ready = holds_token_ids(request.calibration) or holds_inputs(request.calibration)
    if tokenizer is None and not ready:
        tokenizer = load_tokenizer(source, trust_remote_code=trusted)
    images = None
    if model.towers.takes_images:
        images = ImageReader(
            processor=lambda: given or load_processor(source, trust_remote_code=trusted),
            takes=tuple(model.towers.takes),
            placeholders=model.towers.placeholders(),
        )
    return load_calibration(
        request.calibration,
        tokenizer=tokenizer,
        samples=request.loaded.samples,
        seq_len=request.loaded.seq_len,
        seed=request.seed,
        max_length=model.positions,
        vocab_size=text_config.vocab_size,
        images=images,
        framed=model.reads_texts or MODULES in source.side_files(),
    )


def _compute_dtype(device: str, requests: Sequence[QuantizeOptions]) -> torch.dtype | None:
    """The dtype blocks run in: None for the model's own, float32 on a CPU without bfloat16 units.

    GGUF's blocks run in float32, as llama.cpp decodes them; jobs that share a model must agree.

    There bfloat16 products take four times as long as float32 ones, and the result is rounded to
    the stored dtype all the same.
    """
    whole = [fmt for request in requests if (fmt := whole_format(request)) is not None]
    if whole and len(whole) < len(requests):
        raise FormatError(
            "gguf cannot be compared with other formats in one run: its blocks run in float32; "
            "compare gguf with gguf"
        )
    if whole:
        return dtype_of(whole[0].compute_dtype)
    return torch.float32 if device == "cpu" and not has_bf16_units() else None


def _fingerprint(
    source: Source,
    request: QuantizeOptions,
    calibration: Calibration | None,
    fmt: Format,
    device: str,
) -> dict[str, str]:
    """Everything the result's bytes depend on; a run is resumed only if all of it is the same."""
    if device == "cpu":
        hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    else:
        hardware = torch.cuda.get_device_name(device)
    return {
        "model": source.fingerprint(),
        "side files": source.fingerprint_beside(),
        "recipe": json.dumps(request.loaded.to_dict(), sort_keys=True),
        "third-party parts": request.loaded.code() or "none",
        "calibration": "none" if calibration is None else calibration.fingerprint,
        "format": f"{fmt.name} {code_of(fmt)}".rstrip(),
        "max shard bytes": str(request.max_shard_bytes),
        "trust_remote_code": str(request.trust_remote_code),
        "requantize": str(request.requantize),
        "device": device.split(":")[0],
        "hardware": hardware,
        "sums": ORDER,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "quantkit version": __version__,
        **{f"{name} version": version(name) for name in _VERSIONED},
    }
