"""Backend cpu-int8: layers and models whose activations are rounded to int8."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inference.test_layers import make_tensor, same
from inference.test_load import make_model, write_quantized
from quantkit_kernels.ops import int8_dot

from quantkit.errors import BackendError, ModelError, ShapeError
from quantkit.inference.backend import check_backend
from quantkit.inference.generate import decoding_options, generate_text
from quantkit.inference.layers import QuantLinear
from quantkit.inference.load import load

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def available() -> None:
    if reason := int8_dot.unavailable():
        pytest.skip(reason)


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize(
    "name",
    [
        "w3a16_g32",
        "w4a16_row_asym",
        "w8a16_row",
        "w8a16_g32_asym",
        "w5a16_g16_asym",
        "nvfp4a16",
        "w8a8_row",
        "w4a8_g32",
        "w4afp8_g32",
        "fp8a16_row",
        "fp8a8_row",
        "nf4_b64_dq",
        "fp4_b64",
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rounded_activations_cost_little(name: str, dtype: torch.dtype) -> None:
    tensor = make_tensor(name, (70, 192), dtype=torch.bfloat16)
    if tensor.scheme.kind == "int":
        order = torch.randperm(192, generator=torch.Generator().manual_seed(0))
        tensor = dataclasses.replace(tensor, columns=order)
    bias = torch.randn(70)
    fast = QuantLinear(tensor, bias, backend="cpu-int8", dtype=dtype)
    assert fast.fallback is None and fast.kernel.name == "cpu RoundedInputKernel"
    assert same(fast.quantized_tensor, tensor)
    x = torch.randn(3, 192).to(dtype)
    wanted = torch.nn.functional.linear(x.float(), tensor.dequantize(torch.float32), bias)
    assert (fast(x) - wanted).abs().max() <= 2**-6 * wanted.abs().max()
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x), fast(x))
    torch._dynamo.reset()


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize("name", ["w4a16_g32", "nf4_b64"])
def test_gradients_are_those_of_the_plain_product(name: str) -> None:
    tensor = make_tensor(name, (70, 192), dtype=torch.bfloat16)
    gradients, direction = [], torch.randn(3, 70)
    for backend in ("reference", "cpu-int8"):
        layer = QuantLinear(tensor, torch.randn(70), backend=backend, dtype=torch.float32)
        x = torch.randn(3, 192, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (layer(x) * direction).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
        with torch.no_grad():
            found = layer(x)
        assert torch.allclose(layer(x), found, atol=1e-5)
    # A codebook's values are rounded to 2^-13 of the largest.
    assert torch.allclose(gradients[0], gradients[1], atol=2**-10 * gradients[0].abs().max())


@pytest.mark.usefixtures("available")
def test_another_number_of_columns_is_refused() -> None:
    layer = QuantLinear(make_tensor("w4a16_row", (70, 333)), backend="cpu-int8")
    for columns in (330, 340, 352):
        with pytest.raises(ShapeError, match=f"x has {columns} columns, the weight 333"):
            layer(torch.randn(2, columns))


@pytest.mark.usefixtures("available")
def test_a_layer_runs_in_a_process_that_only_unpickles_it(tmp_path: Path) -> None:
    layer = QuantLinear(make_tensor("w4a16_g32", (70, 192)), backend="cpu-int8")
    x = torch.randn(3, 192)
    torch.save((layer, x, layer(x)), tmp_path / "layer.pt")
    code = "import sys, torch; layer, x, y = torch.load(sys.argv[1], weights_only=False)\n"
    code += "assert torch.equal(layer(x), y)"
    folders = os.pathsep.join(str(ROOT / name) for name in (".", "kernels"))
    environment = {**os.environ, "PYTHONPATH": folders}
    command = [sys.executable, "-c", code, str(tmp_path / "layer.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_model_decodes_as_with_float_activations(family: str, tmp_path: Path) -> None:
    write_quantized(make_model(family), tmp_path / "out", "w4a16_g32", "compressed-tensors")
    fast = load(tmp_path / "out", backend="cpu-int8", fuse=True, dtype=torch.float32)
    plain = load(tmp_path / "out", backend="reference", dtype=torch.float32)
    ids = torch.arange(3, 3 + 24).view(1, 24)
    with torch.no_grad():
        wanted, found = (model(ids).logits.log_softmax(-1) for model in (plain, fast))
    divergence = (wanted.exp() * (wanted - found)).sum(-1)
    assert 0 < divergence.mean() < 1e-4


@pytest.mark.usefixtures("available")
def test_weights_that_rounding_does_not_suit_say_what_they_run_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_quantized(make_model("llama"), tmp_path / "out", "w8a16_g8", "compressed-tensors")
    load(tmp_path / "out", backend="cpu-int8")
    assert "run on cpu Int8Kernel instead of cpu-int8, w8a16_g8: group size 8" in caplog.text
    assert "decoded whole" not in caplog.text


@pytest.mark.parametrize("scheme", ["fp8a16_row", "w8a16_g32", "w3a16_g32_asym", "w4a16_g32"])
def test_loading_names_the_backend_that_is_faster(
    scheme: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fmt = "gptq_v2" if scheme.startswith("w3") else "compressed-tensors"
    write_quantized(make_model("llama"), tmp_path / "out", scheme, fmt)
    load(tmp_path / "out")
    said = "13 weights are decoded whole for every token, which is slow; backend cpu-int8"
    assert (said in caplog.text) == (int8_dot.processor_suits() and scheme != "w4a16_g32")
    caplog.clear()
    for chosen in ("cpu", "reference"):
        load(tmp_path / "out", backend=chosen)
    assert "decoded whole" not in caplog.text


def test_a_machine_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_dot, "unavailable", lambda: "no C++ compiler")
    with pytest.raises(BackendError, match=r"cpu-int8: no C\+\+ compiler; use auto"):
        check_backend("cpu-int8", "cpu")


def test_a_compiled_step_decodes_the_same_tokens(tmp_path: Path) -> None:
    write_quantized(make_model("llama"), tmp_path / "out", "w4a16_g32", "compressed-tensors")
    model = load(tmp_path / "out")
    ids = torch.arange(3, 3 + 10).view(1, 10)
    plain = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
    options = decoding_options(compiled=True)
    # Dynamo's own backend takes no options.
    options["compile_config"].backend, options["compile_config"].options = "eager", None
    found = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0, **options)
    assert model._last_compile_config is options["compile_config"]
    assert torch.equal(found, plain)
    assert decoding_options(compiled=False) == {}


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="dtype 'int4' is unknown; allowed: float32, bfloat16"):
        generate_text(tmp_path, "a", 1, dtype="int4")
