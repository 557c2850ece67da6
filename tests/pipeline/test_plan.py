"""The plan: a fate for every tensor and the exact layout of the output, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_jobs as jobs
import tiny_models as tiny
import torch

from quantkit.checkpoint.files import FileSource
from quantkit.errors import FormatError, RecipeError, ShapeError
from quantkit.methods.recipe import load_recipe
from quantkit.model.causal import CausalModel
from quantkit.pipeline.job import prepare
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import Plan, make_plan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    return opened("llama", tmp_path_factory)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    return opened("qwen2", tmp_path_factory)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    return opened("mixtral", tmp_path_factory)


def opened(kind: str, folders: pytest.TempPathFactory) -> CausalModel:
    directory = jobs.build(kind, folders.mktemp(kind), dtype=torch.bfloat16)
    return CausalModel.open(FileSource(directory))


def plan_of(
    model: CausalModel, method: str = "rtn", scheme: str = "w4a16_g32", **more: Any
) -> Plan:
    options = {key: more.pop(key) for key in ("format_name", "allow_unreadable") if key in more}
    return make_plan(model, load_recipe(method, scheme=scheme, **more), **options)


def test_every_tensor_has_one_fate(llama: CausalModel) -> None:
    plan = plan_of(llama)
    assert sorted(fate.name for fate in plan.fates) == list(llama.source.names())
    by_name = {fate.name: fate for fate in plan.fates}
    up = by_name["model.layers.1.mlp.up_proj.weight"]
    assert (up.fate, up.block, up.reason) == ("quantized", 1, "method rtn")
    assert up.source_bytes == 2 * 96 * 64
    assert [info.name for info in up.output] == [
        "model.layers.1.mlp.up_proj.weight_packed",
        "model.layers.1.mlp.up_proj.weight_scale",
        "model.layers.1.mlp.up_proj.weight_shape",
    ]
    assert up.num_bytes == 96 * 64 // 2 + 2 * 96 * 2 + 16
    assert by_name["lm_head.weight"].reason == "output head"
    assert by_name["model.embed_tokens.weight"].reason == "embedding"
    assert by_name["model.norm.weight"].reason == "norm or bias"
    assert [fate.block for fate in plan.fates] == [None] * 3 + [0] * 9 + [1] * 9


def test_transforms_rescale_norms_and_the_producers_of_what_they_fold(llama: CausalModel) -> None:
    fates = {fate.name: fate for fate in plan_of(llama, "awq", "w4a16_g32_asym").fates}
    norm = fates["model.layers.0.input_layernorm.weight"]
    assert (norm.fate, norm.reason) == ("rescaled", "folded by awq")
    assert fates["model.norm.weight"].fate == "kept"


def test_folds_of_readers_that_are_all_kept_are_left_out(llama: CausalModel) -> None:
    skip = ("*0.self_attn.[qkv]_proj",)
    fates = {f.name: f.fate for f in plan_of(llama, "awq", skip=skip).fates}
    assert fates["model.layers.0.input_layernorm.weight"] == "kept"
    assert fates["model.layers.1.input_layernorm.weight"] == "rescaled"
    # Quantized o_proj still reads v_proj, whose rows take the scale.
    assert fates["model.layers.0.self_attn.v_proj.weight"] == "rescaled"
    assert fates["model.layers.0.self_attn.q_proj.weight"] == "kept"


def test_bits_per_weight_count_everything(llama: CausalModel) -> None:
    plan = plan_of(llama)
    shapes = [llama.source.info(name).shape for name in llama.source.names()]
    parameters = sum(torch.Size(shape).numel() for shape in shapes)
    assert plan.bits_per_weight == 8 * sum(f.num_bytes for f in plan.fates) / parameters
    # 4 bits, a bfloat16 scale for every 32, and 16 bytes of shape for each of 14 weights.
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    expected = 4.5 + 8 * 16 * 14 / weights
    assert plan.bits_per_quantized_weight == pytest.approx(expected)


def test_a_head_is_quantized_only_if_asked_for(llama: CausalModel, tied: CausalModel) -> None:
    assert plan_of(llama).head is None
    plan = plan_of(llama, head="w8a16_row")
    assert plan.head is not None and not plan.unties_head
    assert {f.name: f.fate for f in plan.fates}["lm_head.weight"] == "quantized"
    plan = plan_of(tied, head="w8a16_row")
    assert plan.unties_head and plan.planned_head.name == "lm_head.weight"
    assert {f.name: f.fate for f in plan.fates}["model.embed_tokens.weight"] == "kept"
    names = {info.name for info in plan.head_layout}
    assert names and all(name.startswith("lm_head.weight") for name in names)


def test_routers_are_never_quantized(mixtral: CausalModel) -> None:
    plan = plan_of(mixtral)
    fates = {fate.name: fate for fate in plan.fates}
    router = fates["model.layers.0.block_sparse_moe.gate.weight"]
    assert (router.fate, router.reason) == ("kept", "router")
    experts = [f for f in plan.fates if ".experts." in f.name]
    assert len(experts) == 2 * 4 * 3 and {f.fate for f in experts} == {"quantized"}


def test_readers_say_who_reads_the_result(llama: CausalModel, mixtral: CausalModel) -> None:
    assert plan_of(llama).readers == {"transformers": None, "vllm": None}
    readers = plan_of(mixtral, scheme="w4a16_g32_asym").readers
    assert readers["transformers"] is not None and "symmetric" in readers["transformers"]
    assert readers["vllm"] is None


def test_what_no_runtime_reads_needs_permission(mixtral: CausalModel) -> None:
    with pytest.raises(FormatError, match="no runtime reads mixtral in bitsandbytes"):
        plan_of(mixtral, "nf4", "nf4_b64")
    plan = plan_of(mixtral, "nf4", "nf4_b64", allow_unreadable=True)
    assert all(plan.readers.values())


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("w4a16_g32", "compressed-tensors"),
        ("w8a16_row", "compressed-tensors"),
        ("w8a8_row", "compressed-tensors"),
        ("w2a16_g32", "compressed-tensors"),
        ("w3a16_g32_asym", "compressed-tensors"),
        ("nf4_b64_dq", "bitsandbytes"),
        ("fp4_b64", "bitsandbytes"),
    ],
)
def test_a_scheme_has_a_default_format(scheme: str, expected: str, llama: CausalModel) -> None:
    assert plan_of(llama, scheme=scheme, allow_unreadable=True).format.name == expected


def test_a_format_that_cannot_hold_the_scheme_is_refused(llama: CausalModel) -> None:
    with pytest.raises(FormatError, match=r"q_proj.weight: gptq_v2 cannot hold w5a16"):
        plan_of(llama, scheme="w5a16_g32", format_name="gptq_v2")
    with pytest.raises(FormatError, match="formats that can: bitsandbytes, compressed-tensors"):
        plan_of(llama, scheme="w8a8_row", format_name="gptq_v2")


def test_a_shape_that_does_not_fit_is_named(llama: CausalModel) -> None:
    with pytest.raises(ShapeError, match=r"layers\.0\.mlp\.down_proj\.weight: 96 columns"):
        plan_of(llama, scheme="w4a16_g64")
    plan = plan_of(llama, scheme="w4a16_g64", skip=("*down_proj*",))
    assert {f.scheme.name for f in plan.fates if f.scheme} == {"w4a16_g64"}


def test_weights_that_share_an_input_share_a_scheme(llama: CausalModel) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_of(llama, skip=("*1.mlp.gate_proj",))
    for part in (
        "layers.1.mlp.gate_proj.weight (kept)",
        "up_proj.weight (w4a16_g32)",
        "same input",
    ):
        assert part in str(caught.value)
    plan_of(llama, skip=("*1.mlp.gate_proj", "*1.mlp.up_proj"))


def test_experts_of_a_layer_share_a_scheme(mixtral: CausalModel) -> None:
    with pytest.raises(RecipeError, match="experts of one layer"):
        plan_of(mixtral, skip=("*0.block_sparse_moe.experts.3.*",))
    plan_of(mixtral, skip=("*0.block_sparse_moe.experts.*",), allow_unreadable=True)


def test_a_glob_that_matches_nothing_is_a_mistake(llama: CausalModel) -> None:
    with pytest.raises(RecipeError, match=r"'h\.0\.mlp' matches no tensor; names look like model"):
        plan_of(llama, skip=("h.0.mlp",))


def test_inputs_are_grouped_in_the_order_of_use(llama: CausalModel) -> None:
    groups = [
        [ref.name.split(".")[-2] for ref in refs] for _, refs in plan_of(llama).input_groups(1)
    ]
    assert groups == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_a_processor_without_bfloat16_writes_the_same_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("llama", tmp_path, dtype=torch.bfloat16)
    recipe = load_recipe("nf4")
    found = []
    for has in (True, False):
        monkeypatch.setattr("quantkit.pipeline.job.has_bf16_units", lambda has=has: has)
        plan = prepare(str(model), QuantizeOptions(recipe=recipe)).plan
        found.append(plan.quantization_config)
    assert found[0] == found[1]
    assert found[0]["bnb_4bit_compute_dtype"] == "bfloat16"
