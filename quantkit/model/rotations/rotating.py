"""Opening a model in the basis of a rotation, where its weights can make up for all of it.

Which weights these are is found by probing a sketch of each kind of block; what lies outside the
blocks, and one real block of each kind, is compared with the model as it was.

Letters: O out features, I in features, T tokens, H hidden size, D head size.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from quantkit.errors import RecipeError
from quantkit.methods.parts import Rotation
from quantkit.methods.rules import PartSpec
from quantkit.model import skeleton
from quantkit.model.causal import CausalModel
from quantkit.model.fold_vectors import FOLDS_FILE, SOURCE_FOLDS_FILE
from quantkit.model.passes import as_float
from quantkit.model.probes.rotations import Carried, find_heads, find_stream
from quantkit.model.probes.scales import PROBE_TOKENS
from quantkit.model.refs import ScaleGroup, WeightRef
from quantkit.model.rotations.rotated import ROTATION_FILE, Axis, Rotated, Turn
from quantkit.model.trace import make_noise, noise_like, sketch_

_STREAM = "stream"
_TOKENS = 16
# What rounding weights to bfloat16 once more leaves of an output is well below; a tensor that
# should have been turned and was not changes all of it.
_TOLERANCE = 0.1


def rotate(
    model: CausalModel, part: Rotation, spec: PartSpec, *, trust_remote_code: bool = False
) -> CausalModel:
    """The model in the basis of a rotation; reads a block of each kind and a part of the head.

    Raises RecipeError with the first thing that a rotation does not fold into.
    """
    finder = _Finder(model, part)
    turns = finder.turns()
    rotated = CausalModel.open(
        Rotated(model.source, part, spec, turns),
        trust_remote_code=trust_remote_code,
        dtype=model.dtype,
        device=model.device,
    )
    finder.compare(rotated)
    return rotated


class _Finder:
    """What a rotation changes in a model: a turn for each tensor."""

    def __init__(self, model: CausalModel, part: Rotation) -> None:
        self._model, self._part = model, part
        self._hidden: int = model.text_config.hidden_size
        self._names = frozenset(model.source.names())
        self._turns: dict[str, dict[str, Any]] = {}
        self._signatures = [
            skeleton.signature(model.empty_block(index)) for index in range(model.num_blocks)
        ]
        self._streams: dict[str, Carried] = {}
        self._heads: dict[tuple[str, str], Carried] = {}

    def turns(self) -> dict[str, Turn]:
        """The turns by tensor.  Raises RecipeError."""
        self._check_model()
        for index in range(self._model.num_blocks):
            groups = self._model.scale_groups(index)
            if self._part.stream:
                self._stream(index, groups)
            if self._part.heads:
                self._values(index, groups)
        if self._part.heads and not self._heads:
            raise self._refusal(
                "no attention of its blocks hands values over as transformers' own does; --set "
                "rotation.heads=false leaves them as they are"
            )
        if self._part.stream:
            self._outside()
        return {name: Turn(**fields) for name, fields in self._turns.items()}

    def compare(self, rotated: CausalModel) -> None:
        """RecipeError unless a rotated model computes what the model did."""
        model = self._model
        rows = model.projection.shape[0]
        ids = torch.arange(1, 1 + _TOKENS, dtype=torch.int64)[None] % rows
        hidden, calls = model.calls(ids)
        turned, its_calls = rotated.calls(ids)
        self._same("the embedding", self._turned(hidden), turned)
        if _floats(calls) != [] and not all(
            torch.allclose(a, b) for a, b in zip(_floats(calls), _floats(its_calls), strict=True)
        ):
            raise self._refusal("what blocks are given beside hidden states comes from these")
        seen: set[str] = set()
        for index, signature in enumerate(self._signatures):
            if signature not in seen:
                seen.add(signature)
                one = model.run(model.load_block(index), hidden, calls[index])
                other = rotated.run(rotated.load_block(index), turned, its_calls[index])
                self._same(model.block_path(index), self._turned(one), other)
        some = min(rows, 256)
        logits = model.partial_logits(hidden, model.head_rows(0, some), 0)
        its = rotated.partial_logits(turned, rotated.head_rows(0, some), 0)
        self._same("the output head", logits, its)

    def _check_model(self) -> None:
        model, home = self._model, self._model.source.home
        known = (FOLDS_FILE, SOURCE_FOLDS_FILE, ROTATION_FILE)
        if home is not None and any(os.path.lexists(Path(home) / name) for name in known):
            raise RecipeError(
                f"rotation: the weights of {home} have been transformed before; rotate the model "
                "that they were made from"
            )
        if model.whole:
            raise self._refusal("its layers are no plain list of blocks")
        if not self._part.stream:
            return
        if model.towers.paths:
            raise self._refusal("towers put what they make of images or sound into the stream")
        if model.extra_layers:
            raise self._refusal("layers that predict further tokens read the stream")
        if len(model.tables) != 1:
            listed = ", ".join(sorted(model.tables))
            raise self._refusal(f"several tables write the stream: {listed}")
        if model.head_tied and not self._part.untie:
            raise self._refusal(
                "its head is tied to the embedding, which a rotation tells apart; --set "
                "rotation.untie=true stores it once more"
            )

    def _stream(self, index: int, groups: tuple[ScaleGroup, ...]) -> None:
        """What reads and writes the residual stream of a block."""
        model, path = self._model, self._model.block_path(index)
        norms = [g for g in groups if g.kind == "norm" and g.num_channels == self._hidden]
        signature = self._signatures[index]
        if signature not in self._streams:
            drawn = sketch_(model.empty_block(index))
            with torch.no_grad():
                for group in norms:
                    drawn.get_parameter(group.producer).fill_(1 - group.offset)
            hidden, calls = model.calls(torch.zeros(2, PROBE_TOKENS, dtype=torch.int64))
            call = as_float(calls[index])
            self._streams[signature] = find_stream(
                drawn,
                lambda block, x: model.run(block, x, call),
                noise_like(hidden, 2)[:1],
                self._turned,
            )
        found = self._streams[signature]
        if found.broken is not None or not found.writers:
            what = f"{path}.{found.broken}" if found.broken else f"what {path} puts out"
            raise self._refusal(f"{what} does not follow when {path} reads a rotated stream")
        axis = Axis(key=_STREAM, size=self._hidden)
        for ref in model.weights(index):
            if ref.parameter in found.readers:
                self._add(ref, columns=axis)
            if ref.parameter in found.writers:
                if ref.rows is not None:
                    raise self._refusal(f"{ref.name} holds a part of the rows of {ref.parameter}")
                self._add(ref, rows=axis)
        for group in norms:
            if not {ref.parameter for ref in group.readers} <= found.readers:
                continue
            (norm,) = group.producer_names
            for ref in group.readers:
                self._add(ref, norm=norm, offset=group.offset)
            self._turns[norm] = {"plain": True, "offset": group.offset}

    def _values(self, index: int, groups: tuple[ScaleGroup, ...]) -> None:
        """The heads of values of each attention of a block."""
        model = self._model
        for path, attention in model.attentions(index).items():
            size, where = attention.value_size, f"{model.block_path(index)}.{path}"
            fitting = [g for g in groups if _by_heads(g, attention.heads, size)]
            found = next((g for g in fitting if self._follows(index, g, size)), None)
            if found is None:
                raise self._refusal(
                    f"{where}: the values of a head do not reach one product by themselves; --set "
                    "rotation.heads=false leaves them as they are"
                )
            first = int(found.rows[0])
            key = f"{_of_block(index)} {path}"
            refs = [ref for ref in model.weights(index) if ref.parameter == found.producer]
            last = first + attention.heads * size
            inside = [
                ref
                for ref in refs
                for start, stop in (ref.rows or (0, ref.shape[0]),)
                if start <= first and last <= stop
            ]
            if len(inside) != 1:
                raise self._refusal(f"{where}: its values come from several tensors")
            start = 0 if inside[0].rows is None else inside[0].rows[0]
            self._add(
                inside[0], rows=Axis(key=key, size=size, first=first - start, last=last - start)
            )
            for ref in found.readers:
                self._add(ref, columns=Axis(key=key, size=size))

    def _follows(self, index: int, group: ScaleGroup, size: int) -> bool:
        """Whether the readers of a producer read its heads rotated where it is rotated."""
        model, where = self._model, (self._signatures[index], group.producer)
        first, last = int(group.rows[0]), int(group.rows[-1]) + 1

        def by_heads(x: Tensor) -> Tensor:
            return self._part(x.reshape(-1, size), "probe").view(x.shape).to(x.dtype)

        def rotate(y: Tensor) -> Tensor:
            return torch.cat([y[..., :first], by_heads(y[..., first:last]), y[..., last:]], -1)

        if where not in self._heads:
            drawn = sketch_(model.empty_block(index))
            hidden, calls = model.calls(torch.zeros(2, PROBE_TOKENS, dtype=torch.int64))
            call = as_float(calls[index])
            self._heads[where] = find_heads(
                drawn,
                lambda block, x: model.run(block, x, call),
                noise_like(hidden, 2)[:1],
                group.producer,
                rotate,
                by_heads,
            )
        found = self._heads[where]
        return found.broken is None and found.readers == {r.parameter for r in group.readers}

    def _outside(self) -> None:
        """The embedding, the final norm and the head."""
        model, last = self._model, self._model.projection
        (table,) = model.tables
        axis = Axis(key=_STREAM, size=self._hidden)
        self._turns[table] = {"columns": axis}
        head: dict[str, Any] = {"columns": axis}
        if model.head_tied:
            head["origin"] = last.name
        noise = make_noise(_TOKENS, self._hidden, seed=1)[None].to(model.device, model.dtype)
        read = model.head_hidden(noise).float()
        found = _final_norm(model, noise.float(), read)
        if found is None:
            raise self._refusal("what comes before its output head is no norm without a mean")
        if found[0] is not None:
            name, offset = found
            head |= {"norm": name, "offset": offset}
            self._turns[name] = {"plain": True, "offset": offset}
        self._turns[last.parameter if model.head_tied else last.name] = head

    def _add(self, ref: WeightRef, **fields: Any) -> None:
        """More of a weight's turn, and of its bias where rows are rotated."""
        if ref.role == "read" or ref.kept is not None:
            raise self._refusal(f"{ref.name}: {ref.kept}")
        turn = self._turns.setdefault(ref.name, {})
        for key, value in fields.items():
            if turn.setdefault(key, value) != value:
                raise self._refusal(f"{ref.name} is rotated in two ways")
        turn["flipped"] = ref.transposed and ref.expert is None
        bias = f"{ref.name.removesuffix('.weight')}.bias"
        if "rows" in fields and bias in self._names:
            self._turns.setdefault(bias, {})["rows"] = fields["rows"]

    def _turned(self, x: Tensor) -> Tensor:
        """Hidden states as they are in the rotated model."""
        if not self._part.stream:
            return x
        turned = self._part(x.reshape(-1, x.shape[-1]).double().cpu(), _STREAM)
        return turned.view(x.shape).to(x.device, x.dtype)

    def _same(self, where: str, expected_TH: Tensor, found_TH: Tensor) -> None:
        expected, found = expected_TH.double(), found_TH.double()
        lost = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        # Of tokens that a router is undecided on, some go elsewhere after rounding.
        if not float(lost.median()) < _TOLERANCE:
            raise self._refusal(f"{where} computes something else then")

    def _refusal(self, why: str) -> RecipeError:
        return RecipeError(f"rotation: this model's weights cannot make up for one: {why}")


