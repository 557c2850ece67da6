"""Gradients of every op for x and bias, and what every op refuses as x."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inference.test_layers import make_tensor
from inference.test_load import make_model, write_quantized
from quantkit_kernels.ops import int8_dot, w4a16, w4a16_experts
from quantkit_kernels.ops.device import Device
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.errors import ShapeError
from quantkit.inference.backend import Backend
from quantkit.inference.kernels import PackedKernel, RoundedInputKernel, kernel_class
from quantkit.inference.layers import QuantLinear
from quantkit.inference.load import load

WEIGHT_ONLY = ["w4a16_g32", "w4a16_g64_asym", "w4a16_row", "w8a16_row", "w8a16_g32"]
WEIGHT_ONLY += ["fp8a16_row", "fp8a16_g32", "nf4_b64", "nf4_b64_dq", "mxfp4a16", "nvfp4a16"]
ROUNDED = ["w8a8_row", "fp8a8_row"]
INT8_DOT = ["w3a16_g32", "w4a16_g32_asym", "w8a16_row", "w8a8_row", "nf4_b64", "fp8a16_row"]
SHAPE = (70, 192)


def make_kernel(name: str, device: Device, *, dtype: torch.dtype = torch.bfloat16) -> PackedKernel:
    """A random weight in the layout of a device; that of GPUs multiplies in PyTorch on a CPU."""
    tensor = make_tensor(name, SHAPE, dtype=dtype)
    found = kernel_class(tensor)
    assert found is not None
    return found(tensor, device)


def arguments_of(
    kernel: PackedKernel, x: Tensor, bias: Tensor | None
) -> tuple[Any, tuple[Any, ...]]:
    """The op that a kernel calls, and the arguments it gives it."""
    with Calls() as calls:
        kernel(x, bias)
    return calls.seen[-1]


class Calls(TorchDispatchMode):
    """Keeps which of our ops are called, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "quantkit":
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


