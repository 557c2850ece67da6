"""A checkpoint of safetensors as a GGUF file for llama.cpp and Ollama, without requantizing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.disk import disk_errors, write_file
from quantkit.checkpoint.finished import refuse_unfinished
from quantkit.checkpoint.memory import format_size
from quantkit.checkpoint.output import OutputDirectory, OutputState
from quantkit.checkpoint.source import Source
from quantkit.checkpoint.version import __version__
from quantkit.errors import FormatError
from quantkit.formats.format import FormatReader, StoredWeight, format_of
from quantkit.formats.gguf.codes import block_type_of, is_exact, to_blocks, why_not
from quantkit.formats.gguf.families import Family, family_of
from quantkit.formats.gguf.metadata import Entry, describe
from quantkit.formats.gguf.names import Place, place_of
from quantkit.formats.gguf.tokenizer import describe_tokenizer
from quantkit.formats.gguf.writer import PlannedTensor, import_gguf, write_gguf
from quantkit.formats.open import open_source
from quantkit.model.skeleton import load_config
from quantkit.pipeline.provenance import EXPORT_OF, copy_provenance

MODEL_FILE, OLLAMA_FILE = "model.gguf", "Modelfile"
# Weights copied at a time.
_PIECE = 1 << 22
_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# The owner's numbers of what most of a file is (llama_ftype).
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GgufExport:
    """What an export wrote.

    types    ggml's type -> tensors of it
    rounded  weights whose minima were rounded to float16
    notes    what llama.cpp will do otherwise than transformers
    peak_bytes, predicted_bytes   resident memory of a run that quantized, else None
    """

    out: Path
    types: Mapping[str, int]
    rounded: tuple[str, ...]
    notes: tuple[str, ...]
    peak_bytes: int | None = None
    predicted_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "out": str(self.out),
            "format": "gguf",
            "types": dict(self.types),
            "rounded": list(self.rounded),
            "notes": list(self.notes),
            "peak_rss_bytes": self.peak_bytes,
            "predicted_peak_bytes": self.predicted_bytes,
        }

    def text(self) -> str:
        """For people."""
        types = ", ".join(f"{count} {label}" for label, count in self.types.items())
        lines = [f"{self.out / MODEL_FILE}: {types}"]
        if self.rounded:
            lines.append(f"rounded    minima of {len(self.rounded)} weights, to float16")
        lines += [f"note       {note}" for note in self.notes]
        if self.peak_bytes is not None and self.predicted_bytes is not None:
            predicted = format_size(self.predicted_bytes)
            lines.append(f"peak RAM   {format_size(self.peak_bytes)} ({predicted} predicted)")
        lines.append(f"serve it   ollama create NAME -f {self.out / OLLAMA_FILE}")
        return "\n".join(lines)


def export_gguf(
    source_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    allow_rounding: bool = False,
    fresh: bool = False,
) -> GgufExport:
    """Writes `out_dir` with model.gguf and a Modelfile from a checkpoint of quantkit's or plain.

    Symmetric codes are kept exactly; asymmetric ones keep their codes and scales, and their minima
    are rounded to float16, which needs `allow_rounding`.  Holds one weight at a time; the same call
    on a complete output leaves it as it is, unless `fresh`.  Raises FormatError before anything is
    written if ggml or llama.cpp cannot hold the model as it is.
    """
    refuse_unfinished(Path(source_dir))
    import_gguf()
    source = open_source(source_dir)
    fmt = format_of(source) if "quantization_config" in source.config else None
    stored = fmt.weights(source) if fmt is not None else {}
    rounded = _check_schemes(stored, allow_rounding)
    config = load_config(source, trust_remote_code=False)
    family = family_of(str(config.model_type))
    described = describe(family, config)
    packed = {name for weight in stored.values() for name in weight.tensors}
    names = [*stored, *(name for name in source.names() if name not in packed)]
    tied = bool(getattr(config, "tie_word_embeddings", False))
    tensors = []
    for target, members in place_tensors(names, family, tied).items():
        if fmt is not None and members[0][0] in stored:
            order = row_order(family, members[0][1], config)
            tensors.append(_quantized_tensor(target, members, source, fmt, stored, order))
        else:
            tensors.append(dense_tensor(target, members, source, family, config))
    if described.rope_factors is not None:
        tensors.append(_fixed("rope_freqs.weight", described.rope_factors))
    types = [tensor.type for tensor in tensors]
    entries = (
        *general_entries(Path(source_dir).resolve().name, _file_type(types)),
        *described.entries,
        *describe_tokenizer(source, config.vocab_size),
    )
    counts = {label: types.count(label) for label in sorted(set(types))}
    fingerprint = {
        "source": source.fingerprint(),
        "format": "gguf",
        "allow rounding": str(allow_rounding),
        "quantkit version": __version__,
    }
    with OutputDirectory(Path(out_dir)) as output:
        result = GgufExport(out=output.out, types=counts, rounded=rounded, notes=described.notes)
        if output.state is OutputState.COMPLETE and not fresh:
            output.check_complete(fingerprint)
            return result
        output.begin(fingerprint, fresh=True)
        write_gguf(output.partial / MODEL_FILE, family.architecture, entries, tensors)
        with disk_errors(output.partial):
            write_file(output.partial / OLLAMA_FILE, modelfile(source, entries).encode())
        copy_provenance(source, output.partial, {EXPORT_OF: source.fingerprint(), "format": "gguf"})
        output.finish()
        return result


def _check_schemes(stored: Mapping[str, StoredWeight], allow_rounding: bool) -> tuple[str, ...]:
    rounded = []
    for name, weight in stored.items():
        reason = why_not(weight.scheme)
        if reason is None and weight.shape[1] % 32:
            reason = f"ggml's blocks are of 32 weights; {weight.shape[1]} columns are no multiple"
        if reason is not None:
            raise FormatError(f"{name}: {weight.scheme.name} cannot be gguf: {reason}")
        if weight.permuted:
            raise FormatError(
                f"{name}: its columns are permuted (activation order), which gguf does not hold"
            )
        if not is_exact(weight.scheme):
            rounded.append(name)
    if rounded and not allow_rounding:
        raise FormatError(
            f"{rounded[0]} and {len(rounded) - 1} more: {stored[rounded[0]].scheme.name} is kept "
            "but for the groups' minima, which ggml rounds to float16; pass --allow-rounding if "
            "that is right"
        )
    return tuple(rounded)


def place_tensors(
    names: Iterable[str], family: Family, tied: bool
) -> dict[str, list[tuple[str, Place]]]:
    """GGUF name -> the checkpoint tensors it holds (experts in order), block after block.

    `tied`: the head is the embedding, whether the checkpoint stores it or not.  FormatError if a
    tensor has no place, or an expert is missing.
    """
    found: dict[str, dict[int, tuple[str, Place]]] = {}
    for name in names:
        place = place_of(family, name)
        if place is None or (tied and place.name == "output.weight"):
            continue
        found.setdefault(place.name, {})[place.expert or 0] = (name, place)
    placed = {}
    for target in sorted(found, key=_block_of):
        if sorted(found[target]) != list(range(len(found[target]))):
            raise FormatError(f"{target}: experts are missing among {len(found[target])}")
        placed[target] = [found[target][index] for index in sorted(found[target])]
    return placed


def _block_of(name: str) -> tuple[int, str]:
    """Sort key: tensors outside blocks first, then block by block."""
    parts = name.split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1, name)


def _quantized_tensor(
    target: str,
    members: Sequence[tuple[str, Place]],
    source: Source,
    fmt: FormatReader,
    stored: Mapping[str, StoredWeight],
    order: Tensor | None,
) -> PlannedTensor:
    """Our codes and scales as blocks."""
    first = members[0][0]
    schemes = {stored[name].scheme for name, _ in members if name in stored}
    if len(schemes) > 1 or any(name not in stored for name, _ in members):
        raise FormatError(f"{first}: gguf keeps all experts of a layer in one tensor: {target}")

    def pieces() -> Iterator[Tensor]:
        for name, _ in members:
            rows = to_blocks(name, fmt.unpack(stored[name], source))
            yield (rows if order is None else rows[order]).contiguous()

    experts = (len(members),) if members[0][1].expert is not None else ()
    kind = block_type_of(stored[first].scheme).name
    return PlannedTensor(
        name=target, type=kind, shape=(*experts, *stored[first].shape), pieces=pieces
    )


def dense_tensor(
    target: str,
    members: Sequence[tuple[str, Place]],
    source: Source,
    family: Family,
    config: Any,
    kind: str | None = None,
) -> PlannedTensor:
    """A tensor that stays dense: float32 for vectors and routers, else `kind` or as stored."""
    first, place = members[0]
    info = source.info(first)
    transposed = place.stem in family.transposed and len(info.shape) == 2
    plain = len(info.shape) < 2 or place.stem in ("ffn_gate_inp", "position_embd")
    label = "F32" if plain else kind or _DENSE.get(info.dtype, "F32")
    shift = family.norm_shift if place.stem.endswith("norm") else 0.0
    order = row_order(family, place, config)

    def pieces() -> Iterator[Tensor]:
        for name, _ in members:
            yield from _dense_pieces(source, name, label, order, transposed, shift)

    experts = (len(members),) if place.expert is not None else ()
    shape = info.shape[::-1] if transposed else info.shape
    return PlannedTensor(name=target, type=label, shape=(*experts, *shape), pieces=pieces)


def _dense_pieces(
    source: Source, name: str, kind: str, order: Tensor | None, transposed: bool, shift: float
) -> Iterator[Tensor]:
    info = source.info(name)
    dtype = {label: dtype for dtype, label in _DENSE.items()}[kind]
    if order is not None or transposed or len(info.shape) < 2:
        value = source.read(name)
        value = value.T if transposed else value
        value = value if order is None else value[order]
        yield _bytes((value.to(torch.float32) + shift if shift else value).to(dtype))
        return
    columns = info.numel // info.shape[0]
    step = max(1, _PIECE // columns)
    for start in range(0, info.shape[0], step):
        rows = source.read_rows(name, start, min(start + step, info.shape[0]))
        yield _bytes(rows.to(dtype))


def _bytes(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def _fixed(name: str, value: Tensor) -> PlannedTensor:
    shape = tuple(value.shape)
    return PlannedTensor(name=name, type="F32", shape=shape, pieces=lambda: iter([_bytes(value)]))


def row_order(family: Family, place: Place, config: Any) -> Tensor | None:
    """Which row comes where so that rotated pairs are neighbours; None for other tensors."""
    field = family.interleave.get(place.stem)
    if field is None:
        return None
    heads = getattr(config, field, None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None)
    rows = heads * (head_size or config.hidden_size // config.num_attention_heads)
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def general_entries(name: str, file_type: int) -> list[Entry]:
    """What every file says of itself; `file_type` is the owner's number (llama_ftype)."""
    return [
        Entry(key="general.type", kind="str", value="model"),
        Entry(key="general.name", kind="str", value=name),
        Entry(key="general.file_type", kind="u32", value=file_type),
        Entry(key="quantkit.version", kind="str", value=__version__),
    ]


def _file_type(types: Sequence[str]) -> int:
    """The number of what most matrices are."""
    matrices = [label for label in types if label != "F32"] or list(types)
    return _FILE_TYPES[max(sorted(set(matrices)), key=matrices.count)]


def modelfile(source: Source, entries: Sequence[Entry]) -> str:
    """For `ollama create NAME -f Modelfile`; the chat template is in the file itself."""
    values = {entry.key: entry.value for entry in entries}
    lines = [f"FROM ./{MODEL_FILE}"]
    length = next(v for k, v in values.items() if k.endswith(".context_length"))
    lines.append(f"PARAMETER num_ctx {min(int(length), 8192)}")  # type: ignore[arg-type]
    tokens, end = values["tokenizer.ggml.tokens"], values.get("tokenizer.ggml.eos_token_id")
    if isinstance(tokens, tuple) and isinstance(end, int):
        lines.append(f"PARAMETER stop {json.dumps(tokens[end], ensure_ascii=False)}")
    licence = [name for name in source.side_files() if re.match("LICEN[SC]E", name)]
    if licence:
        lines.append(f"# the model's licence: see {licence[0]} of the source")
    return "\n".join(lines) + "\n"