def _of_block(index: int) -> str:
    return f"block {index}"


def _floats(calls: object) -> list[Tensor]:
    leaves, _ = tree_flatten([(call.args, call.kwargs) for call in calls])  # type: ignore[attr-defined]
    return [x.float() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _by_heads(group: ScaleGroup, heads: int, size: int) -> bool:
    """Whether a group's channels are heads of values, each of which readers read in one piece."""
    rows, carried = group.rows, group.channel_map
    if group.kind != "rows" or group.expert is not None or len(rows) != heads * size:
        return False
    if not torch.equal(rows, torch.arange(len(rows)) + rows[0]) or len(carried) % size:
        return False
    pieces = carried.view(-1, size)
    return torch.equal(pieces, pieces[:, :1] + torch.arange(size)) and not bool(
        (pieces[:, 0] % size).any()
    )


def _final_norm(model: CausalModel, noise: Tensor, read: Tensor) -> tuple[Any, float] | None:
    """(name of the weight or None, what is added to it) of a norm without a mean before the head.

    None if what the head reads is no multiple of the hidden states, times such a weight.
    """
    if noise.shape != read.shape:
        return None
    if _parallel(read, noise):
        return None, 0.0
    for name in model.outside:
        if model.source.info(name).shape == noise.shape[-1:]:
            weight = model.source.read(name).to(noise.device, torch.float32)
            for offset in (0.0, 1.0):
                if _parallel(read, noise * (weight + offset)):
                    return name, offset
    return None


def _parallel(x_TH: Tensor, other_TH: Tensor) -> bool:
    # Far from what another vector gives, and above the rounding of bfloat16.
    alike = nn.functional.cosine_similarity(x_TH.double(), other_TH.double(), dim=-1)
    return bool((alike > 1 - 1e-4).all())
