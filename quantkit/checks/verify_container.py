"""Whether a GGUF or ONNX file is whole and holds what it should, read back from disk.

Works tensor by tensor: memory is bounded by the largest.
Letters: O out features, I in features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.checkpoint.manifest import MANIFEST, verify_manifest
from quantkit.checkpoint.record import REPORT, holds_numbers_of, read_report
from quantkit.checkpoint.source import Source
from quantkit.checks.against import (
    Vectors,
    compare_copied,
    compare_quantized,
    compare_rescaled,
    retargeted,
)
from quantkit.checks.result import Check, finite_problems, value_problems
from quantkit.errors import CheckpointError, ModelError, QuantkitError
from quantkit.formats.gguf.source import GgufSource
from quantkit.formats.open import open_source
from quantkit.formats.registry import format_of
from quantkit.model import skeleton
from quantkit.model.decoded import Unpacked
from quantkit.model.fold_vectors import folds_since
from quantkit.model.names import NameMap, check_complete, map_names
from quantkit.model.views import stored_under_partners
from quantkit.numbers.superblock import BLOCK_TYPES
from quantkit.numbers.tensor import QuantizedTensor

# Relative error of a whole tensor above which it is not the source's weight, by bits of its type:
# about three times what nearest rounding of normal numbers gives.
_LIMITS = {2: 0.9, 3: 0.7, 4: 0.4, 5: 0.2, 6: 0.1, 8: 0.03}
# Codes are kept from a quantized source; minima are rounded to float16.
_KEPT_LIMIT = 0.004
_ELEMENTS = 1 << 24
_HEAD = "lm_head.weight"


def container_checks(
    file: Path, reference: Source | None, *, trust_remote_code: bool = False
) -> list[Check]:
    """Every check of the model in `file` but that of the manifest.

    `reference` is the model it was made from, quantized or not.  What is wrong is in the checks.
    """
    try:
        view = _opened(file)
        folds = folds_since(view.home, None if reference is None else reference.home)
        moved = retargeted(read_report(file.parent) or {})
        vectors = Vectors(_named(folds, view), moved)
        model = skeleton.build(view, trust_remote_code=False, dtype=None)
        view.transposed = skeleton.conv1d_names(model, view.names())
        names = map_names(model, view)
    except QuantkitError as error:
        return [Check(name="headers", detail="cannot be read", problems=(str(error),))]
    checks = [Check(name="headers", detail=_described(view))]
    problems = [f"{name}: no parameter of the model takes it" for name in names.unmapped]
    try:
        check_complete(names, [name for name, _ in model.named_parameters()])
    except (CheckpointError, ModelError) as error:
        problems.append(str(error))
    problems += _report_problems(file, view)
    detail = f"{len(view.names())} tensors for the parameters of a {view.config['model_type']}"
    checks.append(Check(name="coverage", detail=detail, problems=tuple(problems)))
    other: Source | None = reference
    if reference is not None and isinstance(reference.config.get("quantization_config"), dict):
        other = Unpacked.open(reference, trust_remote_code=trust_remote_code)
    same = isinstance(other, Unpacked) and holds_numbers_of(view.home, other.packed)
    return [*checks, *_numbers(view, other, vectors, model, same=same)]


def _named(folds: Mapping[str, Tensor], view: Unpacked) -> dict[str, Tensor]:
    """The vectors by the file's names; a checkpoint of GPT-2 may lack `transformer.`."""
    names = set(view.names())
    longer = {name.partition(".")[2]: name for name in names}
    found = {}
    for key, vector in folds.items():
        name, _, axis = key.rpartition(":")
        found[f"{name if name in names else longer.get(name, name)}:{axis}"] = vector
    return found


def check_files(path: Path, file: Path) -> Check:
    """Size and sha256 of everything in the directory of `file`, or of it alone if `path` is it."""
    folder = next((f for f in (file.parent, file.parent.parent) if (f / MANIFEST).is_file()), None)
    if folder is None:
        # Ours without a manifest are unfinished; others have neither.
        ours = (file.parent / "quantkit").is_dir()
        return Check(
            name="files",
            detail="no manifest: not an output of quantkit",
            problems=tuple(verify_manifest(file.parent)) if ours else (),
        )
    problems = verify_manifest(folder)
    if path == file:
        name = file.relative_to(folder).as_posix()
        problems = [text for text in problems if text.startswith((f"{name}: ", f"{name}.data: "))]
    return Check(name="files", detail="manifest: size and sha256", problems=tuple(problems))


