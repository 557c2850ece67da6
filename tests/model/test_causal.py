"""Streaming a causal LM block by block, for every model type, against transformers' own forward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from quantkit.checkpoint.files import FileSource
from quantkit.errors import CheckpointError, ModelError, NumericsError
from quantkit.formats.open import open_source
from quantkit.model.causal import CausalModel

pytestmark = pytest.mark.usefixtures("one_thread")

TYPES = [*tiny.CONFIGS, *tiny.VARIANTS]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", params=TYPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(request.param, tmp_path_factory.mktemp(request.param))


def batch(tokens: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences of ids, the second one padded at its end."""
    ids = torch.randint(3, 250, (2, tokens), generator=torch.Generator().manual_seed(7))
    mask = torch.ones(2, tokens, dtype=torch.int64)
    ids[1, 11:], mask[1, 11:] = 0, 0
    return ids, mask


def streamed_logits(
    model: CausalModel, ids: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    hidden, calls = model.calls(ids, mask)
    for index, call in enumerate(calls):
        hidden = model.run(model.load_block(index), hidden, call)
    return model.logits(hidden)


def test_blocks_give_the_logits_of_transformers(checkpoint: Path) -> None:
    model = CausalModel.open(open_source(checkpoint))
    model.check_replay()
    reference = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids, mask = batch()
    for given in (None, mask):
        with torch.no_grad():
            expected = reference(ids, attention_mask=given).logits
        found = streamed_logits(model, ids, given)
        valid = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
        # Float32 and the same operations; only the experts' sums may be in another order.
        torch.testing.assert_close(found[valid], expected[valid], rtol=1e-5, atol=1e-5)


def test_every_tensor_belongs_somewhere_and_every_linear_is_a_weight(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    model = CausalModel.open(source)
    inside = [name for index in range(model.num_blocks) for name in model.block_tensors(index)]
    assert sorted([*inside, *model.outside, *model.unmapped]) == list(source.names())
    assert model.unmapped == ()
    for index in range(model.num_blocks):
        refs = model.weights(index)
        matrices = {n for n in model.block_tensors(index) if len(source.info(n).shape) > 1}
        assert {ref.name for ref in refs} == matrices
        assert len({ref.name for ref in refs}) == len(refs)
        for ref in refs:
            stored = source.info(ref.name).shape
            assert ref.shape == (stored[::-1] if ref.transposed else stored)


def test_weight_is_the_checkpoint_tensor_and_writes_go_through(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    model = CausalModel.open(source)
    block = model.load_block(1)
    for ref in model.weights(1):
        stored = source.read(ref.name)
        w_OI = model.weight(block, ref)
        assert torch.equal(w_OI, stored.t() if ref.transposed else stored)
        model.set_weight_(block, ref, w_OI + 1)
        assert torch.equal(model.tensor(block, 1, ref.name), stored + 1)
    names = {ref.name for ref in model.weights(1)}
    for name in set(model.block_tensors(1)) - names:
        assert torch.equal(model.tensor(block, 1, name), source.read(name))


def test_tap_gives_each_input_once_without_padding(checkpoint: Path) -> None:
    model = CausalModel.open(open_source(checkpoint))
    ids, mask = batch()
    hidden, calls = model.calls(ids, mask)
    block = model.load_block(0)
    seen: dict[str, torch.Tensor] = {}

    def keep(key: str, x: torch.Tensor) -> None:
        assert key not in seen
        seen[key] = x.clone()

    with model.tap(0, block, mask, keep):
        first = model.run(block, hidden, calls[0])
    assert torch.equal(first, model.run(block, hidden, calls[0]))
    refs = {ref.input: ref for ref in model.weights(0)}
    for key, x in seen.items():
        assert x.shape[1] == refs[key].shape[1]
        if refs[key].role != "expert":
            assert len(x) == int(mask.sum())
    # Tokens that are not padding do not change when padding is cut off.
    alone, calls = model.calls(ids[1:, :11])
    again: dict[str, torch.Tensor] = {}
    with model.tap(0, block, None, lambda key, x: again.update({key: x.clone()})):
        model.run(block, alone, calls[0])
    for key in (key for key in seen if refs[key].role != "expert"):
        # Attention over 11 or 16 keys sums in another order.
        torch.testing.assert_close(seen[key][16:], again[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_bfloat16_blocks_give_the_logits_of_transformers(model_type: str, tmp_path: Path) -> None:
    path = tiny.build(model_type, tmp_path, dtype=torch.bfloat16)
    model = CausalModel.open(open_source(path))
    assert model.dtype == torch.bfloat16
    ids, _ = batch()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits
    found = streamed_logits(model, ids, None)
    # Experts may be summed in another order: a few units in the last place of bfloat16.
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "llama", "falcon", "mixtral"])
def test_a_checkpoint_without_the_base_prefix_keeps_its_names(
    model_type: str, tmp_path: Path
) -> None:
    path = tiny.build(model_type, tmp_path)
    ids, _ = batch()
    expected = streamed_logits(CausalModel.open(open_source(path)), ids, None)
    prefix = AutoModelForCausalLM.from_pretrained(path).base_model_prefix
    tensors = {k.removeprefix(f"{prefix}."): v for k, v in load_file(path / WEIGHTS).items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    model = CausalModel.open(open_source(path))
    assert torch.equal(streamed_logits(model, ids, None), expected)
    assert {ref.name for ref in model.weights(0)} <= set(tensors)


def test_unknown_tensors_are_reported(tmp_path: Path) -> None:
    path = tiny.build("llama", tmp_path)
    tensors = load_file(path / WEIGHTS)
    tensors["model.mtp.0.proj.weight"] = torch.zeros(4, 4)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    assert CausalModel.open(open_source(path)).unmapped == ("model.mtp.0.proj.weight",)


@pytest.mark.parametrize(
    ("model_type", "tied"), [("llama", False), ("qwen2", True), ("gpt2", True)]
)
def test_head_is_the_embedding_where_they_are_tied(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    model = CausalModel.open(open_source(tiny.build(model_type, tmp_path)))
    assert model.head_tied is tied
    assert model.head.name in model.outside
    assert model.head.shape == (tiny.VOCABULARY, tiny.HIDDEN)


def test_a_tied_config_with_a_head_of_its_own_uses_that_head(tmp_path: Path) -> None:
    path = tiny.build("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = CausalModel.open(open_source(path))
    ids, _ = batch()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path)(ids).logits
    assert not model.head_tied
    assert torch.equal(streamed_logits(model, ids, None), expected)


def test_head_hidden_is_what_the_head_reads(tmp_path: Path) -> None:
    source = open_source(tiny.build("llama", tmp_path))
    model = CausalModel.open(source)
    hidden = torch.randn(1, 5, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    logits = model.head_hidden(hidden) @ source.read("lm_head.weight").t()
    # One product, summed in another order.
    torch.testing.assert_close(model.logits(hidden), logits, rtol=1e-5, atol=1e-5)


def test_experts_statistics_are_taken_per_expert(tmp_path: Path) -> None:
    source = open_source(tiny.build("mixtral", tmp_path))
    model = CausalModel.open(source)
    ids, mask = batch()
    hidden, calls = model.calls(ids, mask)
    block = model.load_block(0)
    seen: dict[str, torch.Tensor] = {}
    with model.tap(0, block, mask, lambda key, x: seen.update({key: x.clone()})):
        model.run(block, hidden, calls[0])
    x_TH = seen["mlp.gate"]
    logits = x_TH @ source.read("model.layers.0.block_sparse_moe.gate.weight").t()
    chosen = logits.topk(2, dim=-1).indices
    assert sum(len(seen.get(f"mlp.experts.{e}:in", [])) for e in range(4)) == 2 * len(x_TH)
    for expert in range(4):
        rows = x_TH[(chosen == expert).any(1)]
        if len(rows):
            assert torch.equal(seen[f"mlp.experts.{expert}:in"], rows)
            name = f"model.layers.0.block_sparse_moe.experts.{expert}"
            gate, up = (rows @ source.read(f"{name}.{w}.weight").t() for w in ("w1", "w3"))
            mid = torch.nn.functional.silu(gate) * up
            # The same product in one matrix or two.
            torch.testing.assert_close(seen[f"mlp.experts.{expert}:mid"], mid, rtol=1e-5, atol=1e-5)


def test_routers_and_experts_have_their_roles(tmp_path: Path) -> None:
    model = CausalModel.open(open_source(tiny.build("qwen3_moe", tmp_path)))
    roles = {ref.name: ref.role for ref in model.weights(0)}
    assert roles["model.layers.0.mlp.gate.weight"] == "router"
    assert roles["model.layers.0.mlp.experts.3.up_proj.weight"] == "expert"
    assert roles["model.layers.0.self_attn.q_proj.weight"] == "linear"


def test_text_blocks_of_a_multimodal_model_are_streamed(tmp_path: Path) -> None:
    path = tiny.build_multimodal(tmp_path)
    model = CausalModel.open(open_source(path))
    model.check_replay()
    ids, _ = batch()
    with torch.no_grad():
        expected = AutoModelForImageTextToText.from_pretrained(path)(ids).logits
    # Float32 and the same operations.
    torch.testing.assert_close(streamed_logits(model, ids, None), expected, rtol=1e-5, atol=1e-5)
    assert model.num_blocks == tiny.LAYERS
    assert all("language_model" in ref.name for ref in model.weights(0))
    assert any("vision_tower" in name for name in model.outside)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "lfm2"])
def test_shared_experts_and_convolutions_are_streamed(model_type: str, tmp_path: Path) -> None:
    path = tiny.build(model_type, tmp_path)
    model = CausalModel.open(open_source(path))
    ids, _ = batch()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path)(ids).logits
    # Float32; the experts' sums may be in another order.
    torch.testing.assert_close(streamed_logits(model, ids, None), expected, rtol=1e-5, atol=1e-5)
    if model_type == "qwen2_moe":
        roles = {ref.parameter: ref.role for ref in model.weights(0)}
        assert roles["mlp.shared_expert_gate.weight"] == "router"
        assert roles["mlp.shared_expert.up_proj.weight"] == "linear"


def test_experts_in_one_tensor_are_refused_until_they_are_split(tmp_path: Path) -> None:
    path = tiny.build("gpt_oss", tmp_path)
    with pytest.raises(ModelError, match="all experts in one tensor"):
        CausalModel.open(open_source(path))


def damaged(path: Path, name: str, tensor: torch.Tensor | None) -> FileSource:
    tensors = load_file(path / WEIGHTS)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    return FileSource(path)


NAME = "model.layers.1.mlp.up_proj.weight"


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path = tiny.build("llama", tmp_path)
    weight = load_file(path / WEIGHTS)[NAME]
    weight[3, 4] = float("nan")
    model = CausalModel.open(damaged(path, NAME, weight))
    model.load_block(0)
    with pytest.raises(NumericsError, match=NAME):
        model.load_block(1)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    path = tiny.build("llama", tmp_path)
    with pytest.raises(CheckpointError, match=NAME):
        CausalModel.open(damaged(path, NAME, None))


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    path = tiny.build("llama", tmp_path)
    with pytest.raises(CheckpointError, match=NAME):
        CausalModel.open(damaged(path, NAME, torch.zeros(3, 4)))


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    path = tiny.build("mixtral", tmp_path)
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.down_proj"):
        CausalModel.open(damaged(path, name, None))


@pytest.mark.parametrize("model_type", ["no_such_model", "bert"])
def test_what_is_no_causal_model_is_refused(model_type: str, tmp_path: Path) -> None:
    path = tiny.build("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises((ModelError, CheckpointError)):
        CausalModel.open(FileSource(path))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"hidden_act": "no_such_function"},
        {"dtype": "float8_e4m3fn"},
        {"dtype": "no_such_type"},
    ],
    ids=lambda change: "-".join(f"{key}_{value}" for key, value in change.items()),
)
def test_a_config_that_makes_no_sense_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    path = tiny.build("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises((CheckpointError, ModelError)):
        CausalModel.open(FileSource(path))


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    model = CausalModel.open(open_source(tiny.build("llama", tmp_path)))
    with pytest.raises(ModelError, match="vocabulary"):
        model.calls(torch.tensor([[tiny.VOCABULARY]]))


def test_opening_leaves_transformers_and_the_config_as_they_were(tmp_path: Path) -> None:
    path = tiny.build("llama", tmp_path)
    before = AutoConfig.from_pretrained(path).to_dict()
    model = CausalModel.open(open_source(path))
    ids, _ = batch()
    model.calls(ids)
    assert AutoConfig.from_pretrained(path).to_dict() == before
    assert "forward" not in model.load_block(0).__dict__
