"""One model type for each kind of construct that blocks are made of, through the whole of it.

`tools/sweep_models.py` does the same with every type of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_jobs as jobs
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from quantkit.errors import ModelError
from quantkit.formats.format import expert_name
from quantkit.formats.open import open_source
from quantkit.model.causal import CausalModel
from quantkit.model.trace import OUTSIDE, SHARED, UNREACHED
from tools.sweep.one import METHODS, Finding, Kind, _build, examine

# type -> what it has that others have not.
WORKS = {
    "mamba": "a weight that its own code reads, beside its layer",
    "bart": "cross-attention, which text alone does not reach",
    "granitemoe": "experts in one tensor that transformers renames",
    "olmo_hybrid": "tensors put together by rows",
    "falcon_h1": "a buffer that the stack around its module computes, an infinite limit",
    "cpmant": "more hidden states than tokens",
    "deepseek_v4": "several streams of hidden states, products of many matrices, bare matrices",
    "gemma4_text": "heads whose size differs from block to block",
    "kimi_linear": "norms with a gate, a carried state",
    "zaya": "blocks that pool tokens",
    "llama4_text": "experts by torch.bmm, [I, O] each",
    "jetmoe": "experts that the model's own loop picks, square ones among them",
    "longcat_flash": "a loop over those experts that tokens reach",
    "inkling2_text": "experts whose rows transformers interleaves, matrices of other names",
    "qwen3_5_text": "gates of few rows with zeros",
    "xlm": "two lists of layers that take turns",
    "hrm_text": "layers that run several times, tensors cut into several modules",
    "hy_v4": "a block that needs what another found",
}


# The same of other mappings of transformers.
OTHERS = [
    ("image", "kimi_k25", "a tower whose tensors transformers splits and permutes"),
    ("image", "idefics3", "masks made on the device of a tower that stays empty"),
    ("image", "minimax_m3_vl", "a linear layer whose rows are two tensors"),
    ("image", "mllama", "blocks that read images and do not run on text"),
    ("image", "nemotron_h_omni", "a head that belongs to a model within it"),
    ("encoder", "modernbert", "no causal mask"),
    ("encoder", "albert", "one layer that runs again and again"),
    ("encoder", "bart", "an encoder and a decoder"),
    ("encoder", "gte", "tensors that transformers cuts into several modules"),
    ("embedding", "albert", "no head, and one layer that runs again and again"),
    ("embedding", "mvp", "no head, an encoder and a decoder"),
    ("reranker", "qwen3", "a score from the last token"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with jobs.one_thread():
        yield


@pytest.mark.parametrize("model_type", WORKS)
def test_loaded_logits_are_those_of_the_decoded_weights(model_type: str, tmp_path: Path) -> None:
    found = examine("causal", model_type, tmp_path / "work")
    assert found.status == "works", found
    assert [run.method for run in found.runs] == list(METHODS)
    assert all((run.quantized or 0) >= 0.8 for run in found.runs)


@pytest.mark.parametrize(("kind", "model_type", "_"), OTHERS, ids=lambda part: part[:13])
def test_other_kinds_of_models_work_alike(
    kind: Kind, model_type: str, _: str, tmp_path: Path
) -> None:
    found = examine(kind, model_type, tmp_path / "work")
    assert found.status == "works", found


def built(model_type: str, directory: Path, kind: Kind = "causal") -> Path:
    with torch.no_grad():
        _build(kind, model_type, directory, torch.arange(3, 51).view(2, 24))
    return directory


def reasons(model_type: str, directory: Path) -> dict[str, str]:
    """Name -> reason of what the blocks keep, of two dimensions or more."""
    plan = jobs.make_job(built(model_type, directory), "rtn", None, allow_unreadable=True).plan
    return {
        fate.name: fate.reason
        for fate in plan.fates
        if fate.block is not None and len(fate.shape) > 1 and fate.fate != "quantized"
    }


def test_what_stays_is_told_with_its_reason(tmp_path: Path) -> None:
    bart = reasons("bart", tmp_path / "bart")
    assert set(bart.values()) == {UNREACHED}
    assert all("encoder_attn" in name for name in bart)
    mamba = reasons("mamba", tmp_path / "mamba")
    assert mamba["backbone.layers.0.mixer.dt_proj.weight"] == OUTSIDE
    zamba = reasons("zamba", tmp_path / "zamba")
    assert zamba["model.layers.1.shared_transf.self_attn.q_proj.weight"] == SHARED


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("xlnet", "XLNetRelativeAttention multiplies by this weight in a product of more than two"),
        ("rwkv", "RwkvForCausalLM reads this weight outside the layer that multiplies by it"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(
    model_type: str, said: str, tmp_path: Path
) -> None:
    model = built(model_type, tmp_path / "model")
    with pytest.raises(ModelError, match=said):
        jobs.make_job(model, "rtn", None, allow_unreadable=True)


def test_a_body_without_matrix_products_is_refused(tmp_path: Path) -> None:
    found = examine("encoder", "squeezebert", tmp_path / "work")
    assert found.status == "refused"
    assert "no matrix product reads it; 9" in found.runs[0].message


def test_a_whole_body_is_one_block_and_the_plan_says_so(tmp_path: Path) -> None:
    directory = built("bart", tmp_path / "bart", "encoder")
    plan = jobs.make_job(directory, "rtn", None, allow_unreadable=True).plan
    assert "model is worked on as one block of" in plan.notes[0]
    told = {fate.name: fate for fate in plan.fates}
    crossing = [fate for name, fate in told.items() if "encoder_attn.k_proj.weight" in name]
    assert len(crossing) == 4 and {fate.fate for fate in crossing} == {"quantized"}
    assert {fate.reason for name, fate in told.items() if "embed_positions" in name} == {
        "embedding"
    }


def test_tables_that_a_whole_body_shares_are_kept_while_it_is_healed(tmp_path: Path) -> None:
    directory = built("bart", tmp_path / "bart", "encoder")
    rows = torch.arange(3, 3 + 8 * 32).view(8, 32).remainder(50).add(3).tolist()
    job = jobs.make_job(directory, "best", "w3a16_row", calibration=rows, allow_unreadable=True)
    out = jobs.finish(job, tmp_path / "out").out
    loss = json.loads((out / "quantkit/report.json").read_bytes())["refined"]["heal"]
    assert 0 < loss["after"] <= loss["before"]


def test_a_weight_that_runs_again_is_told_each_time(tmp_path: Path) -> None:
    directory = built("albert", tmp_path / "albert", "encoder")
    model = CausalModel.open(open_source(str(directory)))
    ids = torch.arange(3, 51).view(2, 24)
    hidden, calls = model.calls(ids)
    block, seen = model.load_block(0), list[str]()
    with model.tap(0, block, None, lambda key, _: seen.append(key)):
        output = model.run(block, hidden, calls[0])
    query = next(key for key in seen if key.endswith("attention.query"))
    layers = model.text_config.num_hidden_layers
    assert seen.count(query) == layers > 1
    # Queries, keys and values read one input, which is told once.
    assert not any(key.endswith(("attention.key", "attention.value")) for key in seen)
    plain = AutoModelForMaskedLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(model.logits(output), plain(input_ids=ids).logits)


def test_a_whole_body_without_a_head_has_the_names_of_its_class(tmp_path: Path) -> None:
    directory = built("albert", tmp_path / "albert", "embedding")
    plan = jobs.make_job(directory, "rtn", None, skip=("*.ffn.*",)).plan
    plain = AutoModel.from_pretrained(directory)
    modules = {path for path, _ in plain.named_modules()}
    assert {weight.module for weight in plan.weights} <= modules
    ignored = plan.quantization_config["ignore"]
    assert set(ignored) <= modules
    assert "encoder.albert_layer_groups.0.albert_layers.0.ffn" in ignored


def test_blocks_that_text_does_not_reach_are_outside(tmp_path: Path) -> None:
    directory = built("mllama", tmp_path / "mllama", "image")
    model = CausalModel.open(open_source(str(directory)))
    assert model.num_blocks == 3
    crossing = [name for name in model.source.names() if "cross_attn.q_proj" in name]
    assert crossing and set(crossing) <= set(model.outside)
    plan = jobs.make_job(directory, "rtn", None, allow_unreadable=True).plan
    told = {fate.reason for fate in plan.fates if fate.name in crossing}
    assert told == {"outside of the blocks that run on text"}


def test_experts_may_be_kept_knowingly(tmp_path: Path) -> None:
    model = built("llama4_text", tmp_path / "model")
    job = jobs.make_job(model, "rtn", None, skip=("*experts*",), allow_unreadable=True)
    assert {f.fate for f in job.plan.fates if ".q_proj" in f.name} == {"quantized"}
    assert {f.fate for f in job.plan.fates if ".experts." in f.name} == {"kept"}


@pytest.mark.parametrize(
    ("fused", "expected"),
    [
        ("a.experts.gate_up_proj", "a.experts.3.gate_up_proj.weight"),
        ("a.input_linear.weight", "a.input_linear.3.weight"),
    ],
)
def test_an_expert_is_named_after_its_tensor(fused: str, expected: str) -> None:
    assert expert_name(fused, 3) == expected


def test_a_finding_is_json() -> None:
    found = Finding(kind="causal", model_type="llama", status="works")
    assert found.to_dict()["runs"] == ()