def _opened(file: Path) -> Unpacked:
    source = open_source(file)
    if "quantization_config" not in source.config:
        return Unpacked(source, None, {})
    fmt = format_of(source)
    return Unpacked(source, fmt, fmt.weights(source))


def _described(view: Unpacked) -> str:
    source = view.packed
    if isinstance(source, GgufSource):
        types = Counter(tensor.type for tensor in source.header.tensors.values())
        told = ", ".join(f"{count} {label}" for label, count in sorted(types.items()))
        return f"gguf version {source.header.version}: {told}"
    return f"onnx: {len(view.names())} tensors, {len(view.stored)} quantized weights"


def _report_problems(file: Path, view: Unpacked) -> Iterator[str]:
    """What the report beside a GGUF file says of its types that is not so."""
    source = view.packed
    if not isinstance(source, GgufSource):
        return
    try:
        report = read_report(file.parent)
        # Reports of earlier releases had types by the file's own names.
        types = report.get("types") or {}
        schemes = {
            str(tensor["output"][0]): str(tensor["scheme"])
            for tensor in report.get("tensors") or ()
            if tensor.get("scheme") is not None
        }
    except CheckpointError as error:
        yield str(error)
        return
    except (LookupError, TypeError) as error:
        yield f"{REPORT}: its tensors cannot be read ({error!r})"
        return
    for name, label in types.items():
        tensor = source.header.tensors.get(name)
        found = "not in the file" if tensor is None else f"stored as {tensor.type}"
        if tensor is None or tensor.type != label:
            yield f"{name}: {found}, the report says {label}"
    names = set(source.names())
    # A checkpoint of GPT-2 may lack `transformer.`.
    longer = {name.partition(".")[2]: name for name in names}
    for name, scheme in schemes.items():
        stored = name if name in names else longer.get(name)
        found = "not in the file" if stored is None else source.type_of(stored).lower()
        if found != scheme:
            yield f"{name}: {found}, the report says {scheme}"


@dataclass(kw_only=True)
class _Tally:
    """What the pass over all tensors has found so far."""

    numbers: list[str] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    worst: float = 0.0
    worst_name: str = ""

    def add(self, name: str, error: float, limit: float) -> None:
        """Takes up the relative error of a tensor."""
        if error > self.worst:
            self.worst, self.worst_name = error, name
        if not error <= limit:
            self.source.append(
                f"{name}: relative error {error:.4f}, its type causes at most {limit}; it is not "
                "this source's weight, or was damaged on the way"
            )


def _numbers(
    view: Unpacked,
    reference: Source | None,
    vectors: Vectors,
    model: PreTrainedModel,
    *,
    same: bool,
) -> Iterator[Check]:
    """`same`: the reference's codes must be found again, not only its values."""
    tally = _Tally()
    needed: set[str] = set()
    partners: dict[str, str] = {}
    if reference is not None:
        mapped = map_names(model, reference)
        needed, partners = _needed(reference, model, mapped), stored_under_partners(model, mapped)
    for name in view.names():
        spelled = partners.get(name, name)
        other = None if reference is None else _Reference.of(spelled, reference, same=same)
        if reference is not None and other is None and name != _HEAD:
            tally.source.append(f"{name}: not in the source")
        if other is not None:
            needed.discard(other.name)
        try:
            if isinstance(view.packed, GgufSource):
                _gguf_tensor(view, name, other, vectors, tally)
            elif name in view.stored:
                _quantized(view, name, other, vectors, tally)
            else:
                tally.numbers += finite_problems(name, view)
                if other is not None and vectors.change(name):
                    tally.source += compare_rescaled(name, view, other.source, vectors)
                elif other is not None:
                    tally.source += compare_copied(name, view, other.source)
        except CheckpointError as error:
            tally.numbers.append(str(error))
    yield Check(
        name="numbers",
        detail=f"scales, codes and values of {len(view.names())} tensors",
        problems=tuple(tally.numbers),
    )
    if reference is None:
        return
    tally.source += [f"{name}: in the source, but not in the file" for name in sorted(needed)]
    yield Check(
        name="source",
        detail=f"largest relative error of a tensor {tally.worst:.4f} "
        f"({tally.worst_name or 'none differs'})",
        problems=tuple(tally.source),
    )


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """The tensor of the source that one of ours was made from; `same`: with the same codes."""

    source: Source
    name: str
    same: bool

    @classmethod
    def of(cls, name: str, source: Source, *, same: bool) -> _Reference | None:
        """None if the source has no such tensor; GPT-2's may lack `transformer.`."""
        names = source.names()
        found = (known for known in (name, name.partition(".")[2]) if known in names)
        return next((cls(source=source, name=known, same=same) for known in found), None)

    @property
    def quantized(self) -> QuantizedTensor | None:
        """The source's own codes, None if ours are others or it has none."""
        view = self.source
        if self.kept and isinstance(view, Unpacked):
            return view.quantized(self.name)
        return None

    @property
    def kept(self) -> bool:
        """True if it is quantized in the source, and ours are the same codes."""
        return self.same and isinstance(self.source, Unpacked) and self.name in self.source.stored


