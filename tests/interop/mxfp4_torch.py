"""A plain PyTorch product of MXFP4 experts for vLLM on CPUs without AMX.

vLLM's only CPU kernel for them is compiled for AMX.  Elsewhere this product takes its place, so
that vLLM still parses the configuration, chooses the method and the class of experts, renames and
loads the tensors, routes and adds up.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts import cpu_moe

NATIVE_KERNEL = "CPUExpertsMxfp4"
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def kernel_in_use() -> str:
    """Name of what will multiply MXFP4 experts; puts the product below where vLLM has none."""
    if torch.cpu._is_amx_tile_supported():
        return NATIVE_KERNEL
    cpu_moe.CPUExpertsMxfp4._supports_current_device = staticmethod(lambda: True)
    cpu_moe.prepare_mxfp4_moe_layer_for_cpu = lambda *tensors: tensors
    cpu_moe.fused_experts_cpu = _experts
    return f"{__name__}.{_experts.__name__}"


def _experts(
    output_TH: torch.Tensor,
    hidden_TH: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    method: Any,
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    w1_zero: None,
    w2_zero: None,
    block_size: None,
    w1_bias: torch.Tensor,
    w2_bias: torch.Tensor,
    alpha: float,
    limit: float,
    is_vnni: bool,
) -> torch.Tensor:
    """gpt_oss' experts with gate and up interleaved, in float32, every token by itself."""
    assert method == cpu_moe.CPUQuantMethod.MXFP4
    for token, (weights_K, ids_K) in enumerate(zip(topk_weights_TK, topk_ids_TK, strict=True)):
        total_H = torch.zeros_like(hidden_TH[token], dtype=torch.float32)
        for weight, expert in zip(weights_K.tolist(), ids_K.tolist(), strict=True):
            both = _decoded(w1[expert], w1_scale[expert]) @ hidden_TH[token].float()
            both += w1_bias[expert].float()
            gate, up = both[::2].clamp(max=limit), both[1::2].clamp(-limit, limit)
            middle = (up + 1) * gate * torch.sigmoid(alpha * gate)
            result_H = _decoded(w2[expert], w2_scale[expert]) @ middle + w2_bias[expert].float()
            total_H += weight * result_H
        output_TH[token] = total_H.to(output_TH.dtype)
    return output_TH


def _decoded(packed_OB: torch.Tensor, exponent_OG: torch.Tensor) -> torch.Tensor:
    """float32 [O, I]: two numbers a byte, the first in the low nibble, times a power of two."""
    codes = torch.stack([packed_OB & 15, packed_OB >> 4], -1).flatten(-2).long()
    numbers = torch.tensor([*_NUMBERS, *(-number for number in _NUMBERS)])
    scale = torch.exp2(exponent_OG.float() - 127).repeat_interleave(32, -1)
    return numbers[codes] * scale
