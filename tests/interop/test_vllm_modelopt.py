"""vLLM loads ModelOpt's layout: the numbers that lie in it are quantkit's, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import MODELOPT
from dense import dense_model, quantized_weights
from safetensors.torch import load_file
from transformers import PreTrainedModel

# As in test_vllm.py.
TIE = 0.15
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# What vLLM calls each; all files say "modelopt".
METHODS = {"mxfp8a8": "modelopt_mxfp8", "nvfp4a4": "modelopt_fp4", "nvfp4a16": "modelopt_fp4"}


@pytest.fixture(scope="session")
def served(root: Path) -> Path:
    """The directory, once vLLM has written what it made of each checkpoint."""
    for name in MODELOPT:
        (root / f"{name}-vllm.json").unlink(missing_ok=True)
    script = Path(__file__).with_name("vllm_modelopt.py")
    command = [sys.executable, str(script), str(root), *MODELOPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return root


@pytest.mark.parametrize("name", MODELOPT)
def test_weights_and_scales_are_quantkits(served: Path, name: str) -> None:
    scheme, options = MODELOPT[name]
    found = load_file(served / f"{name}-vllm.safetensors")
    told = json.loads((served / f"{name}-vllm.json").read_text(encoding="utf-8"))
    assert told["quantization"] == METHODS.get(scheme, "modelopt")
    stored = load_file(served / name / "model.safetensors")
    expected = quantized_weights(served, name)
    seen = 0
    for key, weight in found.items():
        module, _, leaf = key.rpartition(".")
        parent, _, last = module.rpartition(".")
        parts = [f"{parent}.{part}" for part in FUSED.get(last, (last,))]
        if leaf == "weight":
            assert torch.equal(weight, torch.cat([expected[f"{p}.weight"] for p in parts])), key
            seen += len(parts)
        elif leaf == "input_scale":
            assert all(weight == stored[f"{part}.input_scale"] for part in parts), key
        else:
            # vLLM's attention lies in the model's: self_attn.attn.
            kept = stored.get(f"{parent}.{leaf[0]}_proj.{leaf}", torch.ones(1))
            assert weight == (kept if told["cache"].startswith("fp8") else 1), key
    assert seen == len(expected)
    inputs = [key for key in found if key.endswith("input_scale")]
    assert bool(inputs) == (scheme in ("fp8a8_tensor", "nvfp4a4"))
    # Without AVX512 its cache on a CPU stays in bfloat16.
    fp8 = "--kv" in options and torch.cpu._is_avx512_supported()
    assert (told["cache"].startswith("fp8")) == fp8


@pytest.mark.parametrize("name", [n for n, (_, given) in MODELOPT.items() if "--kv" in given])
def test_scales_of_the_cache_have_names_that_vllm_maps(root: Path, name: str) -> None:
    from vllm.model_executor.model_loader.weight_utils import maybe_remap_kv_scale_name

    stored = load_file(root / name / "model.safetensors")
    scales = [key for key in stored if key.endswith((".k_scale", ".v_scale"))]
    wanted = {
        f"model.layers.{number}.self_attn.attn.{leaf}_scale": torch.empty(())
        for number in range(len(scales) // 2)
        for leaf in "kv"
    }
    assert {maybe_remap_kv_scale_name(key, wanted) for key in scales} == set(wanted)


@pytest.mark.parametrize("name", MODELOPT)
def test_every_token_is_the_references_choice(served: Path, name: str) -> None:
    """Teacher-forced on weights alone: the product that is stood in rounds no input."""
    reference = dense_model(served, name)
    agreed = total = 0
    worst = 0.0
    told = json.loads((served / f"{name}-vllm.json").read_text(encoding="utf-8"))
    for entry in told["continuations"]:
        logits = next_logits(reference, entry["prompt"], entry["tokens"])
        chosen = logits.gather(1, torch.tensor(entry["tokens"])[:, None])[:, 0]
        behind = logits.max(-1).values - chosen
        agreed += int((behind == 0).sum())
        total += len(entry["tokens"])
        worst = max(worst, behind.max().item())
    print(f"{name}: {agreed} of {total} tokens are the float32 reference's, worst gap {worst:.3f}")
    # A key that bfloat16 tips to the next number of float8 moves logits further.
    assert worst < (4 if told["cache"].startswith("fp8") else 2) * TIE
    assert agreed >= 0.9 * total


def next_logits(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] from which each token was to be chosen."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([prompt + tokens])).logits[0]
    return logits[len(prompt) - 1 : -1]
