"""Writes what vLLM makes of checkpoints in ModelOpt's layout, with plain products.

    vllm_modelopt.py ROOT NAME...

vLLM has no CPU kernel for most of these numbers.  It parses the configuration, chooses the scheme,
loads, fuses and finishes the weights; `select_linear_kernel` alone is replaced, by a kernel that
decodes what it is given with vLLM's own functions and multiplies, inputs as they are.
ROOT/NAME-vllm.json has the tokens, ROOT/NAME-vllm.safetensors for each of its modules

    MODULE.weight        float32 [O, I], rows of fused weights below each other
    MODULE.input_scale   float32 [], what its inputs are to be divided by, if the file says that
    MODULE.k_scale, MODULE.v_scale   of attention
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from cases import MAX_NEW_TOKENS, PROMPTS
from safetensors.torch import save_file
from vllm.model_executor.layers.quantization import modelopt
from vllm.model_executor.layers.quantization.utils.mxfp8_utils import dequant_mxfp8_to_bf16
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    dequantize_to_dtype,
)

# Sets vLLM's environment, too.
from vllm_continue import LLM, Attention, SamplingParams, cleanup_dist_env_and_memory


class PlainKernel:
    """Stands where vLLM's kernel would; `layer` has what vLLM hands to that."""

    def input_quant_key(self) -> None:
        return None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.plain = decoded(layer)

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.plain.to(x.dtype), bias)


def decoded(layer: torch.nn.Module) -> torch.Tensor:
    """The weight [O, I] in float32."""
    weight, scale = layer.weight.data, layer.weight_scale.data
    if weight.dtype == torch.uint8:
        outer = layer.weight_global_scale.data
        return dequantize_to_dtype(weight, scale, outer, torch.float32, swizzle=False)
    if scale.dtype == torch.uint8:
        return dequant_mxfp8_to_bf16(weight.contiguous(), scale).float()
    # Scales of a whole weight or a row: vLLM turns the weight for its kernels.
    if scale.ndim < 2 or scale.shape[1] == 1 < weight.shape[1] // 128:
        rows = weight if weight.is_contiguous() else weight.t()
        return rows.float() * scale.reshape(-1, 1)
    spread = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)
    return weight.float() * spread[:, : weight.shape[1]]


def main() -> None:
    root, names = Path(sys.argv[1]), sys.argv[2:]
    modelopt.select_linear_kernel = lambda *_, **__: PlainKernel()
    for name in names:
        record, tensors = served(root / name)
        (root / f"{name}-vllm.json").write_text(json.dumps(record), encoding="utf-8")
        save_file(tensors, root / f"{name}-vllm.safetensors")


def served(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Tokens of every prompt and its continuation; what lies in vLLM's modules."""
    # Its float8 cache needs these instructions on a CPU; without it, it drops the file's scales.
    cache = "auto" if torch.cpu._is_avx512_supported() else "bfloat16"
    engine = LLM(
        str(path),
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_dtype=cache,
    )
    worker = engine.llm_engine.model_executor.driver_worker.worker
    tensors: dict[str, torch.Tensor] = {}
    cached = "none"
    for module, layer in worker.model_runner.model.named_modules():
        if hasattr(layer, "plain"):
            tensors[f"{module}.weight"] = layer.plain.float().contiguous()
            for leaf in ("input_global_scale", "input_scale"):
                if hasattr(layer, leaf):
                    tensors[f"{module}.input_scale"] = getattr(layer, leaf).data.float().clone()
        elif isinstance(layer, Attention):
            cached = layer.kv_cache_dtype
            tensors[f"{module}.k_scale"] = layer._k_scale.float().reshape(1).clone()
            tensors[f"{module}.v_scale"] = layer._v_scale.float().reshape(1).clone()
    sampling = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS, ignore_eos=True)
    outputs = engine.generate(list(PROMPTS), sampling, use_tqdm=False)
    found = [
        {"prompt": list(out.prompt_token_ids), "tokens": list(out.outputs[0].token_ids)}
        for out in outputs
    ]
    quantization = engine.llm_engine.vllm_config.model_config.quantization
    del engine, outputs, worker
    cleanup_dist_env_and_memory()
    told = {"quantization": quantization, "cache": cached, "continuations": found}
    return told, tensors


if __name__ == "__main__":
    main()
