"""vLLM serves quantkit's checkpoints and continues prompts as transformers does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import CACHED, EXPORTS, MAX_NEW_TOKENS, PICTURE_PROMPT, SERVED_PICTURES
from dense import Activation, Float8Cache, dense_model, float8_tokens, int8_tokens
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Mxfp4Config,
    PreTrainedModel,
)

# bfloat16 rounds logits of this size by about 0.06 each; two can change places below 0.15.
TIE = 0.15
MXFP4_EXPERTS = ["gpt_oss_rtn", "gpt_oss_gptq"]
SERVED = [
    *CACHED, "gptq", "awq", "w8a8", "w4a8", "fp8", "gptq_v1", "gptq_v2", "awq_gemm",
    *MXFP4_EXPERTS,
]  # fmt: skip
ACTIVATIONS: dict[str, Activation] = {
    "w8a8": int8_tokens(levels=127, lowest=-127),
    "w4a8": int8_tokens(levels=127, lowest=-127),
    "fp8": float8_tokens,
}
# transformers reads GPTQ and AWQ files only with GPTQModel (test_gptqmodel.py): what they were
# exported from holds the same numbers.
ORIGIN = {export.name: export.source for export in EXPORTS}


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Token ids of a prompt and of what vLLM greedily appended."""

    prompt: list[int]
    tokens: list[int]


@pytest.fixture(scope="session")
def served(root: Path) -> dict[str, list[Continuation]]:
    """vLLM's continuations of all prompts, by checkpoint."""
    names = [*SERVED, *SERVED_PICTURES]
    for name in names:
        (root / f"{name}-vllm.json").unlink(missing_ok=True)
    script = Path(__file__).with_name("vllm_continue.py")
    command = [sys.executable, str(script), str(root), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = {}
    for name in names:
        record = json.loads((root / f"{name}-vllm.json").read_text(encoding="utf-8"))
        kernel = record["experts" if name in MXFP4_EXPERTS else "kernel"]
        print(f"{name}: vLLM's 4-bit kernel is {kernel}")
        found[name] = [Continuation(**entry) for entry in record["continuations"]]
    return found


@pytest.mark.parametrize("name", SERVED)
def test_tokens_agree_with_transformers(
    root: Path, served: dict[str, list[Continuation]], name: str
) -> None:
    """Free running until the first difference, which must be a tie of the float32 reference."""
    origin = root / ORIGIN.get(name, name)
    # Otherwise transformers wants accelerate, which is not here, to do just this on a CPU.
    decoded = {"quantization_config": Mxfp4Config(dequantize=True)} if name in MXFP4_EXPERTS else {}
    reader = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.bfloat16, **decoded).eval()
    reference = float32_reference(root, name)
    for continuation in served[name]:
        prompt = torch.tensor([continuation.prompt])
        expected = reader.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=MAX_NEW_TOKENS,
            min_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )[0, prompt.shape[1] :].tolist()
        pairs = enumerate(zip(continuation.tokens, expected, strict=True))
        first = next((step for step, (ours, theirs) in pairs if ours != theirs), None)
        print(f"{name}: first difference from transformers at token {first}")
        if first is not None:
            best, second = (
                next_logits(reference, continuation, cache_of(root, name))[first]
                .topk(2)
                .values.tolist()
            )
            # See below: a key on the border between two numbers of float8 is no tie of logits.
            assert best - second < (4 if name in CACHED else 1) * TIE


@pytest.mark.parametrize("name", SERVED)
def test_every_token_is_the_references_choice(
    root: Path, served: dict[str, list[Continuation]], name: str
) -> None:
    """Teacher-forced: each of vLLM's tokens, given vLLM's own before it, is best or nearly."""
    reference = float32_reference(root, name)
    agreed = total = 0
    worst = 0.0
    for continuation in served[name]:
        logits = next_logits(reference, continuation, cache_of(root, name))
        chosen = logits.gather(1, torch.tensor(continuation.tokens)[:, None])[:, 0]
        behind = logits.max(-1).values - chosen
        agreed += int((behind == 0).sum())
        total += len(continuation.tokens)
        worst = max(worst, behind.max().item())
    print(f"{name}: {agreed} of {total} tokens are the float32 reference's, worst gap {worst:.3f}")
    # vLLM's choice and the reference's may each be off by a tie; a key that bfloat16 tips to the
    # next number of float8 moves logits further.
    assert worst < (4 if name in CACHED else 2) * TIE
    # Checkpoints of llm-compressor agree on 121 of 128; a checkpoint misread, on next to none.
    assert agreed >= 0.9 * total


@pytest.mark.parametrize("name", CACHED)
def test_the_cache_has_quantkits_scales(
    root: Path, served: dict[str, list[Continuation]], name: str
) -> None:
    found = json.loads((root / f"{name}-vllm.json").read_text(encoding="utf-8"))
    tensors = load_file(root / name / "model.safetensors")
    for number, layer in enumerate(found["scales"]):
        for leaf, scale in zip(("k", "v"), layer, strict=True):
            stored = tensors[f"model.layers.{number}.self_attn.{leaf}_scale"].flatten().tolist()
            assert scale == stored
    print(f"{name}: vLLM's cache holds {found['cache']}")
    # Without AVX512 its cache on a CPU stays in bfloat16.
    assert (found["cache"] == "fp8") == torch.cpu._is_avx512_supported()


