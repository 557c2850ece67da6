"""Statistics of experts from all tokens: what the router does not send counts for less.

An expert that few tokens of the calibration text reach would be rounded on next to no statistics.
Here every expert computes every token; one that the router does not send to it counts with the
odds of that expert against the last one chosen, by the router's logits: exp(l_e - l_k), at most 1.
Outputs are the routed ones.

Letters: T tokens, K experts per token, E experts, n rows, I in features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.model.experts import Routing
from quantkit.model.trace import Tap
from quantkit.model.uses import Use

# Takes the key of an expert's input and how many tokens the router sent there.
Routed = Callable[[str, int], None]


class SpreadTap(Tap):
    """As `Tap`, but experts' inputs get all tokens, rows times the root of what they count."""

    def __init__(self, *given: Any, routed: Routed) -> None:
        super().__init__(*given)
        self._routed = routed
        self._logits: dict[int, Tensor] = {}
        self._share_TE: Tensor | None = None
        self._sent_TE: Tensor | None = None

    def produced(self, use: Use, y: Tensor) -> None:
        if use.expert is None:
            self._logits[y.shape[-1]] = y.reshape(-1, y.shape[-1])

    def routing(self, index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Routing:
        logits_TE = self._logits.get(num_experts)
        if logits_TE is None or len(logits_TE) != len(index_TK):
            raise ModelError(f"no product before the {num_experts} experts gives a router's logits")
        self._share_TE, self._sent_TE = shares(logits_TE, index_TK)
        weight_TE = weight_TK.new_zeros(len(index_TK), num_experts + 1)
        # Numbers out of range mean "no expert".
        known = (index_TK >= 0) & (index_TK < num_experts)
        weight_TE.scatter_add_(1, torch.where(known, index_TK, num_experts), weight_TK)
        every_T = torch.arange(len(index_TK), device=index_TK.device)
        return [(expert, every_T, weight_TE[:, expert]) for expert in range(num_experts)]

    def tell(self, use: Use, key: str, x_nI: Tensor, token_n: Tensor | None) -> None:
        if use.expert is None or token_n is None:
            super().tell(use, key, x_nI, token_n)
            return
        assert self._share_TE is not None and self._sent_TE is not None
        self._routed(key, int(self._sent_TE[token_n, use.expert].sum()))
        root_n = self._share_TE[token_n, use.expert].sqrt()
        super().tell(use, key, x_nI.to(torch.float32) * root_n[:, None], token_n)


def shares(logits_TE: Tensor, index_TK: Tensor) -> tuple[Tensor, Tensor]:
    """(what each token counts for each expert, float32 in 0..1; whether it is sent there) [T, E].

    `index` are the experts chosen; numbers out of range mean none.
    """
    logits_TE = logits_TE.to(torch.float32)
    tokens, experts = logits_TE.shape
    known_TK = (index_TK >= 0) & (index_TK < experts)
    place_TK = torch.where(known_TK, index_TK, experts)
    sent_TE = torch.zeros(tokens, experts + 1, dtype=torch.bool, device=logits_TE.device)
    sent_TE = sent_TE.scatter_(1, place_TK, True)[:, :experts]
    last_T = logits_TE.masked_fill(~sent_TE, torch.inf).amin(1)
    share_TE = torch.exp(logits_TE - last_T[:, None]).clamp(max=1.0)
    return torch.where(sent_TE, 1.0, share_TE), sent_TE
