"""The Python API: one function over the same pipeline as the command line."""

from __future__ import annotations

import dataclasses
import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, cast, overload

from torch import Tensor

from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.live import LiveSource
from quantkit.errors import FormatError, OutputError
from quantkit.formats.format import BuiltFormat, StoredWeight
from quantkit.inference.load import install_
from quantkit.model.names import map_names
from quantkit.model.split_experts import split_experts
from quantkit.model.views import converted
from quantkit.numbers.tensor import QuantizedTensor
from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.session import Job, run

if TYPE_CHECKING:
    from transformers import PreTrainedModel


P = ParamSpec("P")


class Quantize(Protocol[P]):
    """A model, and the fields of QuantizeOptions: a path gives a path, a model itself."""

    @overload
    def __call__(
        self, model: str | os.PathLike[str], *args: P.args, **kwargs: P.kwargs
    ) -> Path: ...

    @overload
    def __call__(
        self, model: PreTrainedModel, *args: P.args, **kwargs: P.kwargs
    ) -> PreTrainedModel: ...

    def __call__(
        self, model: PreTrainedModel | str | os.PathLike[str], *args: P.args, **kwargs: P.kwargs
    ) -> PreTrainedModel | Path:
        """See `quantize`."""
        ...


def _taking(options: Callable[P, QuantizeOptions]) -> Callable[[Callable[..., Any]], Quantize[P]]:
    """The function with the parameters of the options after its model, for people and for mypy."""

    def decorate(function: Callable[..., Any]) -> Quantize[P]:
        own = list(inspect.signature(function).parameters.values())[:1]
        fields = list(inspect.signature(options).parameters.values())
        # All but the method are given by name.
        named = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in fields[1:]]
        signature = inspect.Signature([*own, fields[0], *named])
        function.__signature__ = signature  # type: ignore[attr-defined]
        return cast(Quantize[P], function)

    return decorate


@_taking(QuantizeOptions)
def quantize(
    model: PreTrainedModel | str | os.PathLike[str], method: str | None = None, **options: Any
) -> PreTrainedModel | Path:
    """The path `out` of the quantized checkpoint, or the quantized live model.

    A path is streamed, one block in memory at a time, to `out`.  A Hugging Face model is changed in
    place and returned, with quantized layers, ready for `generate`, `save_pretrained` and
    `push_to_hub`; its checkpoint goes to `out` too if that is given.  Calibration text for a live
    model needs its `tokenizer`.  Options are the fields of QuantizeOptions, those of
    `quantkit quantize`; a `recipe` file replaces the method.  Raises QuantkitError, before anything
    is changed where that is possible.
    """
    began = time.monotonic()
    asked = QuantizeOptions(method, **options)
    if asked.recipe is not None:
        # A method names a built-in recipe; with a file there is nothing to name.
        asked = dataclasses.replace(asked, method=None)
    if isinstance(model, str | os.PathLike):
        if asked.out is None:
            raise OutputError("a model given by path is streamed to disk: say where with out=")
        job = prepare(os.fspath(model), asked, tokenizer=asked.tokenizer, out=Path(asked.out))
        return _run(job, Path(asked.out), asked, began)
    kept = None if asked.out is None else Path(asked.out)
    job = prepare(model, asked, tokenizer=asked.tokenizer, out=kept)
    if job.plan.layout.side_files is not None or isinstance(job.plan.format, BuiltFormat):
        raise FormatError(
            f"a model in memory is changed in place, and {job.plan.format.name} is a file for "
            "other programs: save the model and give its path"
        )
    with TemporaryDirectory() as folder:
        target = Path(folder) / "quantized" if asked.out is None else Path(asked.out)
        written = _run(job, target, asked, began)
        _install(model, job, written)
    return model


def _run(job: Job, out: Path, asked: QuantizeOptions, began: float) -> Path:
    limit = asked.until_seconds
    return run(
        job,
        out,
        fresh=asked.fresh,
        progress=asked.progress,
        profile=None if asked.profile is None else Path(asked.profile),
        deadline=None if limit is None else began + limit,
    ).out


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
        names=map_names(model, converted(split_experts(LiveSource(model)), model)),
        fmt=fmt,
        quantization_config=source.config["quantization_config"],
        beside={f.name: source.read(f.name) for f in job.plan.fates if f.fate == "added"},
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
