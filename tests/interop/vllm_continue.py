"""Writes what vLLM greedily appends to the prompts of cases.py, for each checkpoint given.

    vllm_continue.py ROOT NAME...

writes ROOT/NAME-vllm.json, with what its cache holds and each layer's scales of keys and values,
and in ROOT/vllm-kernels.json the names of the kernels that vLLM has on a CPU for FP8 weights with
16-bit activations.  A process of its own: vLLM binds threads and keeps state that would slow down
or disturb whatever runs after it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)

import mxfp4_torch
import wna16_torch
from cases import MAX_NEW_TOKENS, PICTURE_PROMPT, PROMPTS, SERVED_PICTURES
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import PlatformEnum


def main() -> None:
    root, names = Path(sys.argv[1]), sys.argv[2:]
    kernel = wna16_torch.kernel_in_use()
    experts = mxfp4_torch.kernel_in_use()
    found = [cls.__name__ for cls in linear._POSSIBLE_WFP8A16_KERNELS[PlatformEnum.CPU]]
    (root / "vllm-kernels.json").write_text(json.dumps({"fp8a16": found}), encoding="utf-8")
    for name in names:
        record = {"kernel": kernel, "experts": experts, **continuations(root / name)}
        (root / f"{name}-vllm.json").write_text(json.dumps(record), encoding="utf-8")


def continuations(path: Path) -> dict[str, Any]:
    """Token ids of every prompt and of its continuation, computed in bfloat16."""
    # Its float8 cache needs these instructions on a CPU; the file's scales are loaded all the same.
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
    layers = [m for m in worker.model_runner.model.modules() if isinstance(m, Attention)]
    sampling = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS, ignore_eos=True)
    prompts: list[Any] = list(PROMPTS)
    if path.name in SERVED_PICTURES:
        prompts = [
            {"prompt": PICTURE_PROMPT, "multi_modal_data": {"image": Image.open(file)}}
            for file in sorted(path.parent.glob(f"{path.name}-[01].png"))
        ]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    found = [
        {"prompt": list(out.prompt_token_ids), "tokens": list(out.outputs[0].token_ids)}
        for out in outputs
    ]
    told = {
        "cache": layers[0].kv_cache_dtype,
        "scales": [[m._k_scale.flatten().tolist(), m._v_scale.flatten().tolist()] for m in layers],
    }
    del engine, outputs, worker, layers
    cleanup_dist_env_and_memory()
    return {"continuations": found, **told}


if __name__ == "__main__":
    main()
