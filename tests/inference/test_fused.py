"""Fused projections: the same results and the same checkpoint as separate ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from inference.test_layers import make_tensor, same
from inference.test_load import make_model, tensors_of, write_quantized
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config
from typer.testing import CliRunner

import quantkit
from quantkit.cli.app import app
from quantkit.inference.fused import FusedLinear, SharedProduct, fuse_
from quantkit.inference.layers import QuantLinear
from quantkit.inference.load import load

IDS = torch.arange(3, 13).view(1, 10)
SCHEMES = ["w4a16_g32", "w4a16_g32_asym", "w8a16_row", "w8a8_row", "nf4_b64", "fp8a16_row"]


class Attention(nn.Module):
    """Three projections of one input."""

    def __init__(self, names: tuple[str, str, str], *, bias: bool) -> None:
        super().__init__()
        for number, (leaf, name) in enumerate(zip(("q", "k", "v"), names, strict=True)):
            shape = (96 if leaf == "q" else 40, 128)
            tensor = make_tensor(name, shape, seed=number, dtype=torch.bfloat16)
            own = torch.randn(shape[0]) if bias else None
            setattr(self, f"{leaf}_proj", QuantLinear(tensor, own, backend="auto"))

    def forward(self, x: Tensor) -> Tensor:
        """All products side by side."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", SCHEMES)
def test_fused_layers_give_the_same_bits_and_their_tensors_back(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    layer = Attention((name,) * 3, bias=bias)
    fused = copy.deepcopy(layer)
    assert fuse_(fused) == 1
    assert isinstance(fused.k_proj, FusedLinear)
    for tokens in (1, 5, 70):
        x = torch.randn(2, tokens, 128).bfloat16()
        assert torch.equal(fused(x), layer(x))
    for leaf in ("q_proj", "k_proj", "v_proj"):
        new, old = getattr(fused, leaf), getattr(layer, leaf)
        assert same(new.quantized_tensor, old.quantized_tensor)
        assert (new.bias is None) == (old.bias is None)
        assert new.bias is None or torch.equal(new.bias, old.bias)
        assert (new.out_features, new.in_features) == (old.out_features, old.in_features)


def test_the_product_is_computed_once_for_each_input() -> None:
    layer = Attention(("w4a16_g32",) * 3, bias=False)
    fuse_(layer)
    shared: SharedProduct = layer.q_proj.shared
    counted = []
    shared.stacked.register_forward_hook(lambda *_: counted.append(1))
    x = torch.randn(1, 3, 128).bfloat16()
    layer(x)
    assert len(counted) == 1
    # Nothing is kept once all parts are taken, and each part is handed out once.
    assert shared._pending is None
    first = layer.q_proj(x)
    x.mul_(2)
    assert not torch.equal(layer.q_proj(x), first)
    assert len(counted) == 3
    other = torch.randn(1, 3, 128).bfloat16()
    assert layer.k_proj(other).shape == (1, 3, 40)
    assert len(counted) == 4
    assert copy.deepcopy(layer).q_proj.shared._pending is None


def test_parts_are_views_that_attention_can_cut_into_heads() -> None:
    separate = Attention(("w4a16_g32",) * 3, bias=False)
    fused = copy.deepcopy(separate)
    fuse_(fused)
    x = torch.randn(2, 5, 128).bfloat16()
    names = ("q_proj", "k_proj", "v_proj")
    parts = [getattr(fused, name)(x) for name in names]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    for part, name in zip(parts, names, strict=True):
        assert part.stride() == (5 * 176, 176, 1) and torch.equal(part, getattr(separate, name)(x))
        # Without a copy, and without an error.
        heads = part.view(2, 5, -1, 8).transpose(1, 2)
        assert heads.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()


def test_what_differs_stays_apart() -> None:
    assert fuse_(Attention(("w4a16_g32", "w4a16_g32", "w8a16_row"), bias=False)) == 0
    # The scales of each part have an offset of their own.
    assert fuse_(Attention(("nf4_b64_dq",) * 3, bias=False)) == 0
    some = Attention(("w4a16_g32",) * 3, bias=False)
    some.k_proj.bias = nn.Parameter(torch.zeros(40), requires_grad=False)
    assert fuse_(some) == 0


def test_activation_orders_must_be_one() -> None:
    import dataclasses

    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    for same_order in (True, False):
        layer = Attention(("w4a16_g32",) * 3, bias=False)
        for leaf in ("q_proj", "k_proj", "v_proj"):
            own = order if same_order or leaf == "q_proj" else order.flip(0)
            tensor = dataclasses.replace(getattr(layer, leaf).quantized_tensor, columns=own)
            setattr(layer, leaf, QuantLinear(tensor, backend="auto"))
        x = torch.randn(3, 128).bfloat16()
        wanted = layer(x)
        assert fuse_(layer) == int(same_order)
        assert torch.equal(layer(x), wanted)


def test_fused_layers_compile_whole() -> None:
    layer = Attention(("w4a16_g32",) * 3, bias=True)
    fuse_(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(2, 3, 128).bfloat16()
        assert torch.equal(compiled(x), layer(x))
    torch._dynamo.reset()


def make_qwen2() -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
def test_a_fused_model_gives_the_same_logits_and_saves_the_same_tensors(
    kind: str, tmp_path: Path
) -> None:
    model = make_qwen2() if kind == "qwen2" else make_model(kind)
    write_quantized(model, tmp_path / "out", "w4a16_g32_asym", "compressed-tensors")
    plain = load(tmp_path / "out")
    fused = load(tmp_path / "out", fuse=True)
    through = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", config=quantkit.hf_config(tmp_path / "out", fuse=True)
    )
    shared = [module for module in fused.modules() if isinstance(module, SharedProduct)]
    # Mixtral's gate and up are in its experts.
    assert len(shared) == (2 if kind == "mixtral" else 4)
    with torch.no_grad():
        wanted = plain(IDS).logits
        assert torch.equal(fused(IDS).logits, wanted)
        assert torch.equal(through(IDS).logits, wanted)
    for number, loaded in enumerate((fused, through)):
        loaded.save_pretrained(tmp_path / str(number))
        saved, wanted_tensors = tensors_of(tmp_path / str(number)), tensors_of(tmp_path / "out")
        assert saved.keys() == wanted_tensors.keys()
        assert all(torch.equal(saved[name], wanted_tensors[name]) for name in saved)


def test_generate_takes_fuse(tmp_path: Path) -> None:
    from quantkit.demo.files import demo_path

    found = CliRunner().invoke(
        app,
        [
            *("generate", str(demo_path()), "--prompt", "def f", "--max-new-tokens", "4"),
            *("--fuse", "--device", "cpu"),
        ],
    )
    assert found.exit_code == 0, found.output
    assert found.output.startswith("def f")
