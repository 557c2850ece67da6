"""The experts loop against transformers' own forward of the same modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import MixtralConfig
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from quantkit.errors import ModelError
from quantkit.model.experts import experts_forward, mark_tokens, route, run_experts, uses_interface


def experts(kind: str) -> nn.Module:
    if kind == "mixtral":
        small = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=4)
        small._experts_implementation = "eager"
        module: nn.Module = MixtralExperts(small)
    else:
        other = GptOssConfig(hidden_size=16, intermediate_size=24, num_local_experts=4)
        other._experts_implementation = "eager"
        module = GptOssExperts(other)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.requires_grad_(False).eval()


def routing(tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden_TH = torch.randn(tokens, 16, generator=generator)
    # Expert 2 gets no token.
    scores = torch.rand(tokens, 4, generator=generator)
    scores[:, 2] = -1
    top = scores.topk(2, dim=-1)
    return hidden_TH, top.indices, top.values


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_loop_gives_what_transformers_gives(kind: str) -> None:
    module = experts(kind)
    assert uses_interface(module)
    hidden_TH, index_TK, weight_TK = routing()
    expected = module(hidden_TH, index_TK, weight_TK)
    found = experts_forward(module, hidden_TH, index_TK, weight_TK)
    # The same products, summed in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_projections_may_be_anything_callable() -> None:
    module = experts("mixtral")
    hidden_TH, index_TK, weight_TK = routing()
    asked: list[tuple[str, int]] = []

    def project(name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        asked.append((name, expert))
        return x @ module.get_parameter(name)[expert].t()

    found = run_experts(module, hidden_TH, index_TK, weight_TK, project)
    expected = module(hidden_TH, index_TK, weight_TK)
    # The same products, summed in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert asked == [(n, e) for e in (0, 1, 3) for n in ("gate_up_proj", "down_proj")]


def test_expert_numbers_out_of_range_mean_no_expert() -> None:
    index = torch.tensor([[0, 4], [4, 4]])
    [(expert, token, weight)] = route(index, torch.tensor([[0.5, 0.25], [1.0, 1.0]]), 4)
    assert (expert, token.tolist(), weight.tolist()) == (0, [0], [0.5])


def test_marks_reach_an_active_mode_and_nobody_else() -> None:
    seen: list[torch.Tensor] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is mark_tokens:
                seen.append(args[1])
                return args[0]
            return func(*args, **(kwargs or {}))

    x, tokens = torch.ones(2, 3), torch.tensor([4, 5])
    assert mark_tokens(x, tokens) is x
    assert not seen
    with Watch():
        assert mark_tokens(x, tokens) is x
    assert seen[0] is tokens


def test_a_norm_after_each_expert_is_refused() -> None:
    module = experts("mixtral")
    module.has_post_expert_norm = True
    with pytest.raises(ModelError, match="norm"):
        experts_forward(module, *routing())
