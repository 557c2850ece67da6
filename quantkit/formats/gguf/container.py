"""What becomes of a model's tensors in one GGUF file: names, types, order, metadata, Modelfile."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit_kernels.lazy import torch

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source
from quantkit.checkpoint.version import __version__
from quantkit.errors import FormatError
from quantkit.formats.gguf.families import Family, family_of
from quantkit.formats.gguf.floats import MXFP4
from quantkit.formats.gguf.metadata import Entry, describe
from quantkit.formats.gguf.mixes import RECIPES, Weight, choose_types, scheme_of
from quantkit.formats.gguf.names import Place, note_unused, place_of
from quantkit.formats.gguf.tokenizer import describe_tokenizer
from quantkit.formats.gguf.writer import DENSE, GgufLayout, Member, PlannedTensor, import_gguf
from quantkit.numbers.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

MODEL_FILE, OLLAMA_FILE = "model.gguf", "Modelfile"
# The owner's numbers of what most of a file is (llama_ftype).
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32,
    "MXFP4": 38,
}  # fmt: skip
_OUTSIDE = ("token_embd", "output")


class GgufContainer:
    """How one model lies in a GGUF file; from its configuration and names, no weights are read.

    config   the language model's configuration
    unused   tensors that no parameter takes: they are left out, and a note says so
    Raises FormatError if the `gguf` package is missing, or llama.cpp has no such model or tensor.
    """

    left_out: ClassVar[str] = "llama.cpp computes it, or it is the embedding"

    def __init__(
        self, source: Source, config: Any, *, head_tied: bool, unused: Collection[str]
    ) -> None:
        import_gguf()
        self._source, self._config, self._tied = source, config, head_tied
        self._family = family_of(str(config.model_type))
        self._described = describe(self._family, config)
        names = [name for name in source.names() if name not in unused]
        self._placed = place_tensors(names, self._family, head_tied)
        self._tokenizer = describe_tokenizer(source, config.vocab_size)
        self._place = {name: place for group in self._placed.values() for name, place in group}
        # Matrices that no block fits, which are written as F16.
        self._half: set[str] = set()
        self.notes = [*self._described.notes, *note_unused(self._family, unused)]

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The table of embeddings and the head, as far as the file holds them, with [O, I]."""
        found = {}
        for name, place in self._place.items():
            if place.stem in _OUTSIDE and name.endswith(".weight"):
                rows, columns = self._source.info(name).shape
                found[name] = (rows, columns)
        return found

    def spread(
        self, mix: Scheme, shapes: Mapping[str, tuple[int, int]]
    ) -> dict[str, tuple[Scheme | None, str]]:
        """Matrix name -> its block type (None: kept) and the reason, for those with these shapes,
        as the mix says."""
        config, family = self._config, self._family
        weights = [
            Weight(
                name=target,
                stem=members[0][1].stem,
                block=int(target.split(".")[1]) if target.startswith("blk.") else -1,
                columns=shapes[members[0][0]][1],
            )
            for target, members in self._placed.items()
            if members[0][0] in shapes
        ]
        heads = getattr(config, "num_attention_heads", 1)
        types = choose_types(
            mix.name,
            weights,
            layers=getattr(config, family.block_count),
            heads=heads,
            key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            experts=getattr(config, "num_local_experts", 0) if family.experts else 0,
            tied=self._tied,
        )
        decided: dict[str, tuple[Scheme | None, str]] = {}
        for target, choice in types.items():
            reason = f"mix {mix.name}"
            if choice.fallback is not None:
                reason = f"{choice.fallback} does not divide its rows"
                self.notes.append(f"{target}: {reason}, {choice.type} is written")
            for name, _ in self._placed[target]:
                if choice.type not in DENSE:
                    decided[name] = scheme_of(choice.type), reason
                else:
                    decided[name] = None, reason
                    self._half.add(name)
        return decided

    def place(self, name: str) -> tuple[TensorInfo, ...]:
        """What a tensor that is not quantized becomes; nothing if the file has no place for it."""
        place = self._place.get(name)
        if place is None:
            return ()
        info = self._source.info(name)
        shape = info.shape[::-1] if self._turned(place, info) else info.shape
        label = self._dense_type(name, place, info)
        return (TensorInfo(name=name, dtype=label, shape=shape),)

    def lay_out(self, mix: Scheme, schemes: Mapping[str, Scheme | None]) -> GgufLayout:
        """The file, when each matrix's block type (None: kept) is decided."""
        tensors = [
            self._planned(target, members, schemes) for target, members in self._placed.items()
        ]
        constants: dict[str, Tensor] = {}
        if (factors := self._described.rope_factors) is not None:
            constants["rope_freqs.weight"] = factors
            shape = tuple(factors.shape)
            tensors.append(
                PlannedTensor(name="rope_freqs.weight", type="F32", shape=shape, members=())
            )
        if mix.name in RECIPES:
            file_type = RECIPES[mix.name][1]
        else:
            file_type = _file_type([tensor.type for tensor in tensors])
        home = self._source.home
        name = str(self._config.model_type) if home is None else home.resolve().name
        entries = (*general_entries(name, file_type), *self._described.entries, *self._tokenizer)
        return GgufLayout(
            file=MODEL_FILE,
            architecture=self._family.architecture,
            entries=entries,
            tensors=tuple(tensors),
            constants=constants,
            side_files={OLLAMA_FILE: modelfile(self._source, entries).encode()},
        )

    def _planned(
        self,
        target: str,
        members: Sequence[tuple[str, Place]],
        schemes: Mapping[str, Scheme | None],
    ) -> PlannedTensor:
        first, place = members[0]
        decided = {schemes.get(name) for name, _ in members}
        if len(decided) > 1:
            raise FormatError(f"{first}: gguf keeps all experts of a layer in one tensor: {target}")
        info, (scheme,) = self._source.info(first), decided
        turned = self._turned(place, info)
        shape = info.shape[::-1] if turned else info.shape
        if scheme == MXFP4:
            label = "MXFP4"
        elif scheme is not None and scheme.block is not None:
            label = scheme.block.upper()
        else:
            label = self._dense_type(first, place, info)
        member = Member(
            order=row_order(self._family, place, self._config),
            turned=turned,
            shift=self._family.norm_shift if place.stem.endswith("norm") else 0.0,
        )
        experts = (len(members),) if place.expert is not None else ()
        return PlannedTensor(
            name=target,
            type=label,
            shape=(*experts, *shape),
            members=tuple(name for name, _ in members),
            member=member,
        )

    def _turned(self, place: Place, info: TensorInfo) -> bool:
        return place.stem in self._family.transposed and len(info.shape) == 2

    def _dense_type(self, name: str, place: Place, info: TensorInfo) -> str:
        """Float32 for vectors, routers and positions, else as stored."""
        if len(info.shape) < 2 or place.stem in ("ffn_gate_inp", "position_embd"):
            return "F32"
        if name in self._half:
            return "F16"
        return info.label if info.label in DENSE else "F32"


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
