"""What transforms share about input channels.

Shapes: I in features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


def pool(values_I: Tensor, channel_map_I: Tensor, how: Literal["mean", "amax"]) -> Tensor:
    """The mean or maximum over the input channels that come from one producer channel, [I]."""
    size = int(channel_map_I.max()) + 1
    channel_map_I = channel_map_I.to(values_I.device)
    pooled = values_I.new_zeros(size)
    pooled.scatter_reduce_(0, channel_map_I, values_I, how, include_self=False)
    return pooled[channel_map_I]
