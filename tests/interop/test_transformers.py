"""transformers with compressed-tensors computes with the numbers that quantkit wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CACHED, IMAGES, PICTURES, TOWERS, VECTORS
from compressed_tensors.quantization import disable_quantization
from dense import Float8Cache, dense_model, int8_tokens, loaded, logits, quantized_weights
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

# Float32 sums in another order differ by less; one wrong code or scale differs by far more.
TOLERANCE = 1e-3
DENSE = ["dense2", "dense5", "dense6"]
SYMMETRIC = ["rtn", "gptq", "w8a16", "fp8_weights", *DENSE]
ASYMMETRIC = ["awq", "dense3_asym"]
INT8_ACTIVATIONS = ["w8a8", "w4a8", "w4a8_row", "smoothquant"]
EIGHT_BIT_ACTIVATIONS = [*INT8_ACTIVATIONS, "w4afp8", "fp8"]
# Products in float32 with activations rounded as quantkit's; what runs in bfloat16 only.
FLOAT8 = ["w4afp8", "fp8_blocks", "fp8_tensor"]
BFLOAT16_WEIGHTS = ["mxfp8_weights", "mxfp4_weights", "nvfp4_weights"]
BFLOAT16 = [*BFLOAT16_WEIGHTS, "mxfp8", "mxfp4", "nvfp4"]
EXPERTS = ["mixtral", "qwen3_moe"]
MXFP4_EXPERTS = ["gpt_oss_rtn", "gpt_oss_gptq"]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric_checkpoint_gives_the_logits_of_quantkit(root: Path, name: str) -> None:
    assert max_difference(loaded(root, name), root, name) < TOLERANCE


def test_a_mix_of_symmetric_weights_gives_the_logits_of_quantkit(root: Path) -> None:
    assert max_difference(loaded(root, "mix"), root, "mix") < TOLERANCE


def test_a_mix_of_asymmetric_weights_is_not_decoded(root: Path) -> None:
    """Nor does quantkit say so; when this fails, mend formats/readers.py."""
    report = json.loads((root / "mix_asym/quantkit/report.json").read_text(encoding="utf-8"))
    assert "same bits and groups" in report["readers"]["transformers"]
    # All dense layers are decoded by the first scheme: zeros of the second do not fit its groups.
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        loaded(root, "mix_asym")


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("cached", [False, True])
def test_keys_and_values_are_rounded_with_quantkits_scales(
    root: Path, name: str, cached: bool
) -> None:
    model, reference = loaded(root, name), dense_model(root, name)
    ids = load_file(root / f"{name}-logits.safetensors")["input_ids"]
    with torch.no_grad():
        plain = reference(input_ids=ids, use_cache=False).logits
        cache = Float8Cache(root / name)
        expected = reference(input_ids=ids, past_key_values=cache, use_cache=True).logits
        found = model(input_ids=ids, use_cache=cached).logits
    assert (found - expected).abs().max().item() < TOLERANCE
    assert (plain - expected).abs().max().item() > 10 * TOLERANCE


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_give_the_logits_of_quantkit(root: Path, name: str) -> None:
    # Whatever dtype is asked for, transformers decodes experts to that of the stored scales.
    model = loaded(root, name)
    experts = [p for path, p in model.named_parameters() if ".experts." in path]
    assert {parameter.dtype for parameter in experts} == {torch.bfloat16}
    for parameter in experts:
        parameter.data = parameter.data.float()
    expected = logits(dense_model(root, name, expert_dtype=torch.bfloat16), root, name)
    actual = logits(model, root, name)
    assert (actual - expected).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_asymmetric_checkpoint_gives_the_logits_of_quantkit(root: Path, name: str) -> None:
    # Told to dequantize, transformers decodes to the dtype of the stored scales: bfloat16 here.
    expected = logits(dense_model(root, name, weight_dtype=torch.bfloat16), root, name)
    actual = logits(loaded(root, name), root, name)
    assert (actual - expected).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("name", EIGHT_BIT_ACTIVATIONS)
def test_eight_bit_weights_give_the_logits_of_quantkit(root: Path, name: str) -> None:
    model = loaded(root, name)
    logits(model, root, name)
    model.apply(disable_quantization)
    expected = logits(dense_model(root, name), root, name)
    assert (logits(model, root, name) - expected).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("name", INT8_ACTIVATIONS)
def test_int8_activations_are_quantized_per_token(root: Path, name: str) -> None:
    # compressed-tensors divides by 127.5 and uses -128 too, unlike quantkit and vLLM.
    rule = int8_tokens(levels=127.5, lowest=-128)
    expected = logits(dense_model(root, name, activation=rule), root, name)
    assert (logits(loaded(root, name), root, name) - expected).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_with_rounded_activations_gives_the_logits_of_quantkit(
    root: Path, name: str
) -> None:
    assert max_difference(loaded(root, name), root, name) < TOLERANCE


def test_native_fp8_decodes_to_quantkits_weights(root: Path) -> None:
    # Without a GPU transformers decodes the blocks while loading, and mixes dtypes in float32.
    model = AutoModelForCausalLM.from_pretrained(root / "fp8_native", dtype=torch.bfloat16).eval()
    for weight, expected in quantized_weights(root, "fp8_native").items():
        actual = model.get_submodule(weight.removesuffix(".weight")).weight
        assert torch.equal(actual.bfloat16(), expected.bfloat16()), weight
    expected = logits(dense_model(root, "fp8_native"), root, "fp8_native")
    found = logits(model, root, "fp8_native")
    # bfloat16 moves the logits of dense weights by 1 %.
    assert ((found - expected).norm() / expected.norm()).item() < 0.02


@pytest.mark.parametrize("kind", VECTORS)
def test_an_embedding_model_gives_the_states_of_quantkit(root: Path, kind: str) -> None:
    asked = load_file(root / f"{kind}-vectors-states.safetensors")
    found, original = (
        AutoModel.from_pretrained(path, dtype=torch.float32).eval()
        for path in (root / f"{kind}-vectors", root / "source" / f"{kind}-vectors")
    )
    with torch.no_grad():
        states, before = (
            model(input_ids=asked["input_ids"]).last_hidden_state for model in (found, original)
        )
    assert (states - asked["states"]).abs().max().item() < TOLERANCE
    assert (before - asked["states"]).abs().max().item() > 10 * TOLERANCE


@pytest.mark.parametrize("name", MXFP4_EXPERTS)
def test_gpt_oss_experts_decode_to_quantkits_numbers(root: Path, name: str) -> None:
    # Without a GPU transformers decodes experts in MXFP4 while loading, to the dtype asked for.
    model, expected = loaded(root, name), dense_model(root, name)
    parameters = dict(model.named_parameters())
    for path, parameter in expected.named_parameters():
        assert torch.equal(parameters[path], parameter), path
    assert sum(".experts." in path and parameters[path].ndim == 3 for path in parameters) == 4
    assert max_difference(model, root, name) < TOLERANCE


@pytest.mark.parametrize("name", BFLOAT16)
def test_floats_that_run_in_bfloat16_decode_to_quantkits_weights(root: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.bfloat16).eval()
    found = logits(model, root, name)
    for weight, expected in quantized_weights(root, name).items():
        actual = model.get_submodule(weight.removesuffix(".weight")).weight
        assert torch.equal(actual, expected.bfloat16()), weight
    expected = load_file(root / f"{name}-logits.safetensors")["logits"]
    distance = ((found - expected).norm() / expected.norm()).item()
    print(f"{name}: bfloat16 logits are {distance:.4f} from float32's")
    # bfloat16 moves the logits of dense weights by 1 %, and which of 8 or 16 numbers an
    # activation is rounded to by more.
    assert distance < (0.02 if name in BFLOAT16_WEIGHTS else 0.2)


@pytest.mark.parametrize("name", [*SYMMETRIC, *ASYMMETRIC, *EXPERTS])
def test_dense_reference_is_what_quantkit_computes(root: Path, name: str) -> None:
    assert max_difference(dense_model(root, name), root, name) < TOLERANCE


@pytest.mark.parametrize("name", [*SYMMETRIC, *ASYMMETRIC, *EIGHT_BIT_ACTIVATIONS])
def test_decoded_weights_are_quantkits_bit_for_bit(root: Path, name: str) -> None:
    model = loaded(root, name)
    logits(model, root, name)
    dtype = torch.bfloat16 if name in ASYMMETRIC else torch.float32
    for weight, expected in quantized_weights(root, name).items():
        actual = model.get_submodule(weight.removesuffix(".weight")).weight
        assert torch.equal(actual, expected.to(dtype).float()), weight


@pytest.mark.parametrize("name", IMAGES)
def test_image_models_give_the_logits_of_quantkit_and_keep_their_towers(
    root: Path, name: str
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(root / name, dtype=torch.float32)
    source = AutoModelForImageTextToText.from_pretrained(root / "source" / name)
    found = model.state_dict()
    for path, tensor in source.state_dict().items():
        if ".language_model." not in path:
            assert torch.equal(found[path], tensor), path
    assert any(path.endswith("head.attention.out_proj.weight") for path in found)
    assert max_difference(model.eval(), root, name) < TOLERANCE


@pytest.mark.parametrize(
    "name", [*(f"{kind}-pictures" for kind in PICTURES), *(f"{kind}-towers" for kind in TOWERS)]
)
def test_image_models_give_the_logits_of_quantkit_for_an_image(root: Path, name: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(root / name, dtype=torch.float32)
    given = load_file(root / f"{name}-logits.safetensors")
    expected = given.pop("logits")
    with torch.no_grad():
        found = model.eval()(**given).logits
    assert (found - expected).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("name", ["gptq", "awq", "w8a8"])
def test_generates_in_bfloat16(root: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / name)
    model = AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.bfloat16)
    batch = tokenizer("The function returns", return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert tokens.shape[1] == batch["input_ids"].shape[1] + 8


def max_difference(model: PreTrainedModel, root: Path, name: str) -> float:
    """Largest absolute difference from the logits of `quantkit.load`."""
    expected = load_file(root / f"{name}-logits.safetensors")["logits"]
    return (logits(model, root, name) - expected).abs().max().item()


@pytest.mark.parametrize("name", ["rtn", "awq", "w8a8", "nf4_dq", "fp8", "qwen2_vl-towers"])
def test_verify_finds_that_transformers_reads_it_right(root: Path, name: str) -> None:
    sources = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{sources}{os.pathsep}{sources / 'kernels'}"}
    command = [sys.executable, "-m", "quantkit", "verify", str(root / name)]
    done = subprocess.run(
        [*command, "--runtime", "transformers"], capture_output=True, text=True, env=environment
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "greedy tokens are quantkit's own" in done.stdout
