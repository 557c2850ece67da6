"""Files of GGUF in memory: blocks stay blocks, on every backend, and decode to their own values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_gguf as files
import tiny_jobs as jobs
import torch
from formats.gguf.test_blocks import random_blocks
from inference.test_layers import same
from quantkit_kernels.ops import int8_dot
from torch import Tensor

import quantkit
from quantkit.demo.files import demo_path
from quantkit.errors import FormatError
from quantkit.formats.gguf.container import MODEL_FILE
from quantkit.formats.open import open_source
from quantkit.inference.layers import QuantLinear
from quantkit.model.decoded import open_decoded
from quantkit.numbers.scheme import BLOCKS, Scheme
from quantkit.numbers.superblock import BLOCK_TYPES, BlockScale
from quantkit.numbers.tensor import QuantizedTensor

SHAPE = (70, 768)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with jobs.one_thread():
        yield


def weight_of(name: str) -> tuple[QuantizedTensor, Tensor]:
    """A weight of random blocks, and its values, which test_blocks compares with the owner's."""
    kind = BLOCK_TYPES[name.upper()]
    blocks = random_blocks(kind, SHAPE[0] * SHAPE[1] // kind.size, 5)
    tensor = QuantizedTensor(
        codes=blocks.codes.reshape(SHAPE),
        scale=BlockScale.of(blocks, SHAPE[0]),
        zero=None,
        scheme=Scheme.parse(name),
        dtype=torch.float16,
    )
    return tensor, blocks.values().reshape(SHAPE)


@pytest.mark.parametrize("backend", ["reference", "auto", "cpu-int8"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_layer_multiplies_by_the_values_of_its_blocks(name: str, backend: str) -> None:
    if backend == "cpu-int8" and (reason := int8_dot.unavailable()):
        pytest.skip(reason)
    tensor, values = weight_of(name)
    bias = torch.randn(SHAPE[0])
    for dtype, limit in ((torch.float32, 2**-18), (torch.bfloat16, 2**-7)):
        layer = QuantLinear(tensor, bias, backend=backend, dtype=dtype)
        assert same(layer.quantized_tensor, tensor)
        x = torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        wanted = torch.nn.functional.linear(x.double(), values.double(), bias.double())
        error = (layer(x).double() - wanted).norm() / wanted.norm()
        # Activations in 127 steps of a block's largest cost .7 %.
        assert error < (2**-6 if backend == "cpu-int8" else limit), (dtype, float(error))


@pytest.mark.parametrize("name", ["q4_k", "q6_k"])
def test_blocks_have_the_gradient_of_their_product(name: str) -> None:
    tensor, values = weight_of(name)
    for backend in ("reference", *(() if int8_dot.unavailable() else ("cpu-int8",))):
        layer = QuantLinear(tensor, None, backend=backend, dtype=torch.float32)
        x = torch.randn(2, SHAPE[1]).requires_grad_()
        layer(x).sum().backward()
        assert x.grad is not None
        assert torch.allclose(x.grad[0], values.sum(0), rtol=1e-4, atol=1e-4 * values.abs().max())


@pytest.mark.parametrize("scheme", ["q4_0", "q4_k_m"])
def test_a_loaded_file_keeps_its_blocks(tmp_path: Path, scheme: str) -> None:
    out = files.quantize(demo_path(), tmp_path / "out", scheme)
    model = quantkit.load(out / MODEL_FILE, dtype=torch.float32, backend="reference")
    layers = [part for part in model.modules() if isinstance(part, QuantLinear)]
    assert len(layers) == 28 and {layer.scheme.kind for layer in layers} == {"ggml"}
    decoded = open_decoded(open_source(out / MODEL_FILE))
    # The table of embeddings lies in blocks too, and the head is it.
    table = model.get_input_embeddings().weight
    assert torch.equal(table, decoded.read("model.embed_tokens.weight"))
    assert model.get_output_embeddings().weight is table
    plain = jobs.logits(quantkit.load(demo_path(), dtype=torch.float32))
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            value = decoded.read(f"{name}.weight")
            assert torch.equal(layer.quantized_tensor.dequantize(torch.float32), value)
    assert (jobs.logits(model) - plain).abs().mean() < plain.abs().mean()
    with pytest.raises(FormatError, match=r"gguf: `quantkit quantize` makes its files"):
        model.save_pretrained(tmp_path / "saved")
