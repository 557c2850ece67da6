"""Whether a finished checkpoint is whole and holds what it should, read back from disk.

One way for every container: the files, their headers, that all tensors are there (`coverage`), what
they hold and what they were made from (`numbers`), and a runtime's own answer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from quantkit.checkpoint.door import given_path
from quantkit.checkpoint.manifest import MANIFEST, verify_manifest
from quantkit.checkpoint.record import holds_numbers_of, read_report
from quantkit.checkpoint.source import Source
from quantkit.checks.against import vectors_since
from quantkit.checks.coverage import Entry, Spelling, by_model, by_report, read_entries, respelled
from quantkit.checks.numbers import Reference, number_checks
from quantkit.checks.result import Check, VerifyResult
from quantkit.checks.runtimes import compare_runtime
from quantkit.errors import QuantkitError, UnsoundError
from quantkit.formats.open import container_here, container_of, open_source
from quantkit.formats.registry import format_of, reader_of
from quantkit.model import skeleton
from quantkit.model.decoded import Unpacked
from quantkit.model.names import map_names
from quantkit.model.rotations.rotated import rotated_since
from quantkit.model.split_experts import split_experts
from quantkit.model.views import converted, under_owners

# Problems that an error names.
_SHOWN = 3
_HEAD = "lm_head.weight"
_FOREIGN = "no manifest: not an output of quantkit"


def verify(
    out: str | Path,
    *,
    against: object = None,
    runtime: str | None = None,
    runtime_python: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> VerifyResult:
    """All checks of the checkpoint at `out`; `against` is its source: path, Hub name or live model.

    `out` is a directory, or a GGUF or ONNX file.  `runtime` names a program (transformers, vllm,
    llama.cpp, onnxruntime) that is asked to load and run it too, in `runtime_python`'s environment
    if it is not in this one.  What is wrong with `out` is in the result.  Raises CheckpointError
    if there is no `out`, `against` cannot be opened, or the runtime is not installed, does not
    read this kind of checkpoint or cannot load it.
    """
    path = given_path(out)
    file = container_here(path)
    reference: Source | None = None
    if against is not None:
        reference = open_source(against, revision=revision)
    checks = [_files(path, file), *_contents(path, file, reference, trust_remote_code)]
    if runtime is not None and all(check.ok for check in checks):
        checks.append(_runtime(path, runtime, runtime_python, trust_remote_code))
    return VerifyResult(path=path, checks=tuple(checks))


def refuse_unsound(partial: Path) -> None:
    """Nothing if an output that is about to be finished passes all checks that need no other model.

    Only the manifest is not looked at, which comes after.  Reads everything once, a weight at a
    time.  Raises UnsoundError that names what is wrong.
    """
    checks = _contents(partial, container_of(partial), None, False)
    problems = [problem for check in checks for problem in check.problems]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UnsoundError(
            f"{partial}: not finished, because `quantkit verify` would reject it: "
            f"{'; '.join(problems[:_SHOWN])}{more}. The disk may be faulty: run the same command "
            "with --fresh; if that says the same, this is a fault of quantkit's, please report it"
        )


def _contents(
    path: Path, file: Path | None, reference: Source | None, trust_remote_code: bool
) -> list[Check]:
    """All checks but that of the manifest; `file` is the container at `path`, if it is one."""
    try:
        opened = _Opened.at(path if file is None else file, trust_remote_code)
        checks = [opened.headers(), opened.coverage()]
        original = None if reference is None else opened.reference(reference)
    except QuantkitError as error:
        return [Check(name="headers", detail="cannot be read", problems=(str(error),))]
    found = number_checks(
        opened.view, opened.entries, original, unties_head=bool(opened.report.get("unties_head"))
    )
    return [*checks, *found]


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A checkpoint whose headers, configuration and report could be read.

    `entries` are what the report, if there is one, tells of each tensor of the source, by the names
    that the checkpoint's own file has; `known` are the source's names for them.
    """

    view: Unpacked
    report: Mapping[str, Any]
    entries: tuple[Entry, ...]
    known: frozenset[str]
    trust_remote_code: bool

    @classmethod
    def at(cls, path: Path, trust_remote_code: bool) -> _Opened:
        """The checkpoint in a directory, or in a file.  Raises QuantkitError."""
        source = open_source(path)
        # A file of floats alone is a model too; a directory of them is no output of anybody.
        fmt = reader_of(source) if source.recast else format_of(source)
        view = Unpacked(source, fmt, {} if fmt is None else fmt.weights(source))
        report = {} if source.home is None else read_report(source.home)
        entries = read_entries(report)
        return cls(
            view=view,
            report=report,
            entries=respelled(entries, view),
            known=frozenset(entry.name for entry in entries) or frozenset(view.names()),
            trust_remote_code=trust_remote_code,
        )

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model without weights, asked where no report lists tensors.  Raises QuantkitError."""
        return skeleton.build(self.view, trust_remote_code=self.trust_remote_code, dtype=None)

    def headers(self) -> Check:
        """What the headers tell."""
        name = "not quantized" if self.view.format is None else self.view.format.name
        tensors, weights = len(self.view.packed.names()), len(self.view.stored)
        detail = f"{name}: {tensors} tensors, {weights} quantized weights"
        return Check(name="headers", detail=detail)

    def coverage(self) -> Check:
        """Whether all tensors are there.  Raises QuantkitError if the model cannot be built."""
        if not self.entries:
            return by_model(self.view, self.model)
        unties_head = bool(self.report.get("unties_head"))
        return by_report(self.view, self.entries, unties_head=unties_head)

    def reference(self, source: Source) -> Reference:
        """The model that this one was made from, as `quantize` saw it."""
        vectors = vectors_since(self.view, source, self.report)
        here = Spelling(self.view.names())
        codes = None
        if isinstance(source.config.get("quantization_config"), dict):
            source = codes = Unpacked.open(source, trust_remote_code=self.trust_remote_code)
        optional: set[str] = set()
        if not self.entries:
            optional |= set(map_names(self.model, source).unmapped)
            if getattr(self.model.config.get_text_config(), "tie_word_embeddings", False):
                optional.add(_HEAD)
        same = codes is not None and holds_numbers_of(self.view.home, codes.packed)
        degraded = self.report.get("degraded") or {}
        original = _original(source, self.known, self.trust_remote_code)
        return Reference(
            source=rotated_since(self.view.home, original),
            codes=codes if same else None,
            rounded=frozenset(here(name) or name for name in degraded),
            vectors=vectors,
            optional=optional,
        )


def _original(source: Source, known: frozenset[str], trust_remote_code: bool) -> Source:
    """The source with its experts one by one.

    Tied weights have their owners' names, unless the report knows them by those of the file.
    """
    source = split_experts(source, trust_remote_code=trust_remote_code)
    if known >= set(source.names()):
        return source
    model = skeleton.build(source, trust_remote_code=trust_remote_code, dtype=None)
    source = converted(source, model)
    return under_owners(source, model, map_names(model, source))


def _files(path: Path, file: Path | None) -> Check:
    """Size and sha256 of everything that a manifest names, or of `file` alone if `path` is it."""
    home = path if file is None else file.parent
    # The graph of a Triton model lies a directory below what describes it.
    homes = (home,) if file is None else (home, home.parent)
    folder = next((folder for folder in homes if (folder / MANIFEST).is_file()), None)
    if folder is None:
        # Ours without a manifest are unfinished; others have neither.
        ours = (home / "quantkit").is_dir()
        problems = verify_manifest(home) if ours else []
        return Check(
            name="files",
            detail="manifest: size and sha256" if ours else _FOREIGN,
            problems=tuple(problems),
        )
    problems = verify_manifest(folder)
    if path == file:
        name = file.relative_to(folder).as_posix()
        problems = [text for text in problems if text.startswith((f"{name}: ", f"{name}.data: "))]
    return Check(name="files", detail="manifest: size and sha256", problems=tuple(problems))


def _runtime(path: Path, runtime: str, python: Path | None, trust: bool) -> Check:
    found = compare_runtime(path, runtime, python=python, trust_remote_code=trust)
    return Check(
        name="runtime",
        detail=f"{found.runtime} {found.version}: {found.agreed} of {found.tokens} greedy tokens "
        f"are quantkit's own, worst gap {found.worst_gap:.3f}",
        problems=found.problems,
    )
