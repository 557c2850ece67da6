"""Mixture-of-experts layers: one loop over experts, for calibration and quantized experts alike.

transformers keeps experts as fused 3-D parameters and lets other code run them through its public
`ExpertsInterface`.  The loop here multiplies by one expert's 2-D slice at a time and marks which
tokens a row belongs to, so that `quantkit.model.trace` can see what each projection reads.

Letters: T tokens (B * T flattened), K experts per token, H hidden size, I and O as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from quantkit.errors import ModelError

IMPLEMENTATION = "quantkit"
# (projection, expert, rows [n, I]) -> [n, O]; projections: gate_up_proj or up_proj, down_proj.
Project = Callable[[str, int, torch.Tensor], torch.Tensor]
# (projection, x [T, I], source [S], expert [S], offsets [E + 1]) -> [S, O]; see run_sorted_experts.
SortedProject = Callable[
    [str, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]
Routing = list[tuple[int, torch.Tensor, torch.Tensor]]


def register() -> None:
    """Makes transformers know the loop as experts implementation "quantkit"; may be repeated."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def uses_interface(module: nn.Module) -> bool:
    """Whether the module is an experts layer that lets the interface run it."""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


def experts_forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Output [T, H] of a fused experts module of transformers, as its own forward gives it."""

    def project(name: str, expert: int, x_nI: torch.Tensor) -> torch.Tensor:
        weight = module.get_parameter(name)[expert]
        has_bias = _flag(module, "has_bias")
        bias = module.get_parameter(f"{name}_bias")[expert] if has_bias else None
        w_OI = weight.t() if _flag(module, "is_transposed") else weight
        return nn.functional.linear(x_nI, w_OI, bias)

    return run_experts(module, hidden_states, top_k_index, top_k_weights, project)


def run_experts(
    module: nn.Module,
    hidden_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    project: Project,
) -> torch.Tensor:
    """Output [T, H]: every expert on the tokens routed to it, in the order of expert numbers.

    `module` gives num_experts, has_gate and the gate function; `project` multiplies.  An expert
    without tokens is not run.  Raises ModelError for norms after each expert.
    """
    first, gate = _gate(module)
    total_TH = torch.zeros_like(hidden_TH)
    for expert, token_n, weight_n in route(index_TK, weight_TK, _num_experts(module)):
        x_nH = mark_tokens(hidden_TH[token_n], token_n)
        mid_nI = mark_tokens(gate(project(first, expert, x_nH)), token_n)
        y_nH = project("down_proj", expert, mid_nI) * weight_n[:, None]
        total_TH.index_add_(0, token_n, y_nH.to(total_TH.dtype))
    return total_TH


def run_sorted_experts(
    module: nn.Module,
    hidden_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    project: SortedProject,
) -> torch.Tensor:
    """Output [T, H]: what `run_experts` gives, by one product for all experts at once.

    The S = T * K pairs of a token and an expert are sorted by expert: row s reads row source[s] of
    x and belongs to expert[s]; those of expert e are offsets[e] to offsets[e + 1].  No shape
    depends on the routing, so graphs capture it.  A token's parts are added in float32.
    """
    first, gate = _gate(module)
    count, (tokens, slots) = _num_experts(module), index_TK.shape
    device = hidden_TH.device
    expert_S, order_S = torch.sort(index_TK.reshape(-1), stable=True)
    edges = torch.arange(count + 1, device=device, dtype=expert_S.dtype)
    offsets = torch.searchsorted(expert_S, edges, out_int32=True)
    mid_SI = gate(project(first, hidden_TH, order_S // slots, expert_S, offsets))
    every_S = torch.arange(tokens * slots, device=device)
    y_SH = project("down_proj", mid_SI, every_S, expert_S, offsets)
    # Numbers out of range mean "no expert": some routers pad with them.
    known_S = (expert_S >= 0) & (expert_S < count)
    weight_S = torch.where(known_S, weight_TK.reshape(-1)[order_S].float(), 0.0)
    back_S = torch.empty_like(order_S).scatter_(0, order_S, every_S)
    parts_SH = (y_SH.float() * weight_S[:, None])[back_S]
    return parts_SH.view(tokens, slots, -1).sum(dim=1).to(hidden_TH.dtype)


def route(index_TK: torch.Tensor, weight_TK: torch.Tensor, num_experts: int) -> Routing:
    """(expert, its tokens int64 [n], their weights [n]) for every expert that has tokens.

    A TorchFunctionMode sees the call and may answer otherwise (probing sends all to all).
    """
    if has_torch_function((index_TK, weight_TK)):
        routed: Any = handle_torch_function(
            route, (index_TK, weight_TK), index_TK, weight_TK, num_experts
        )
        return routed
    routing: Routing = []
    # Numbers from num_experts up mean "no expert": some routers pad with them.
    for expert in torch.unique(index_TK).tolist():
        if 0 <= expert < num_experts:
            token_n, slot_n = torch.where(index_TK == expert)
            routing.append((expert, token_n, weight_TK[token_n, slot_n]))
    return routing


def mark_tokens(x_nI: torch.Tensor, token_n: torch.Tensor) -> torch.Tensor:
    """x itself; tells an active TorchFunctionMode which tokens its rows are."""
    if has_torch_function((x_nI,)):
        marked: torch.Tensor = handle_torch_function(mark_tokens, (x_nI,), x_nI, token_n)
        return marked
    return x_nI


def _gate(module: nn.Module) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The first projection's name and what follows it; ModelError for norms after each expert."""
    if _flag(module, "has_post_expert_norm"):
        raise ModelError(f"{type(module).__name__}: experts with a norm of their own are unknown")
    if _flag(module, "has_gate"):
        return "gate_up_proj", getattr(module, "_apply_gate")  # noqa: B009
    return "up_proj", getattr(module, "act_fn")  # noqa: B009


def _num_experts(module: nn.Module) -> int:
    number = getattr(module, "num_experts", None)
    if not isinstance(number, int):
        raise ModelError(f"{type(module).__name__}: does not say how many experts it has")
    return number


def _flag(module: nn.Module, name: str) -> bool:
    return bool(getattr(module, name, False))