def test_fp8_weights_alone_still_have_no_kernel_on_a_cpu(
    root: Path, served: dict[str, list[Continuation]]
) -> None:
    """When this fails, serve `fp8_weights`, and mend docs/formats/compressed-tensors.md."""
    found = json.loads((root / "vllm-kernels.json").read_text(encoding="utf-8"))
    assert found["fp8a16"] == []


@pytest.mark.parametrize("name", SERVED_PICTURES)
def test_an_image_text_model_says_of_pictures_what_transformers_says(
    root: Path, served: dict[str, list[Continuation]], name: str
) -> None:
    """Teacher-forced, on the pixels: the tower's names are found in `ignore`, or its layers are
    read as quantized ones."""
    processor = AutoProcessor.from_pretrained(root / name)
    model = AutoModelForImageTextToText.from_pretrained(root / name, dtype=torch.float32).eval()
    rows = []
    for number, continuation in enumerate(served[name]):
        with Image.open(root / f"{name}-{number}.png") as image:
            given = processor(text=[PICTURE_PROMPT], images=[image], return_tensors="pt")
        assert given["input_ids"][0].tolist() == continuation.prompt
        rows.append({key: given[key] for key in ("pixel_values", "pixel_attention_mask")})
    agreed, total = 0, 0
    for continuation, pixels, others in zip(served[name], rows, reversed(rows), strict=True):
        gaps = [pictured_gaps(model, continuation, seen) for seen in (pixels, others)]
        agreed += int((gaps[0] == 0).sum())
        total += len(gaps[0])
        print(f"{name}: worst gap {gaps[0].max():.3f}, with the other picture {gaps[1].max():.3f}")
        # As above; with the picture that was not shown it is far from the best.
        assert gaps[0].max() < 2 * TIE < gaps[1].max()
    assert agreed >= 0.9 * total


def pictured_gaps(
    model: PreTrainedModel, continuation: Continuation, pixels: dict[str, torch.Tensor]
) -> torch.Tensor:
    """By how much each token's logit is behind the best one's."""
    ids = torch.tensor([continuation.prompt + continuation.tokens])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **pixels).logits[0]
    logits = logits[len(continuation.prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(continuation.tokens)[:, None])[:, 0]
    return logits.amax(-1) - chosen


def float32_reference(root: Path, name: str) -> PreTrainedModel:
    """quantkit's dequantized weights, with 8-bit tokens where the scheme has them."""
    return dense_model(root, name, activation=ACTIVATIONS.get(name))


def cache_of(root: Path, name: str) -> Float8Cache | None:
    """A fresh cache as vLLM's, if that rounds keys and values."""
    found = json.loads((root / f"{name}-vllm.json").read_text(encoding="utf-8"))
    return Float8Cache(root / name) if found["cache"] == "fp8" else None


def next_logits(
    model: PreTrainedModel, continuation: Continuation, cache: Float8Cache | None
) -> torch.Tensor:
    """Logits [tokens, vocabulary] from which each token of the continuation was to be chosen."""
    ids = torch.tensor([continuation.prompt + continuation.tokens])
    with torch.no_grad():
        cached = cache is not None
        logits = model(input_ids=ids, past_key_values=cache, use_cache=cached).logits[0]
    return logits[len(continuation.prompt) - 1 : -1]


@pytest.mark.parametrize(
    ("kind", "layer"), [("glm4_moe", "model.layers.4"), ("qwen3_next", "mtp.layers.0")]
)
def test_layers_that_predict_further_tokens_have_their_scheme(
    root: Path, kind: str, layer: str
) -> None:
    """By vLLM's own look-up, under the names that its classes of such layers give."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    def bits(name: str, module: str) -> int | None:
        config = json.loads((root / name / "config.json").read_text(encoding="utf-8"))
        asked = CompressedTensorsConfig.from_config(config["quantization_config"])
        asked.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        found = asked.get_scheme_dict(torch.nn.Linear(2, 2), module)
        return None if found is None else found["weights"].num_bits

    for module in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.experts.0.gate_proj"):
        assert bits(f"{kind}-kept", f"{layer}.{module}") is None
        assert bits(f"{kind}-mtp", f"{layer}.{module}") == 8
    for name in (f"{kind}-kept", f"{kind}-mtp"):
        assert bits(name, "model.layers.3.self_attn.o_proj") == 4
        assert bits(name, f"{layer}.mlp.gate") is None


def test_a_quantized_draft_is_accepted_and_changes_no_choice(root: Path) -> None:
    """docs/serving.md: int8 weights and activations, drafted for by the same model in 4 bits."""
    script = Path(__file__).with_name("vllm_speculative.py")
    command = [sys.executable, str(script), str(root), "w8a8", "gptq"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads((root / "w8a8-speculative.json").read_text(encoding="utf-8"))
    accepted, proposed = found["accepted_tokens"], found["draft_tokens"]
    print(f"w8a8 drafted by gptq: {accepted:.0f} of {proposed:.0f} tokens accepted")
    assert 0 < accepted <= proposed
    # The draft is the same model in 4 bits: a misread one agrees on next to nothing.
    assert accepted >= 0.5 * proposed
    reference = float32_reference(root, "w8a8")
    for entry in found["continuations"]:
        continuation = Continuation(**entry)
        logits = next_logits(reference, continuation, None)
        chosen = logits.gather(1, torch.tensor(continuation.tokens)[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < 2 * TIE
