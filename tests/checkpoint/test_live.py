"""LiveSource gives what save_pretrained writes: the same names, dtypes and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from quantkit.checkpoint.files import FileSource
from quantkit.checkpoint.live import LiveSource
from quantkit.errors import CheckpointError
from quantkit.formats.open import open_source

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama-tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=3),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL, num_experts=12, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
    ),
}


def make(kind: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=dtype)


@pytest.mark.parametrize("reloaded", [False, True], ids=["from_config", "from_pretrained"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_live_tensors_are_those_save_pretrained_writes(
    kind: str, reloaded: bool, tmp_path: Path
) -> None:
    model = make(kind)
    if reloaded:
        model.save_pretrained(tmp_path / "first")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    saved, live = FileSource(tmp_path / "saved"), LiveSource(model)
    assert live.names() == saved.names()
    assert len(live.names()) >= 20
    for name in saved.names():
        assert live.info(name) == saved.info(name)
        assert torch.equal(live.read(name).view(torch.uint8), saved.read(name).view(torch.uint8))
    assert live.config == saved.config
    assert live.side_files() == {
        name: Path(str(path)).read_bytes() for name, path in saved.side_files().items()
    }
    assert live.fingerprint() == saved.fingerprint()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_converted_one_at_a_time(kind: str) -> None:
    live = LiveSource(make(kind))
    slices = [origin.slice for name, origin in live._origins.items() if ".experts." in name]
    assert len(slices) == 2 * 3 * (3 if kind == "mixtral" else 12)
    assert None not in slices


def test_tensors_made_of_several_parameters_are_converted_by_layer(tmp_path: Path) -> None:
    from transformers.core_model_loading import Chunk, WeightConverter

    model = make("llama-untied")
    fused = WeightConverter(
        source_patterns="mlp.ff_proj.weight",
        target_patterns=["mlp.up_proj.weight", "mlp.gate_proj.weight"],
        operations=[Chunk(dim=0)],
    )
    model._weight_conversions = [fused]
    model.save_pretrained(tmp_path)
    saved, live = FileSource(tmp_path), LiveSource(model)
    name = "model.layers.1.mlp.ff_proj.weight"
    assert live.names() == saved.names()
    assert torch.equal(live.read(name), saved.read(name))
    assert live.info(name).shape == (2 * 48, 32)
    converted = live._origins[name].parameters
    assert all(parameter.startswith("model.layers.1.") for parameter in converted)


def test_ranges_of_a_live_model_are_parts_of_the_whole(tmp_path: Path) -> None:
    live = LiveSource(make("qwen3_moe"))
    for name in live.names():
        whole = live.read(name)
        rows = whole.shape[0]
        assert torch.equal(live.read_rows(name, rows // 3, rows), whole[rows // 3 :])
        assert torch.equal(
            live.read_flat(name, 5, whole.numel() - 3), whole.flatten()[5 : whole.numel() - 3]
        )
        some = torch.tensor([rows - 1, 0, rows // 2, 0])
        assert torch.equal(live.gather(name, some), whole[some])


def test_noncontiguous_parameter_is_read_by_rows() -> None:
    model = make("llama-untied")
    model.lm_head.weight = torch.nn.Parameter(torch.randn(32, 96, dtype=torch.bfloat16).T)
    live = LiveSource(model)
    whole = model.lm_head.weight.detach()
    assert torch.equal(live.read("lm_head.weight"), whole)
    assert torch.equal(live.read_flat("lm_head.weight", 45, 1000), whole.flatten()[45:1000])


def test_what_is_read_is_a_copy() -> None:
    model = make("llama-untied")
    live = LiveSource(model)
    before = live.read("lm_head.weight")
    live.read("lm_head.weight").zero_()
    assert torch.equal(live.read("lm_head.weight"), before)


def test_unsuitable_objects_are_refused() -> None:
    with pytest.raises(CheckpointError, match="Linear: not a model"):
        open_source(torch.nn.Linear(2, 2))
    with torch.device("meta"):
        offloaded = AutoModelForCausalLM.from_config(CONFIGS["llama-untied"])
    with pytest.raises(CheckpointError, match="offloaded"):
        open_source(offloaded)
