"""Quantized layers and models under torch.compile and transformers' ways to generate, on CPU."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inference.test_layers import make_tensor
from inference.test_load import CONFIGS, make_model, write_quantized
from transformers import AutoModelForCausalLM, CompileConfig

from quantkit.errors import BackendError
from quantkit.inference.backend import check_backend, choose_kernel
from quantkit.inference.layers import QuantLinear
from quantkit.inference.load import load

SCHEMES = ["w4a16_g32", "w4a16_g32_asym", "w8a16_row", "w8a8_row", "nf4_b64", "nf4_b64_dq"]
SCHEMES += ["fp8a16_row", "fp8a16_g32", "fp8a8_row"]
PROMPT = torch.arange(3, 3 + 10).view(1, 10)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_compiles_whole_with_any_number_of_rows(name: str) -> None:
    tensor = make_tensor(name, (96, 128), dtype=torch.bfloat16)
    layer = QuantLinear(tensor, torch.randn(96).bfloat16(), backend="cpu")
    assert layer.fallback is None
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 128), (5, 128), (1, 128)):
        x = torch.randn(shape).bfloat16()
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for CPUs")
def test_a_layer_compiles_with_inductor() -> None:
    layer = QuantLinear(make_tensor("w4a16_g32", (96, 128), dtype=torch.bfloat16), backend="cpu")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    x = torch.randn(2, 3, 128).bfloat16()
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("name", SCHEMES)
def test_kernels_give_the_canonical_tensor_back_and_agree_with_the_reference(name: str) -> None:
    from inference.test_layers import same

    tensor = make_tensor(name, (70, 192), dtype=torch.bfloat16)
    bias = torch.randn(70)
    fast, plain = (QuantLinear(tensor, bias, backend=kind) for kind in ("auto", "reference"))
    assert fast.fallback is None and fast.kernel.name.startswith("cpu")
    assert same(fast.quantized_tensor, tensor)
    assert same(fast.to(torch.float16).quantized_tensor, tensor)
    x = torch.randn(3, 192).bfloat16()
    # bfloat16 activations and sums: a few steps of 2^-8.
    close = (fast(x) - plain(x)).abs().max() <= 2**-6 * plain(x).abs().max()
    assert close


@pytest.mark.parametrize("name", ["w4a16_g32_asym", "w8a16_g32"])
def test_activation_order_takes_the_input_along(name: str) -> None:
    tensor = make_tensor(name, (70, 192), dtype=torch.bfloat16)
    order = torch.randperm(192, generator=torch.Generator().manual_seed(0))
    tensor = dataclasses.replace(tensor, columns=order)
    layer = QuantLinear(tensor, backend="auto")
    assert layer.fallback is None
    x = torch.randn(3, 192).bfloat16()
    wanted = x.double() @ tensor.dequantize(torch.float32).double().t()
    # bfloat16 products and result: a few steps of 2^-8.
    assert (layer(x) - wanted).abs().max() <= 2**-6 * wanted.abs().max()
    back = layer.quantized_tensor
    assert back.columns is not None and torch.equal(back.columns, order)
    assert torch.equal(back.codes, tensor.codes)


@pytest.mark.parametrize(
    ("name", "dtype", "word"),
    [
        ("w3a16_row", torch.bfloat16, "no kernel"),
        ("w8a16_g16_asym", torch.bfloat16, "zero points"),
        ("w4a16_g16", torch.bfloat16, "group size 16"),
        ("w4a16_g32", torch.float32, "float32"),
    ],
    ids=["bits", "zeros", "group", "dtype"],
)
def test_weights_without_a_kernel_say_why(name: str, dtype: torch.dtype, word: str) -> None:
    chosen = choose_kernel(make_tensor(name, (8, 64)), "auto", dtype)
    assert chosen.kernel.name == "reference"
    assert word in str(chosen.reason)


def test_loading_says_what_runs_on_the_reference_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_quantized(make_model("llama"), tmp_path / "out", "w3a16_g32_asym", "gptq_v2")
    load(tmp_path / "out")
    assert "13 weights run on the plain reference path" in caplog.text
    assert "w3a16_g32_asym" in caplog.text


@pytest.mark.parametrize(
    ("backend", "device", "word"),
    [
        ("fast", "cpu", "allowed: auto"),
        ("triton", "cpu", "CUDA"),
        ("cpu", "cuda", "on cuda"),
        ("cpu-int8", "cuda", "on cuda"),
    ],
)
def test_backends_that_cannot_run_are_refused(
    backend: str, device: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A device that is not there is refused first.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BackendError, match=word):
        check_backend(backend, device)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("model") / "out"
    write_quantized(make_model("llama"), out, "w4a16_g32", "compressed-tensors")
    return load(out)


def greedy(model: Any, **options: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        PROMPT, do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=0, **options
    )
    return tokens


def test_a_static_cache_gives_the_same_tokens(model: Any) -> None:
    # Eager: transformers compiles the step for static caches on accelerators only.
    assert torch.equal(greedy(model, cache_implementation="static"), greedy(model))


def test_generate_compiles_its_step_with_a_static_cache(model: Any) -> None:
    config = CompileConfig(backend="eager", fullgraph=True)
    # What transformers does on GPUs without being asked.
    config._compile_all_devices = True
    found = greedy(model, cache_implementation="static", compile_config=config)
    assert model._last_compile_config is config
    assert torch.equal(found, greedy(model))


@pytest.mark.parametrize(("scheme", "compiles"), [("w4a16_g32", True), ("w8a16_row", False)])
def test_models_whose_experts_run_one_by_one_are_not_compiled(
    scheme: str, compiles: bool, tmp_path: Path
) -> None:
    write_quantized(make_model("mixtral"), tmp_path / "out", scheme, "compressed-tensors")
    assert load(tmp_path / "out").hf_quantizer.is_compileable == compiles


def test_assisted_decoding_with_a_quantized_draft_gives_the_same_tokens(model: Any) -> None:
    assert torch.equal(greedy(model, assistant_model=model), greedy(model))


def test_a_compiled_model_gives_the_same_logits(model: Any) -> None:
    compiled = torch.compile(model, backend="eager", dynamic=True)
    with torch.no_grad():
        assert torch.equal(compiled(PROMPT).logits, model(PROMPT).logits)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for CPUs")
def test_reduced_overhead_gives_the_same_logits(tmp_path: Path) -> None:
    # One block and no cache: C++ takes seconds to compile.
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    write_quantized(plain, tmp_path / "out", "w4a16_g32", "compressed-tensors")
    loaded = load(tmp_path / "out", fuse=True)
    compiled = torch.compile(loaded, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        wanted = loaded(PROMPT, use_cache=False).logits
        for _ in range(2):
            found = compiled(PROMPT, use_cache=False).logits
            # What inductor fuses is not rounded to bfloat16 in between.
            assert (found - wanted).abs().max() <= 2**-6 * wanted.abs().max()


def test_continuous_batching_gives_every_request_its_tokens(model: Any) -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # By default the cache takes what memory there is, and every size of batch is warmed up.
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)
    found = model.generate_batch(prompts, config, small, warmup=False)
    assert sorted(len(result.generated_tokens) for result in found.values()) == [5, 5]
