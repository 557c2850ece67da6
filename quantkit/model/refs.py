"""What the model side hands out: references to weights, recorded calls, scale groups and folds.

Letters: O out features, I in features, C producer channels, B sequences, T tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

Role = Literal["linear", "expert", "router", "read", "head"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One checkpoint tensor and the part of a module parameter that it fills.

    `parameter` is the full path in the model.  With `expert` the tensor is slice `expert` of a
    fused 3-D parameter; `rows` then names the rows of that slice (None: all), and with `transposed`
    the parameter holds [I, O] of it.  Without, `rows` are rows of the parameter.  `opaque` says
    that the tensor fills it through a conversion that is run, not followed; `split` that quantkit
    took it out of a tensor for all experts, or of one that transformers computes it from.
    """

    name: str
    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
    opaque: bool = False
    split: bool = False

    def part_of(self, value: torch.Tensor) -> torch.Tensor:
        """The view of the parameter's value that this tensor fills, shaped as the tensor."""
        if self.expert is not None:
            value = value[self.expert]
        if self.transposed:
            value = value.transpose(-2, -1)
        return value if self.rows is None else value[self.rows[0] : self.rows[1]]


@dataclass(frozen=True, kw_only=True)
class WeightRef:
    """A quantizable weight, addressed by the name it has in the source checkpoint.

    `shape` is (O, I) whatever the storage; `transposed` says that the parameter holds [I, O]: as
    the checkpoint does of Conv1D, and never of an expert.
    `parameter` is the path inside the block (of the head: in the model).  `input` names what the
    weight reads, unique within its block: equal keys mean the same tensor, hence the same Stats.
    Roles: "linear", "expert" (one of a fused parameter), "router" (rows == number of experts, or a
    shared expert's one-row gate), "read" (it stays as it is for the reason in `kept`), "head".
    """

    name: str
    block: int | None
    shape: tuple[int, int]
    parameter: str
    input: str
    role: Role = "linear"
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
    kept: str | None = None
    split: bool = False


def weight_view(block: nn.Module, ref: WeightRef) -> torch.Tensor:
    """The weight as [O, I]: a view of the block's parameter (writes go through)."""
    return part_view(block.get_parameter(ref.parameter).detach(), ref)


def part_view(value: torch.Tensor, ref: WeightRef) -> torch.Tensor:
    """The weight's part [O, I] of a tensor shaped as the parameter that holds it: a view."""
    if ref.expert is not None:
        value = value[ref.expert]
    if ref.rows is not None:
        value = value[ref.rows[0] : ref.rows[1]]
    return value.t() if ref.transposed else value


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """The arguments one block gets beside its hidden states, for one batch.

    `hidden_name` is the keyword under which hidden states travel, None if they come first, "" if
    the block is a whole body that reads the token ids among the others.  `added` [B, T, H] is what
    the model adds to them on their way to the block: of some models further features of images.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(repr=False)
    hidden_name: str | None = None
    added: torch.Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class ScaleGroup:
    """A producer whose channels may be divided by s > 0 if its readers' columns are multiplied.

    Channel c of the producer is row `rows[c]` of `producer` (a path in the block: a norm's 1-D
    weight, or a matrix whose rows are output features; with `expert` slice `expert` of a fused
    parameter).  Column j of every weight that reads one of `inputs` carries channel
    `channel_map[j]`; several columns may share a channel (GQA).  `readers` are all weights that
    read them, routers included.  A norm's output is (offset + weight) * x (+ bias).
    """

    kind: Literal["norm", "rows"]
    block: int
    producer: str
    bias: str | None
    expert: int | None
    transposed: bool
    offset: float
    rows: torch.Tensor
    channel_map: torch.Tensor
    inputs: tuple[str, ...]
    readers: tuple[WeightRef, ...]
    producer_names: tuple[str, ...]

    @property
    def num_channels(self) -> int:
        """C, the number of independent scales."""
        return len(self.rows)

    def pool(self, scale_I: torch.Tensor) -> torch.Tensor:
        """One scale per producer channel [C], float32: the geometric mean over its columns."""
        total = torch.zeros(self.num_channels, dtype=torch.float32, device=scale_I.device)
        channel = self.channel_map.to(scale_I.device)
        total.index_add_(0, channel, scale_I.float().log())
        count = torch.bincount(channel, minlength=self.num_channels)
        return (total / count).exp()

    def expand(self, scale_C: torch.Tensor) -> torch.Tensor:
        """The scale of every input column [I] from one per producer channel [C]."""
        return scale_C[self.channel_map.to(scale_C.device)]


@dataclass(frozen=True, kw_only=True)
class Folded:
    """What a fold did: the readers' inputs are x / `scale_I` now, their columns times `scale_I`.

    `scale_I` float32 [I] is the ratio of the old to the new *stored* producer, so it may differ
    from what was asked for in the last bits.  `names` are the checkpoint names of all changed
    tensors, producer first.
    """

    group: ScaleGroup
    scale_I: torch.Tensor
    names: tuple[str, ...]
