"""Scale groups: which ones are found per model type, and that folding them changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models as tiny
import torch

from quantkit.errors import NumericsError, ShapeError
from quantkit.formats.open import open_source
from quantkit.model.causal import CausalModel, ScaleGroup

pytestmark = pytest.mark.usefixtures("one_thread")

# Producer -> its readers' inputs, in block 0; names are module paths.
NORMS = {
    "input_layernorm": ["self_attn.q_proj"],
    "post_attention_layernorm": ["mlp.gate_proj"],
}
VALUE_UP = {"self_attn.v_proj": ["self_attn.o_proj"], "mlp.up_proj": ["mlp.down_proj"]}
LLAMA = {**NORMS, **VALUE_UP}
GEMMA = {
    "input_layernorm": ["self_attn.q_proj"],
    "pre_feedforward_layernorm": ["mlp.gate_proj"],
    **VALUE_UP,
}
NEOX = {
    "input_layernorm": ["attention.query_key_value"],
    "post_attention_layernorm": ["mlp.dense_h_to_4h"],
    "attention.query_key_value": ["attention.dense"],
}
FALCON_VALUE = {"self_attention.query_key_value": ["self_attention.dense"]}
MOE = {
    "input_layernorm": ["self_attn.q_proj"],
    "post_attention_layernorm": ["mlp.gate", *(f"mlp.experts.{e}:in" for e in range(4))],
    "self_attn.v_proj": ["self_attn.o_proj"],
    **{f"mlp.experts.gate_up_proj.{e}": [f"mlp.experts.{e}:mid"] for e in range(4)},
}
OPT_ROWS = {"self_attn.v_proj": ["self_attn.out_proj"], "fc1": ["fc2"]}
EXPECTED: dict[str, dict[str, list[str]]] = {
    "llama": LLAMA,
    "llama_bias": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": {
        "input_layernorm": ["self_attn.qkv_proj"],
        "post_attention_layernorm": ["mlp.gate_up_proj"],
        "self_attn.qkv_proj": ["self_attn.o_proj"],
        "mlp.gate_up_proj": ["mlp.down_proj"],
    },
    "gpt2": {"ln_1": ["attn.c_attn"], "ln_2": ["mlp.c_fc"], "attn.c_attn": ["attn.c_proj"]},
    "opt": {
        "self_attn_layer_norm": ["self_attn.q_proj"],
        "final_layer_norm": ["fc1"],
        **OPT_ROWS,
    },
    "opt_post_norm": OPT_ROWS,
    "gpt_neo": {
        "ln_1": ["attn.attention.q_proj"],
        "ln_2": ["mlp.c_fc"],
        "attn.attention.v_proj": ["attn.attention.out_proj"],
    },
    "gpt_neox": NEOX,
    "neox_serial": NEOX,
    # Attention and mlp read one norm.
    "falcon": {"input_layernorm": ["self_attention.query_key_value"], **FALCON_VALUE},
    "falcon_grouped": {
        "ln_attn": ["self_attention.query_key_value"],
        "ln_mlp": ["mlp.dense_h_to_4h"],
        **FALCON_VALUE,
    },
    "falcon_alibi": {
        "input_layernorm": ["self_attention.query_key_value"],
        "post_attention_layernorm": ["mlp.dense_h_to_4h"],
        **FALCON_VALUE,
    },
    "bloom": {
        "input_layernorm": ["self_attention.query_key_value"],
        "post_attention_layernorm": ["mlp.dense_h_to_4h"],
        **FALCON_VALUE,
    },
    "cohere2": {"input_layernorm": ["self_attn.q_proj"], **VALUE_UP},
    # Norms come after attention and mlp: nothing to fold into.
    "olmo2": VALUE_UP,
    "mixtral": MOE,
    "qwen3_moe": MOE,
    "qwen3_moe_dense_first": LLAMA,
}


def test_every_type_has_its_expectation() -> None:
    assert set(EXPECTED) == {*tiny.CONFIGS, *tiny.VARIANTS}


def producer(group: ScaleGroup) -> str:
    name = group.producer.removesuffix(".weight")
    return name if group.expert is None else f"{name}.{group.expert}"


@pytest.mark.parametrize("model_type", [*tiny.CONFIGS, *tiny.VARIANTS])
def test_expected_groups_are_found_and_fold_without_effect(model_type: str, tmp_path: Path) -> None:
    source = open_source(tiny.build(model_type, tmp_path))
    model = CausalModel.open(source)
    groups = model.scale_groups(0)
    assert {producer(group): list(group.inputs) for group in groups} == EXPECTED[model_type]
    ids = torch.arange(3, 35).reshape(2, 16)
    hidden, calls = model.calls(ids)
    generator = torch.Generator().manual_seed(0)
    for index in range(model.num_blocks):
        block = model.load_block(index)
        before = model.run(block, hidden, calls[index])
        for group in model.scale_groups(index):
            reading = {ref.name for ref in model.weights(index) if ref.input in group.inputs}
            assert {ref.name for ref in group.readers} == reading
            scale_C = torch.rand(group.num_channels, generator=generator) * 2 + 0.5
            folded = model.fold_(block, group, scale_C)
            changed = {
                name
                for name in model.block_tensors(index)
                if not torch.equal(model.tensor(block, index, name), source.read(name))
            }
            assert set(folded.names) <= changed
            after = model.run(block, hidden, calls[index])
            # Float32 rounding of scaled and unscaled products.
            torch.testing.assert_close(after, before, rtol=1e-4, atol=2e-5)
        hidden = before


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_fold_in_bfloat16_is_as_exact_as_rounding_readers(
    model_type: str, tmp_path: Path
) -> None:
    model = CausalModel.open(open_source(tiny.build(model_type, tmp_path, dtype=torch.bfloat16)))
    hidden, calls = model.calls(torch.arange(3, 35).reshape(2, 16))
    block = model.load_block(0).float()
    before = model.run(block, hidden.float(), calls[0])
    stored = model.load_block(0)
    group = model.scale_groups(0)[0]
    assert group.kind == "norm"
    scale_C = torch.linspace(0.3, 3.0, group.num_channels)
    folded = model.fold_(stored, group, scale_C)
    # A stored norm differs from what was asked for by its rounding alone: 2^-8 relative, and for
    # gemma of 1 + w with |w| < 1 by twice that.
    torch.testing.assert_close(folded.scale_I, group.expand(scale_C), rtol=2**-6, atol=0)
    after = model.run(stored.float(), hidden.float(), calls[0])
    error = (after - before).norm() / before.norm()
    # Each of q, k, v is rounded to 8 bits once: 2^-9 relative each, far from a wrong norm's error.
    assert float(error) < 2**-8


def test_folded_inputs_are_divided_by_the_returned_scale(tmp_path: Path) -> None:
    model = CausalModel.open(open_source(tiny.build("llama", tmp_path)))
    hidden, calls = model.calls(torch.arange(3, 35).reshape(2, 16))
    block = model.load_block(0)
    for group in model.scale_groups(0):
        before: dict[str, torch.Tensor] = {}
        after: dict[str, torch.Tensor] = {}
        with model.tap(0, block, None, lambda key, x, to=before: to.update({key: x.clone()})):
            model.run(block, hidden, calls[0])
        folded = model.fold_(block, group, torch.linspace(0.5, 2.0, group.num_channels))
        with model.tap(0, block, None, lambda key, x, to=after: to.update({key: x.clone()})):
            model.run(block, hidden, calls[0])
        for key in before:
            scale = folded.scale_I if key in group.inputs else torch.ones(1)
            # Float32 rounding.
            torch.testing.assert_close(after[key] * scale, before[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "lfm2"])
def test_shared_experts_and_convolutions_do_not_hide_groups(
    model_type: str, tmp_path: Path
) -> None:
    model = CausalModel.open(open_source(tiny.build(model_type, tmp_path)))
    found = {producer(group): group for group in model.scale_groups(0)}
    if model_type == "qwen2_moe":
        readers = {ref.parameter for ref in found["post_attention_layernorm"].readers}
        assert {"mlp.gate.weight", "mlp.shared_expert_gate.weight"} < readers
    else:
        assert set(found) == {"operator_norm", "ffn_norm", "feed_forward.w3"}
    hidden, calls = model.calls(torch.arange(3, 35).reshape(2, 16))
    block = model.load_block(0)
    before = model.run(block, hidden, calls[0])
    for group in found.values():
        model.fold_(block, group, torch.linspace(0.5, 2.0, group.num_channels))
    # Float32 rounding of scaled and unscaled products.
    torch.testing.assert_close(model.run(block, hidden, calls[0]), before, rtol=1e-4, atol=2e-5)


def test_heads_that_share_values_share_scales(tmp_path: Path) -> None:
    model = CausalModel.open(open_source(tiny.build("llama", tmp_path)))
    group = next(g for g in model.scale_groups(0) if producer(g) == "self_attn.v_proj")
    head = tiny.HIDDEN // 4
    first = torch.arange(head)
    expected = torch.cat([first, first, first + head, first + head])
    assert torch.equal(group.channel_map, expected)
    scale_I = torch.ones(tiny.HIDDEN)
    scale_I[0], scale_I[head] = 4.0, 9.0  # both read channel 0
    scale_C = group.pool(scale_I)
    assert float(scale_C[0]) == pytest.approx(6.0)
    assert torch.equal(group.expand(scale_C)[[0, head]], scale_C[[0, 0]])


def test_value_rows_are_found_in_interleaved_projections(tmp_path: Path) -> None:
    model = CausalModel.open(open_source(tiny.build("gpt_neox", tmp_path)))
    group = next(g for g in model.scale_groups(0) if g.kind == "rows")
    head = tiny.HIDDEN // 4
    rows = torch.arange(3 * tiny.HIDDEN).reshape(4, 3, head)[:, 2].flatten()
    assert torch.equal(group.rows[group.channel_map], rows)


def test_a_zero_norm_weight_keeps_its_channel(tmp_path: Path) -> None:
    model = CausalModel.open(open_source(tiny.build("llama", tmp_path)))
    block = model.load_block(0)
    group = model.scale_groups(0)[0]
    block.get_parameter(group.producer)[5] = 0.0
    folded = model.fold_(block, group, torch.full((group.num_channels,), 2.0))
    assert float(folded.scale_I[5]) == 1.0
    assert float(folded.scale_I[6]) == 2.0


def test_scales_that_cannot_be_folded_are_refused(tmp_path: Path) -> None:
    model = CausalModel.open(open_source(tiny.build("llama", tmp_path)))
    group = model.scale_groups(0)[0]
    with pytest.raises(ShapeError):
        model.fold_(model.load_block(0), group, torch.ones(3))
    with pytest.raises(NumericsError):
        model.fold_(model.load_block(0), group, torch.zeros(group.num_channels))
