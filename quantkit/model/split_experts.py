"""A checkpoint that stores all experts of a projection in one tensor, read one expert at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from quantkit.checkpoint.safetensors import TensorInfo
from quantkit.checkpoint.source import Source, View
from quantkit.formats.format import expert_name
from quantkit.model import skeleton
from quantkit.model.causal import CausalModel
from quantkit.model.experts import uses_interface
from quantkit.model.names import map_names
from quantkit.model.views import converted


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """Where one expert is: slice `expert` of `name`, [I, O] there if `transposed`."""

    name: str
    expert: int
    transposed: bool


def split_experts(source: Source, *, trust_remote_code: bool = False) -> Source:
    """The source, with each expert of a fused tensor as a weight [O, I] named by `expert_name`.

    The source itself if it holds no such tensor.
    """
    if not _fused(source):
        return source
    model = skeleton.build(source, trust_remote_code=trust_remote_code, dtype=None)
    source = converted(source, model)
    slices: dict[str, _Slice] = {}
    turned = _transposed(source, model, trust_remote_code=trust_remote_code)
    for (name, stored_turned), transposed in turned.items():
        for expert in range(source.info(name).shape[0]):
            slices[expert_name(name, expert)] = _Slice(
                name=name, expert=expert, transposed=transposed != stored_turned
            )
    return OneByOne(source, slices) if slices else source


def _fused(source: Source) -> frozenset[str]:
    return frozenset(name for name in source.names() if len(source.info(name).shape) == 3)


def _transposed(
    source: Source, model: nn.Module, *, trust_remote_code: bool
) -> dict[tuple[str, bool], bool]:
    """(tensor of experts, whether it is stored transposed) -> whether the parameter holds [I, O].

    What keeps to transformers' interface says so; of other code a trial run tells.
    """
    fused = _fused(source)
    found: dict[tuple[str, bool], bool] = {}
    others: dict[str, tuple[str, bool]] = {}
    for path, pieces in map_names(model, source).pieces.items():
        owner = model.get_submodule(path.rpartition(".")[0])
        name, stored = pieces[0].name, pieces[0].transposed
        if name not in fused or pieces[0].expert is not None or pieces[0].opaque:
            continue
        if uses_interface(owner):
            found[name, stored] = bool(getattr(owner, "is_transposed", False))
        elif not type(owner).__module__.startswith("torch."):
            others[path] = name, stored
    if others:
        traced = CausalModel.traced(source, trust_remote_code=trust_remote_code).sliced()
        found |= {others[path]: turned for path, turned in traced.items() if path in others}
    return found


class OneByOne(View):
    """The view that `split_experts` gives.  Holds the expert read last."""

    def __init__(self, source: Source, slices: Mapping[str, _Slice]) -> None:
        super().__init__(source)
        self._slices = slices
        whole = {part.name for part in slices.values()}
        self._names = tuple(sorted({*source.names(), *slices} - whole))
        self._last: tuple[str, Tensor] | None = None

    def names(self) -> tuple[str, ...]:
        """Names with one per expert, sorted."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape; of an expert [O, I]."""
        part = self._slices.get(name)
        if part is None:
            return self.source.info(name)
        info = self.source.info(part.name)
        shape = info.shape[:0:-1] if part.transposed else info.shape[1:]
        return TensorInfo(name=name, dtype=info.dtype, shape=shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened tensor, fresh memory."""
        part = self._slices.get(name)
        if part is None:
            return self.source.read_flat(name, start, stop)
        numel = math.prod(self.info(name).shape)
        if not 0 <= start <= stop <= numel:
            raise IndexError(f"{name}: elements {start}..{stop} of {numel}")
        if self._last is None or self._last[0] != name:
            self._last = None
            value = self.source.read_rows(part.name, part.expert, part.expert + 1)[0]
            self._last = name, (value.t() if part.transposed else value).reshape(-1)
        return self._last[1][start:stop].clone()
