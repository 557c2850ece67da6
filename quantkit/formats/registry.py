"""How a name finds its format, and a checkpoint its own: the file name is the registry.

`--format compressed-tensors` means class `CompressedTensors` in formats/compressed_tensors.py;
`package.module:Class` names a third party's, and an installed package announces its own as an
entry point of the group `quantkit.formats`: only such a one is found when a checkpoint names it.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from quantkit.checkpoint.source import Source
from quantkit.errors import FormatError
from quantkit.formats.format import Format, FormatReader, PlannedWeight, WholeFormat
from quantkit.methods.parts import imported
from quantkit.numbers.scheme import Scheme

_PACKAGE = "quantkit.formats"
_ENTRY_POINTS = "quantkit.formats"


def available_formats() -> list[str]:
    """Names of the built-in formats, sorted."""
    package = importlib.import_module(_PACKAGE)
    names = (m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_")
    found = (_class_of(name) for name in names)
    return sorted(cls.name for cls in found if cls is not None)


def installed_formats() -> list[str]:
    """Names of the formats that other installed packages bring, sorted."""
    return sorted(set(entry_points(group=_ENTRY_POINTS).names) - {*available_formats()})


def make_format(name: str) -> Format:
    """The format of that name.  Raises FormatError listing the known ones."""
    if ":" in name:
        found = imported(name, "format", FormatError)
        try:
            made = found()
        # Code of others, which may fail in any way.
        except Exception as error:
            raise FormatError(f"format {name!r} cannot be made: {error}") from error
        return demand_writer(made)
    if name in available_formats() and (cls := _class_of(name)) is not None:
        return cls()
    if (found := _installed(name)) is not None:
        return demand_writer(found)
    known = ", ".join([*available_formats(), *installed_formats()])
    raise FormatError(f"format {name!r} is unknown; known: {known}, or package.module:Class")


def code_of(fmt: FormatReader) -> str:
    """sha256 of the file a third party's format comes from; empty for a built-in one."""
    module = type(fmt).__module__
    file = sys.modules[module].__file__
    if module.startswith(f"{_PACKAGE}.") or file is None:
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def default_format(scheme: Scheme) -> str:
    """The format a scheme is written in unless another is asked for.

    compressed-tensors for integers and floats, bitsandbytes for NF4 and FP4, gguf for ggml's
    blocks.  Raises FormatError if no built-in format holds the scheme.
    """
    for name in ("compressed-tensors", "bitsandbytes", "gguf"):
        if make_format(name).supports(scheme) is None:
            return name
    raise FormatError(f"scheme {scheme.name}: no format holds it; " + _holders(scheme))


def default_scheme(format_name: str | None) -> str | None:
    """The scheme that goes with a format; None where that is for the method to say."""
    fmt = None if format_name is None else make_format(format_name)
    return fmt.default_scheme if isinstance(fmt, WholeFormat) else None


def asked_format(format_name: str | None, scheme: Scheme | None) -> Format | None:
    """The format that is named, or that a scheme of ggml's blocks means; None if neither is."""
    if format_name is not None:
        return make_format(format_name)
    if scheme is not None and scheme.kind == "ggml":
        return make_format(default_format(scheme))
    return None


def check_supported(chosen: Format, weights: Sequence[PlannedWeight]) -> None:
    """Nothing if the format can hold all weights as planned.

    Raises FormatError that names the weight, the reason, and the formats that can hold its scheme.
    """
    reasons: dict[Scheme, str | None] = {}
    for weight in weights:
        if weight.scheme is None:
            continue
        if weight.scheme not in reasons:
            reasons[weight.scheme] = chosen.supports(weight.scheme)
        reason = reasons[weight.scheme]
        if reason is not None:
            raise FormatError(
                f"{weight.name}: {chosen.name} cannot hold {weight.scheme.name}: {reason}; "
                + _holders(weight.scheme)
            )
        reason = chosen.supports_shape(weight)
        if reason is not None:
            raise FormatError(
                f"{weight.name}: {chosen.name} cannot hold shape {weight.shape}: {reason}"
            )
    if (reason := chosen.supports_together(weights)) is not None:
        raise FormatError(f"{chosen.name}: {reason}")


def format_of(source: Source) -> FormatReader:
    """What reads a quantized checkpoint, by its `quantization_config`.

    Looks among the built-in formats and those of installed packages.  Raises FormatError if there
    is none or if nothing reads it.
    """
    config = source.config.get("quantization_config")
    if not isinstance(config, dict):
        raise FormatError("config.json has no quantization_config: the model is not quantized")
    method = config.get("quant_method")
    version = ""
    if method == "gptq":
        # Files older than version 2 do not say which they are.
        version = str(config.get("checkpoint_format", "gptq"))
        if version in ("gptq", "gptq_v2"):
            return make_format(version)
    elif isinstance(method, str) and method.partition("_")[0] == "modelopt":
        # vLLM has names of its own for kinds of it: modelopt_fp4, modelopt_mxfp8.
        return make_format("modelopt")
    elif method in ("awq", "compressed-tensors", "bitsandbytes", "fp8", "mxfp4", "onnx"):
        return make_format(method)
    elif isinstance(method, str) and (found := _installed(method)) is not None:
        return found
    known = ", ".join([*available_formats(), *installed_formats()])
    told = f"quant_method {method!r}" + (f" as {version!r}" if version else "")
    raise FormatError(f"quantization_config: {told} is not read; known: {known}")


def reader_of(source: Source) -> FormatReader | None:
    """What reads a source's quantized weights, whoever decodes them; None if it has none.

    Raises FormatError if nothing reads them.
    """
    if source.packed_as is not None:
        return make_format(source.packed_as)
    return format_of(source) if "quantization_config" in source.config else None


def demand_writer(reader: FormatReader) -> Format:
    """The reader, if it is a format that writes too; else FormatError."""
    if isinstance(reader, Format):
        return reader
    name = getattr(reader, "name", type(reader).__name__)
    if not isinstance(reader, FormatReader):
        raise FormatError(f"{name}: it is no Format as quantkit/formats/format.py defines it")
    known = ", ".join(available_formats())
    raise FormatError(f"{name}: the format is read, not written; written are: {known}")


def _installed(name: str) -> FormatReader | None:
    """The format that an installed package brings under this name; None if none does."""
    for entry in entry_points(group=_ENTRY_POINTS, name=name):
        try:
            made = entry.load()()
        # Code of others, which may fail in any way.
        except Exception as error:
            raise FormatError(
                f"format {name!r}: {entry.value} of an installed package cannot be made: {error}"
            ) from error
        if not isinstance(made, FormatReader) or made.name != name:
            raise FormatError(
                f"format {name!r}: {entry.value} of an installed package is no format of this name"
            )
        return made
    return None


def _class_of(name: str) -> type[Any] | None:
    """The class that a file of the formats' folder is named after; None if it holds no such one.

    A folder has it in its format.py.
    """
    stem = name.replace("-", "_")
    class_name = "".join(word.capitalize() for word in stem.split("_"))
    module = importlib.import_module(f"{_PACKAGE}.{stem}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{_PACKAGE}.{stem}.format")
    found = getattr(module, class_name, None)
    # Helpers of the formats lie there too; a class that writes has a name of its own.
    writes = isinstance(found, type) and hasattr(found, "pack")
    return found if writes and isinstance(getattr(found, "name", None), str) else None


def _holders(scheme: Scheme) -> str:
    able = [name for name in available_formats() if make_format(name).supports(scheme) is None]
    return f"formats that can: {', '.join(able)}" if able else "no built-in format can"