def _needed(reference: Source, model: PreTrainedModel, mapped: NameMap) -> set[str]:
    """The source's tensors that a file must hold: a tied head and old buffers need not be."""
    names = set(reference.names()) - set(mapped.unmapped)
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return names - ({_HEAD} if tied else set())


def _quantized(
    view: Unpacked, name: str, other: _Reference | None, vectors: Vectors, tally: _Tally
) -> None:
    """A weight whose codes can be had; those of a quantized source must be the very same."""
    tensor = view.quantized(name)
    tally.numbers += value_problems(name, tensor)
    if other is None:
        return
    if (expected := other.quantized) is not None:
        same = torch.equal(tensor.codes, expected.codes) and torch.equal(
            tensor.dequantize(torch.float32), expected.dequantize(torch.float32)
        )
        tally.source += [] if same else [f"{name}: not the numbers of the source"]
        return
    error, problems = compare_quantized(name, other.name, tensor, other.source, vectors)
    tally.source += problems
    if error > tally.worst:
        tally.worst, tally.worst_name = error, name


def _gguf_tensor(
    view: Unpacked, name: str, other: _Reference | None, vectors: Vectors, tally: _Tally
) -> None:
    """A tensor as its values; blocks cannot have codes out of range, only scales can be wrong."""
    source = view.packed
    assert isinstance(source, GgufSource)
    info, label = source.info(name), source.type_of(name)
    if not source.is_finite(name):
        tally.numbers.append(f"{name}: holds NaN or infinity ({label})")
        return
    if other is not None and other.source.info(other.name).shape != info.shape:
        shape = list(other.source.info(other.name).shape)
        tally.source.append(f"{name}: {list(info.shape)}, in the source {shape}")
        other = None
    if other is None:
        return
    folded = vectors.change(name)
    rows = info.shape[0]
    step = max(1, _ELEMENTS // max(info.numel // rows, 1)) if len(info.shape) > 1 else rows
    # Folds go by rows of [O, I]: what is stored [I, O] is compared whole.
    step = rows if folded and name in view.transposed else step
    squares = total = 0.0
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        values = source.read_rows(name, start, stop).to(torch.float32)
        original = other.source.read_rows(other.name, start, stop)
        if name in view.transposed:
            values, original = values.t(), original.t()
        found = [
            (float((values - expected).square().sum(dtype=torch.float64)), expected)
            for expected in _expected(name, original, vectors, start)
        ]
        error, expected = min(found, key=lambda pair: pair[0])
        squares += error
        total += float(expected.square().sum(dtype=torch.float64))
    error = (squares / total) ** 0.5 if total else float("inf") if squares else 0.0
    limit = _limit(label, other, folded=folded, retargeted=vectors.retargeted)
    tally.add(name, error, limit)


def _expected(name: str, original: Tensor, vectors: Vectors, start: int) -> list[Tensor]:
    """Rows of the source as a file without loss may have them, float32; Gemma's norms are 1 + w."""
    if original.ndim == 2:
        return [vectors.folded(name, original, start)]
    rows = vectors.rows(name)
    if rows is None:
        return [original.float()]
    return [(original.float() + offset) / rows - offset for offset in (0.0, 1.0)]


def _limit(label: str, other: _Reference, *, folded: bool, retargeted: bool) -> float:
    """Largest relative error that a tensor's type explains."""
    if label in BLOCK_TYPES:
        if other.kept:
            return _KEPT_LIMIT
        # A target lies as far from the weight as the errors before it ask for.
        return _LIMITS[2 if retargeted else BLOCK_TYPES[label].bits]
    # A fold is rounded to the source's dtype; dense tensors are rounded to 16 bits at most.
    return 0.004 if folded else 0.0005