def names(calls: Calls) -> list[str]:
    return [func.__name__.removesuffix(".default") for func, _ in calls.seen]


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_gradients_are_the_slopes_of_the_op(name: str) -> None:
    kernel = make_kernel(name, "triton")
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, SHAPE[1], generator=draw, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(SHAPE[0], generator=draw, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernel, (x, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(kernel, (x, bias), fast_mode=True)


@pytest.mark.parametrize("device", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*WEIGHT_ONLY, *ROUNDED])
def test_gradients_are_those_of_the_decoded_weight(
    name: str, dtype: torch.dtype, device: Device
) -> None:
    check_gradients(make_kernel(name, device), name, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", INT8_DOT)
def test_rounded_activations_have_the_gradient_of_the_plain_product(
    name: str, dtype: torch.dtype
) -> None:
    if reason := int8_dot.unavailable():
        pytest.skip(reason)
    kernel = RoundedInputKernel(make_tensor(name, SHAPE, dtype=torch.bfloat16), "cpu")
    check_gradients(kernel, name, dtype)


def check_gradients(kernel: PackedKernel, name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, SHAPE[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(SHAPE[0])
    x.requires_grad_()
    bias.requires_grad_()
    out = kernel(x, bias)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(direction)
    weight = make_tensor(name, SHAPE, dtype=torch.bfloat16).dequantize(torch.float32).double()
    wanted = direction.double() @ weight
    assert x.grad is not None and x.grad.dtype == dtype
    # The weight is rounded to the dtype of x, or to 1/8191 of its largest, and so is the result.
    assert (x.grad - wanted).norm() <= 2**-7 * wanted.norm()
    assert bias.grad is not None and bias.grad.dtype == torch.float32
    assert torch.allclose(bias.grad, direction.float().sum((0, 1)), atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "cpu-int8", "reference"])
@pytest.mark.parametrize("name", ["w4a16_g32", "w8a8_row", "fp8a8_row"])
def test_nothing_is_tracked_unless_it_is_asked_for(name: str, backend: Backend) -> None:
    if backend == "cpu-int8" and (reason := int8_dot.unavailable()):
        pytest.skip(reason)
    layer = QuantLinear(make_tensor(name, SHAPE, dtype=torch.bfloat16), backend=backend)
    x = torch.randn(3, SHAPE[1]).bfloat16()
    with Calls() as calls:
        plain = layer(x)
    with torch.no_grad(), Calls() as without:
        assert torch.equal(layer(x.clone().requires_grad_()), plain)
    with Calls() as tracked:
        found = layer(x.clone().requires_grad_())
    assert not plain.requires_grad and found.requires_grad
    assert torch.equal(found, plain)
    if backend != "reference":
        assert all(one.endswith("_fixed") for one in names(calls) + names(without))
        assert [f"{one}_fixed" for one in names(tracked)] == names(calls)


@pytest.mark.parametrize("device", ["cpu", "triton"])
@pytest.mark.parametrize("name", ["w4a16_g64_asym", "w8a16_row", "nf4_b64_dq", *ROUNDED])
def test_ops_are_well_formed_when_a_gradient_is_asked_for(name: str, device: Device) -> None:
    kernel = make_kernel(name, device)
    x, bias = torch.randn(3, SHAPE[1]).bfloat16(), torch.randn(SHAPE[0])
    op, arguments = arguments_of(kernel, x, bias)
    tracked = getattr(torch.ops.quantkit, op.__name__.removesuffix("_fixed.default")).default
    torch.library.opcheck(op, arguments)
    arguments = tuple(
        one.clone().requires_grad_() if one is x or one is bias else one for one in arguments
    )
    torch.library.opcheck(tracked, arguments)


def test_int8_dot_is_well_formed_when_a_gradient_is_asked_for() -> None:
    if reason := int8_dot.unavailable():
        pytest.skip(reason)
    kernel = RoundedInputKernel(make_tensor("nf4_b64", SHAPE), "cpu")
    x = torch.randn(3, SHAPE[1], requires_grad=True)
    _, arguments = arguments_of(kernel, x, torch.randn(SHAPE[0]))
    torch.library.opcheck(torch.ops.quantkit.int8_dot.default, arguments)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["w4a16_g32", "nf4_b64_dq", "w8a8_row"])
def test_a_compiled_layer_has_the_same_gradients(name: str) -> None:
    layer = QuantLinear(make_tensor(name, SHAPE, dtype=torch.bfloat16), backend="auto")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (1, 3):
        x = torch.randn(rows, SHAPE[1]).bfloat16()
        gradients = []
        for run in (layer, compiled):
            leaf = x.clone().requires_grad_()
            run(leaf).float().square().sum().backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)


@pytest.mark.parametrize("device", ["cpu", "triton"])
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
def test_experts_have_the_gradient_of_a_loop(asym: bool, device: Device) -> None:
    name = "w4a16_g32_asym" if asym else "w4a16_g32"
    tensors = [make_tensor(name, (24, 64), seed=seed) for seed in range(3)]
    packed = w4a16_experts.stack(
        w4a16.pack(one.codes, one.scale.values(), one.zero, 32, device) for one in tensors
    )
    # A token meets expert 0 twice, expert 1 has none, the last row belongs to no expert.
    source = torch.tensor([0, 1, 0, 3, 2, 1])
    offsets = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    x = torch.randn(4, 64, dtype=torch.float64 if device == "triton" else torch.float32)
    x.requires_grad_()
    rest = (packed.packed, packed.scale, packed.zero, 32, 24)
    out = torch.ops.quantkit.w4a16_experts(x, source, offsets, *rest)
    direction = torch.randn(6, 24, dtype=x.dtype)
    out.backward(direction)
    wanted = torch.zeros(4, 64, dtype=torch.float64)
    for row, expert in enumerate([0, 0, 0, 2, 2]):
        weight = tensors[expert].dequantize(torch.float32).double()
        wanted[source[row]] += direction[row].double() @ weight
    assert x.grad is not None
    # aten keeps (8 - zero) · scale in bfloat16.
    rounding = 2**-7 if device == "cpu" and asym else 2**-20
    assert (x.grad - wanted).norm() <= rounding * wanted.norm()
    if device == "triton":
        run = torch.ops.quantkit.w4a16_experts
        both = (source, offsets, *rest)
        torch.library.opcheck(run.default, (x, *both))
        assert torch.autograd.gradcheck(lambda x: run(x, *both), (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda x: run(x, *both), (x,), fast_mode=True)


def decode_(model: nn.Module) -> None:
    """Puts nn.Linear on the numbers that quantized layers stand for where those are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantLinear):
                weight = child.quantized_tensor.dequantize(child.activation_dtype)
                plain = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
                plain.weight = nn.Parameter(weight, requires_grad=False)
                plain.bias = child.bias
                setattr(parent, name, plain)


def embeds_gradient(model: Any, dtype: torch.dtype) -> Tensor:
    """The gradient of a loss for the hidden states that enter a model."""
    embeds = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    embeds.requires_grad_()
    labels = torch.arange(24).view(2, 12)
    model(inputs_embeds=embeds, labels=labels).loss.backward()
    assert embeds.grad is not None
    return embeds.grad.double()


MODELS = [
    ("llama", "w4a16_g32", "compressed-tensors"),
    ("llama", "w4a16_g32_asym", "gptq_v2"),
    ("llama", "w3a16_g32_asym", "gptq_v2"),
    ("llama", "w8a16_row", "compressed-tensors"),
    ("llama", "w8a8_row", "compressed-tensors"),
    ("llama", "fp8a16_row", "compressed-tensors"),
    ("llama", "fp8a8_row", "compressed-tensors"),
    ("llama", "nf4_b64_dq", "bitsandbytes"),
    ("mixtral", "w4a16_g32", "compressed-tensors"),
]


@pytest.mark.parametrize(
    ("family", "scheme", "fmt"), MODELS, ids=[f"{a}-{b}" for a, b, _ in MODELS]
)
def test_models_have_the_gradients_of_their_decoded_weights(
    family: str, scheme: str, fmt: str, tmp_path: Path
) -> None:
    write_quantized(make_model(family), tmp_path / "out", scheme, fmt)
    decoded = load(tmp_path / "out", backend="reference", dtype=torch.float32)
    decode_(decoded)
    wanted = embeds_gradient(decoded, torch.float32)
    cases = [("auto", torch.bfloat16), ("reference", torch.bfloat16), ("reference", torch.float32)]
    if int8_dot.unavailable() is None:
        cases += [("cpu-int8", torch.bfloat16), ("cpu-int8", torch.float32)]
    for backend, dtype in cases:
        for fuse in (False, True):
            model = load(tmp_path / "out", backend=backend, dtype=dtype, fuse=fuse)
            found = embeds_gradient(model, dtype)
            assert (found - wanted).norm() <= 0.05 * wanted.norm(), (backend, dtype, fuse)


@pytest.mark.parametrize("device", ["cpu", "triton"])
@pytest.mark.parametrize("name", [*WEIGHT_ONLY, *ROUNDED])
def test_other_inputs_are_refused_by_every_op(name: str, device: Device) -> None:
    kernel = make_kernel(name, device)
    for columns in (64, 128, 191, 193, 256):
        with pytest.raises(ShapeError, match=f"x has {columns} columns, the weight 192"):
            kernel(torch.randn(2, columns).bfloat16(), None)
    op, (x, *rest) = arguments_of(kernel, torch.randn(2, SHAPE[1]).bfloat16(), None)
    for columns in (64, 128, 320):
        with pytest.raises(ValueError, match=f"x has {columns} columns, the weight"):
            op(torch.randn(2, columns).bfloat16(), *rest)
    with pytest.raises(ValueError, match="x is on meta, the weight on cpu"):
        op(x.to("meta"), *rest)
    with pytest.raises(ValueError, match=r"x is torch.int8; allowed: bfloat16"):
        op(x.to(torch.int8), *rest)
    with pytest.raises(ValueError, match="x has 0 columns"):
        op(torch.tensor(1.0), *rest)


def test_other_inputs_are_refused_for_experts() -> None:
    tensor = make_tensor("w4a16_g32", (24, 64))
    packed = w4a16.pack(tensor.codes, tensor.scale.values(), None, 32, "cpu")
    both = w4a16_experts.stack([packed, packed])
    source, offsets = torch.tensor([0, 1]), torch.tensor([0, 1, 2], dtype=torch.int32)
    rest = (both.packed, both.scale, both.zero, 32, 24)
    op = torch.ops.quantkit.w4a16_experts
    for wrong, word in (
        ((torch.randn(2, 96), source, offsets), "x has 96 columns, the weight 33 to 64"),
        ((torch.randn(2, 1, 64), source, offsets), "two dimensions"),
        ((torch.randn(2, 64), source.to("meta"), offsets), "source on meta"),
    ):
        with pytest.raises(ValueError, match=word):
            op(*wrong, *rest)
