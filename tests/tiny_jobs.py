"""Runs of the whole pipeline on tiny models: a few sequences of generated text, one thread."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit.calibration.processes.ranks import ALONE
from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.manifest import RUN
from quantkit.cli.app import main
from quantkit.formats.registry import format_of
from quantkit.methods.recipe import Recipe, load_recipe
from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.session import Job, Outcome, run

SAMPLES, SEQ_LEN = 8, 32


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which torch uses one thread: tiny products are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_text(directory: Path) -> Path:
    """A text file of random words, enough for `SAMPLES` sequences of the byte-level tokenizer."""
    generator = random.Random(0)
    words = [
        "all",
        "work",
        "and",
        "no",
        "play",
        "makes",
        "a",
        "dull",
        "text",
        "to",
        "calibrate",
        "any",
        "small",
        "model",
        "on",
    ]
    path = directory / "calibration.txt"
    path.write_text(" ".join(generator.choice(words) for _ in range(SAMPLES * SEQ_LEN)))
    return path


def build(kind: str, directory: Path, **overrides: Any) -> Path:
    """A tiny float32 model with two blocks and a calibration text beside its weights."""
    layers = next(k for k in ("num_hidden_layers", "n_layer", "num_layers") if k in _settings(kind))
    if kind == "gemma3_text":
        overrides.setdefault("layer_types", ["sliding_attention", "full_attention"])
    if kind == "cohere2":
        overrides.setdefault("layer_types", ["sliding_attention", "full_attention"])
    tiny.build(kind, directory, **{layers: 2, **overrides})
    write_text(directory)
    return directory


def _settings(kind: str) -> dict[str, Any]:
    return {**tiny.CONFIGS, **tiny.OTHERS}[tiny.VARIANTS.get(kind, (kind, {}))[0]]


def make_job(
    model: Path | PreTrainedModel,
    method: str | None = "rtn",
    scheme: str | None = "w4a16_g32",
    *,
    recipe: Recipe | None = None,
    text: Path | None = None,
    head: str | None = None,
    skip: tuple[str, ...] = (),
    overrides: tuple[str, ...] = (),
    kv: str | None = None,
    experts: str | None = None,
    **request: Any,
) -> Job:
    """The planned job of a method on a tiny model."""
    if recipe is None:
        recipe = load_recipe(
            method,
            scheme=scheme,
            samples=SAMPLES,
            seq_len=SEQ_LEN,
            head=head,
            skip=skip,
            overrides=overrides,
            kv=kv,
            experts=experts,
        )
    source = model if isinstance(model, PreTrainedModel) else str(model)
    if text is None and isinstance(model, Path):
        text = model / "calibration.txt"
    request.setdefault("calibration", str(text))
    tokenizer, world = request.pop("tokenizer", None), request.pop("world", ALONE)
    options = QuantizeOptions(recipe=recipe, **request)
    return prepare(source, options, tokenizer=tokenizer, world=world)


def finish(job: Job, out: Path, **options: Any) -> Outcome:
    """The outcome of running a job quietly."""
    return run(job, out, progress=False, **options)


def hashes(out: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file but run.json, which holds times."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and name != RUN:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def dequantized(model: Path, out: Path) -> PreTrainedModel:
    """The source model with every tensor that the output holds, decoded weight by weight."""
    source = FileSource(out)
    fmt = format_of(source)
    stored = fmt.weights(source)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    taken = {name for weight in stored.values() for name in weight.tensors}
    taken |= {name for name in source.names() if name.endswith((".k_scale", ".v_scale"))}
    state = {name: source.read(name) for name in source.names() if name not in taken}
    for name, weight in stored.items():
        value = fmt.unpack(weight, source).dequantize(torch.float32)
        own = dense.state_dict().get(name)
        state[name] = value if own is None or own.shape == value.shape else value.t()
    if (head := "lm_head.weight") in stored and dense.config.tie_word_embeddings:
        dense.lm_head.weight = torch.nn.Parameter(state[head].clone())
    missing, unexpected = dense.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    return dense.eval()


def ids() -> torch.Tensor:
    """Token ids [1, 48] of text like the calibration's, for comparing logits."""
    text = "no model play makes any dull text small and all work to calibrate on a"
    found: torch.Tensor = tiny.tokenizer()(text, return_tensors="pt").input_ids
    return found[:, :48]


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits [1, 48, V] of `ids` in float32."""
    with torch.no_grad():
        found: torch.Tensor = model(ids()).logits
    return found.float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative difference of two sets of logits."""
    return float((a - b).norm() / b.norm())


def command(*arguments: object) -> int:
    """The exit code of the command line, run in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    code = caught.value.code
    assert isinstance(code, int)
    return code
