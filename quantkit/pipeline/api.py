"""The Python API: one function over the same pipeline as the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, overload

from torch import Tensor

from quantkit.calibration.tokens import CalibrationSource
from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.live import LiveSource
from quantkit.checkpoint.memory import parse_size
from quantkit.errors import OutputError
from quantkit.formats.format import StoredWeight, default_scheme
from quantkit.inference.load import install_
from quantkit.methods.recipe import load_recipe
from quantkit.model.names import map_names
from quantkit.model.split_experts import split_experts
from quantkit.numbers.tensor import QuantizedTensor
from quantkit.pipeline.job import Request, prepare
from quantkit.pipeline.plan import DEFAULT_SHARD_BYTES
from quantkit.pipeline.session import Job, run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@overload
def quantize(
    model: str | os.PathLike[str],
    method: str | None = ...,
    *,
    out: str | os.PathLike[str],
    calibration: CalibrationSource = ...,
    tokenizer: PreTrainedTokenizerBase | None = ...,
    scheme: str | None = ...,
    format: str | None = ...,
    samples: int | None = ...,
    seq_len: int | None = ...,
    seed: int = ...,
    recipe: str | os.PathLike[str] | None = ...,
    overrides: Sequence[str] = ...,
    skip: Sequence[str] = ...,
    lm_head: str | None = ...,
    max_ram: int | str | None = ...,
    max_vram: int | str | None = ...,
    max_shard_size: int | str = ...,
    device: str = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    allow_unreadable: bool = ...,
    requantize: bool = ...,
    fresh: bool = ...,
    progress: bool = ...,
) -> Path: ...


@overload
def quantize(
    model: PreTrainedModel,
    method: str | None = ...,
    *,
    out: str | os.PathLike[str] | None = ...,
    calibration: CalibrationSource = ...,
    tokenizer: PreTrainedTokenizerBase | None = ...,
    scheme: str | None = ...,
    format: str | None = ...,
    samples: int | None = ...,
    seq_len: int | None = ...,
    seed: int = ...,
    recipe: str | os.PathLike[str] | None = ...,
    overrides: Sequence[str] = ...,
    skip: Sequence[str] = ...,
    lm_head: str | None = ...,
    max_ram: int | str | None = ...,
    max_vram: int | str | None = ...,
    max_shard_size: int | str = ...,
    device: str = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    allow_unreadable: bool = ...,
    requantize: bool = ...,
    fresh: bool = ...,
    progress: bool = ...,
) -> PreTrainedModel: ...


def quantize(
    model: PreTrainedModel | str | os.PathLike[str],
    method: str | None = "awq",
    *,
    out: str | os.PathLike[str] | None = None,
    calibration: CalibrationSource = "demo",
    tokenizer: PreTrainedTokenizerBase | None = None,
    scheme: str | None = None,
    format: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    recipe: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    skip: Sequence[str] = (),
    lm_head: str | None = None,
    max_ram: int | str | None = None,
    max_vram: int | str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_BYTES,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_unreadable: bool = False,
    requantize: bool = False,
    fresh: bool = False,
    progress: bool = True,
) -> PreTrainedModel | Path:
    """The path `out` of the quantized checkpoint, or the quantized live model.

    A path is streamed, one block in memory at a time, to `out`.  A Hugging Face model is changed in
    place and returned, with quantized layers, ready for `generate`, `save_pretrained` and
    `push_to_hub`; its checkpoint goes to `out` too if that is given.  Calibration text for a live
    model needs its `tokenizer`.  Options are those of `quantkit quantize`; a `recipe` file replaces
    the method.  Raises QuantkitError, before anything is changed where that is possible.
    """
    request = Request(
        recipe=load_recipe(
            method if recipe is None else None,
            path=None if recipe is None else Path(recipe),
            overrides=overrides,
            scheme=scheme,
            skip=skip,
            head=lm_head,
            samples=samples,
            seq_len=seq_len,
            default_scheme=default_scheme(format),
        ),
        calibration=calibration,
        seed=seed,
        format_name=format,
        max_ram=_bytes(max_ram),
        max_vram=_bytes(max_vram),
        device=device,
        max_shard_bytes=_bytes(max_shard_size) or DEFAULT_SHARD_BYTES,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_unreadable=allow_unreadable,
        requantize=requantize,
    )
    if isinstance(model, str | os.PathLike):
        if out is None:
            raise OutputError("a model given by path is streamed to disk: say where with out=")
        job = prepare(os.fspath(model), request, tokenizer=tokenizer)
        return run(job, Path(out), fresh=fresh, progress=progress).out
    job = prepare(model, request, tokenizer=tokenizer)
    with TemporaryDirectory() as folder:
        target = Path(folder) / "quantized" if out is None else Path(out)
        written = run(job, target, fresh=fresh, progress=progress).out
        _install(model, job, written)
    return model


def _bytes(size: int | str | None) -> int | None:
    return parse_size(size) if isinstance(size, str) else size


def _install(model: PreTrainedModel, job: Job, written: Path) -> None:
    """Puts the quantized and rescaled tensors of a finished checkpoint into the live model."""
    source = FileSource(written)
    fmt = job.plan.format
    stored = fmt.weights(source)
    rescaled = [fate.name for fate in job.plan.fates if fate.fate == "rescaled"]
    install_(
        model,
        _Unpacked(stored, job, source),
        _Plain(rescaled, source),
        names=map_names(model, split_experts(LiveSource(model))),
        fmt=fmt,
        quantization_config=source.config["quantization_config"],
    )


class _Unpacked(Mapping[str, QuantizedTensor]):
    """Quantized weights of a checkpoint by name, unpacked when they are asked for."""

    def __init__(self, stored: Mapping[str, StoredWeight], job: Job, source: FileSource) -> None:
        self._stored, self._job, self._source = stored, job, source

    def __getitem__(self, name: str) -> QuantizedTensor:
        return self._job.plan.format.unpack(self._stored[name], self._source)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class _Plain(Mapping[str, Tensor]):
    """Some tensors of a checkpoint by name, read when they are asked for."""

    def __init__(self, names: Sequence[str], source: FileSource) -> None:
        self._names, self._source = tuple(names), source

    def __getitem__(self, name: str) -> Tensor:
        return self._source.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
